// The list of episodes: which of them, in which order, and which one is open. It tells `open` when another is chosen.

const SORTS = {
  played: ["as played", () => 0],
  reward: ["reward", (e) => e.reward ?? -Infinity],
  advantage: ["advantage", (e) => e.advantage ?? -Infinity],
  step: ["step", (e) => e.step],
  length: ["words written", (e) => e.turns.reduce((sum, turn) => sum + (turn.pieces?.length ?? 0), 0)],
  surprise: ["mean log-prob", (e) => {
    const all = e.turns.flatMap((turn) => turn.logprobs ?? []).filter((value) => value !== null);
    return all.length ? all.reduce((a, b) => a + b) / all.length : -Infinity;
  }],
};

/** Filters that are offered where the episodes differ in them: a name, and what is read of an episode. */
const FILTERS = {
  run: ["run", (e) => report.runs[e.run].name],
  set: ["played in", (e) => e.set],
  when: ["moment", (e) => e.when],
  task: ["task", (e) => e.task],
  split: ["split", (e) => e.split],
  stop: ["ended", (e) => e.stop],
  outcome: ["first box", (e) => e.outcome],
};

function episodeList(episodes, open) {
  const wanted = { verdict: "", words: "" };
  let sort = "played";
  let down = false;
  let shown = [];
  let current = null;
  const count = element("output", { "aria-live": "polite" });
  const box = element("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "episodes" });

  // Small pictures are made when their row comes near.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      entry.target.querySelector(".thumb").append(mini(entry.target.episode));
    }
  }, { root: box, rootMargin: "300px" });

  const rows = new Map(episodes.map((episode) => {
    const row = element(
      "div", { class: "row", role: "option", id: `row-${episode.key}`, "aria-selected": "false", click: () => select(episode, true) },
      element("span", { class: "thumb" }),
      element(
        "span", { class: "gist" },
        element("span", { class: "ask" }, episode.question || episode.id || episode.key),
        element(
          "span", { class: "quiet" },
          element("b", { class: episode.right ? "good" : "bad" }, episode.right ? "✓ " : "✗ "),
          [episode.said, report.runs.length > 1 ? report.runs[episode.run].name : "", episode.when, episode.reward === null ? "" : `reward ${short(episode.reward)}`]
            .filter((part) => part !== "").join(" · "),
        ),
      ),
    );
    row.episode = episode;
    near.observe(row);
    return [episode, row];
  }));

  const fits = (episode) =>
    (wanted.verdict === "" || (wanted.verdict === "right") === episode.right) &&
    Object.keys(FILTERS).every((key) => !wanted[key] || FILTERS[key][1](episode) === wanted[key]) &&
    (wanted.words === "" || wordsOf(episode).includes(wanted.words));
  const known = new Map();
  const wordsOf = (episode) => {
    if (!known.has(episode)) {
      const said = episode.turns.map((turn) => turn.pieces?.join("") ?? turn.text);
      known.set(episode, [episode.id, episode.question, episode.answer, ...said].join("\n").toLowerCase());
    }
    return known.get(episode);
  };

  const apply = () => {
    const value = SORTS[sort][1];
    shown = episodes.filter(fits);
    if (sort !== "played") shown.sort((a, b) => value(a) - value(b));
    if (down) shown.reverse();
    box.replaceChildren(...shown.map((episode) => rows.get(episode)));
    if (shown.length === 0) box.append(element("p", { class: "note" }, "No episode fits."));
    count.textContent = `${shown.length} of ${episodes.length}`;
  };

  const select = (episode, told) => {
    if (current) rows.get(current).setAttribute("aria-selected", "false");
    current = episode;
    const row = rows.get(episode);
    row.setAttribute("aria-selected", "true");
    box.setAttribute("aria-activedescendant", row.id);
    if (row.isConnected) {
      const { top, bottom } = row.getBoundingClientRect();
      const frame = box.getBoundingClientRect();
      if (top < frame.top) box.scrollTop += top - frame.top - 4;
      else if (bottom > frame.bottom) box.scrollTop += bottom - frame.bottom + 4;
    }
    open(episode, told);
  };

  const step = (by) => {
    if (shown.length === 0) return;
    const at = shown.indexOf(current);
    const next = at < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, at + by));
    if (shown[next] !== current) select(shown[next], true);
  };

  // The controls.
  const verdicts = element("div", { role: "group", "aria-label": "verdict" });
  for (const [key, name] of [["", "all"], ["right", "right"], ["wrong", "wrong"]]) {
    verdicts.append(element("button", {
      type: "button", "aria-pressed": String(key === ""),
      click: (event) => {
        wanted.verdict = key;
        for (const other of verdicts.children) other.setAttribute("aria-pressed", String(other === event.target));
        apply();
      },
    }, name));
  }
  const selects = Object.entries(FILTERS).map(([key, [name, read]]) => {
    const values = [...new Set(episodes.map(read))].filter((value) => value !== "");
    if (values.length < 2) return "";
    const any = element("option", { value: "" }, `${name}: any`);
    return element("select", {
      "aria-label": name,
      change: (event) => {
        wanted[key] = event.target.value;
        apply();
      },
    }, any, ...values.map((value) => element("option", { value }, value)));
  });
  const search = element("input", {
    type: "search", placeholder: "search words", "aria-label": "search in questions, answers and words",
    input: () => {
      wanted.words = search.value.trim().toLowerCase();
      apply();
    },
  });
  const order = element("button", {
    type: "button", class: "order", "aria-label": "turn the order round", title: "turn the order round",
    click: () => {
      down = !down;
      order.textContent = down ? "↓" : "↑";
      apply();
    },
  }, "↑");
  const sorting = element("select", {
    "aria-label": "sort by",
    change: (event) => {
      sort = event.target.value;
      // The best and the longest first, but steps as they came.
      down = !["played", "step", "surprise"].includes(sort);
      order.textContent = down ? "↓" : "↑";
      apply();
    },
  }, ...Object.entries(SORTS).map(([key, [name]]) => element("option", { value: key }, `sort: ${name}`)));
  const filters = element("div", { class: "filters", role: "search", "aria-label": "filter the episodes" }, verdicts, ...selects, search, sorting, order, count);

  box.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    step(Number.isFinite(by) ? by : Math.sign(by) * shown.length);
    event.preventDefault();
    event.stopPropagation();
  });
  apply();
  return { filters, box, search, select, step, first: () => shown[0], current: () => current };
}
