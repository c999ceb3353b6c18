// The open episode: its pictures, its words, its reward, its siblings; and the keys and links by which one walks through all of them.
{
  const episodes = report.episodes;
  const place = document.getElementById("viewer");
  const byKey = new Map(episodes.map((episode) => [episode.key, episode]));
  const gather = (name) => {
    const groups = new Map();
    for (const episode of episodes) {
      const key = name(episode);
      groups.set(key, [...(groups.get(key) ?? []), episode]);
    }
    return (episode) => groups.get(name(episode));
  };
  const siblingsOf = gather((e) => JSON.stringify([e.run, e.set, e.step, e.group]));
  const momentsOf = gather((e) => JSON.stringify([e.run, e.set, e.id]));
  let way = "author";
  let everybody = false;
  let colours = null;
  let stages = [];
  const detail = element("article", { class: "detail", tabindex: -1, "aria-label": "the open episode" });

  /** What is drawn on a picture: targets, crops by number, boxes said in answers, and the siblings' looks where wanted. */
  const boxesOn = (episode, image) => {
    const boxes = [];
    for (const [on, box, label] of episode.targets) {
      if (on === image && box) boxes.push({ box, kind: "target", label: label ? `target: ${label}` : "target" });
    }
    if (everybody) {
      for (const other of siblingsOf(episode)) {
        for (const [on, box] of other.looked) {
          if (on === image && other !== episode) boxes.push({ box, kind: "sibling", label: `a sibling's: member ${other.member}` });
        }
      }
    }
    const crops = episode.views.filter((view) => view.image === image && view.crop > 0 && view.box);
    const same = (a, b) => a.every((side, at) => Math.abs(side - b[at]) < 1);
    for (const [on, box] of episode.looked) {
      if (on === image && !crops.some((view) => same(view.box, box))) boxes.push({ box, kind: "said", label: "the policy named this" });
    }
    for (const view of crops) boxes.push({ box: view.box, kind: "region", label: `crop ${view.crop}`, number: view.crop });
    return boxes;
  };

  /** A box in original pixels as it lies in a view. */
  const within = (view, box) => {
    const [x1, y1, x2, y2] = view.box;
    const [a, b, c, d] = box;
    if (c <= x1 || a >= x2 || d <= y1 || b >= y2) return null;
    const [wide, tall] = [view.width / (x2 - x1), view.height / (y2 - y1)];
    return [(a - x1) * wide, (b - y1) * tall, (c - x1) * wide, (d - y1) * tall];
  };

  /** Originals and views; what belongs below the originals stands there, beside a tall column of views. */
  const pictures = (episode, ...below) => {
    const several = episode.pictures.length > 1;
    const originals = episode.pictures.map((picture, image) => {
      const name = several ? `Image-${image + 1}` : "original";
      const first = episode.views.find((view) => view.image === image && view.crop === 0);
      const seen = several && first?.width ? `, seen as ${first.width} × ${first.height}` : "";
      const caption = [`${name} `, element("span", {}, `${picture.width} × ${picture.height} px${seen}`)];
      return stage(picture, boxesOn(episode, image), caption, `${name} with the regions looked at`);
    });
    const views = episode.views.filter((view) => !(several && view.crop === 0)).map((view) => {
      const name = view.crop === 0 ? "first look" : `crop ${view.crop}`;
      const boxes = episode.targets
        .filter(([on, box]) => on === view.image && box && view.box)
        .map(([, box]) => ({ box: within(view, box), kind: "target", label: "target" }));
      // A closer look within this one.
      const inner = episode.views.filter((other) => view.box && other.box && other.image === view.image && other.turn > view.turn && other !== view);
      for (const other of inner) boxes.push({ box: within(view, other.box), kind: "region", label: `crop ${other.crop}`, number: other.crop });
      const figure = stage(view, boxes.filter(({ box }) => box), [`${name} `, element("span", {}, view.caption ?? "")], `${name}, as the policy saw it`);
      figure.classList.add("asseen");
      return figure;
    });
    stages = [...originals, ...views].filter((figure) => figure.stage);
    return element(
      "div", { class: several ? "pictures several" : "pictures" },
      element("div", {}, element("div", { class: "originals" }, ...originals), ...below),
      views.length ? element("div", { class: "views" }, ...views) : "",
    );
  };

  const judgement = (episode) => {
    const parts = Object.entries(episode.parts);
    const most = Math.max(1, ...parts.map(([, value]) => Math.abs(Number(value)) || 0));
    const bar = ([name, value]) => {
      const number = typeof value === "number" ? value : NaN;
      const filled = element("i", { class: number < 0 ? "minus" : "", style: `width: ${Math.min(100, (Math.abs(number) / most) * 100) || 0}%` });
      return element("div", { class: "part" }, element("dt", {}, name), element("dd", {}, element("span", { class: "meter" }, filled), element("b", {}, Number.isFinite(number) ? short(number) : String(value))));
    };
    const facts = [
      ["reward", short(episode.reward), "whole"],
      ["advantage", episode.advantage === null ? "—" : signed(episode.advantage), episode.advantage < 0 ? "minus" : "plus"],
      ["ended", episode.stop.replaceAll("_", " "), ""], ["first box", episode.outcome.replaceAll("_", " "), ""],
    ].filter(([, value]) => value !== "" && value !== "—");
    return element(
      "section", { class: "judged", "aria-label": "reward" },
      element("dl", { class: "judgement" }, ...facts.map(([name, value, kind]) => element("div", { class: kind }, element("dt", {}, name), element("dd", {}, value)))),
      parts.length ? element("dl", { class: "parts" }, ...parts.map(bar)) : "",
    );
  };

  const strip = (title, about, all, current, name) => {
    if (all.length < 2) return "";
    const cards = all.map((episode) => {
      const card = element(
        "button", { type: "button", class: "card", "aria-current": episode === current ? "true" : false, click: () => list.select(episode, true) },
        mini(episode),
        element("span", { class: "line" }, element("b", {}, name(episode)), element("span", { class: episode.right ? "good" : "bad" }, `${episode.said || "—"} ${episode.right ? "✓" : "✗"}`)),
        element("span", { class: "line quiet" }, `reward ${short(episode.reward)}`, element("span", {}, episode.advantage === null ? "" : signed(episode.advantage))),
      );
      return card;
    });
    return element("section", { class: "others" }, element("h4", {}, title, " ", element("span", { class: "quiet" }, about)), element("div", { class: "strip" }, ...cards));
  };

  const show = (episode, told) => {
    hideTip();
    const siblings = siblingsOf(episode);
    const moments = [...new Map(momentsOf(episode).map((one) => [one.step, one])).values()].map((one) => (one.step === episode.step ? episode : one));
    const talk = conversation(episode);
    // Records of earlier versions have no tokens to colour.
    colours = episode.turns.some((turn) => turn.pieces) ? colouring(talk, episode, way, (chosen) => { way = chosen; }) : null;
    const run = report.runs[episode.run];
    const facts = [episode.when, episode.set, episode.task, episode.split, episode.id, episode.member === "" ? "" : `member ${episode.member}`];
    const head = element(
      "header", {},
      element("span", { class: `verdict ${episode.right ? "good" : "bad"}` }, episode.right ? "right" : "wrong"),
      report.runs.length > 1 ? element("span", { class: "run" }, element("i", { class: `swatch s${run.colour}` }), run.name) : "",
      ...[...new Set(facts)].filter((fact) => fact !== "").map((fact) => element("span", { class: "quiet" }, fact)),
    );
    const walk = element(
      "div", { class: "walk" },
      element("a", { href: `#${episode.key}`, title: "a link to this episode", "aria-label": "a link to this episode" }, "link"),
      element("button", { type: "button", title: "previous (k)", "aria-label": "previous episode", click: () => list.step(-1) }, "‹"),
      element("button", { type: "button", title: "next (j)", "aria-label": "next episode", click: () => list.step(1) }, "›"),
      element("button", { type: "button", title: "keys (?)", "aria-label": "keys", click: () => help.showModal() }, "?"),
    );
    const group = siblings.length > 1 && siblings.some((one) => one.looked.length)
      ? element("label", { class: "everybody" }, element("input", {
        type: "checkbox", ...(everybody ? { checked: true } : {}),
        change: (event) => { everybody = event.target.checked; show(list.current(), false); },
      }), " the boxes of the whole group")
      : "";
    detail.replaceChildren(
      head,
      element("h3", {}, episode.question),
      episode.answer === "" ? "" : element("p", { class: "answer" }, "right answer ", element("b", {}, episode.answer), episode.said ? " · it says " : "", episode.said ? element("b", {}, episode.said) : ""),
      pictures(episode, group, judgement(episode)), colours ?? "", talk,
      strip("The group", `${siblings.length} answers to the same question, compared with each other (n, p)`, siblings, episode, (one) => `member ${one.member}`),
      strip("The same question at other moments", "(comma, full stop)", moments.length > 1 ? moments : [], episode, (one) => one.when),
      walk,
    );
    if (told) history.replaceState(null, "", `#${episode.key}`);
  };

  const among = (all, by) => {
    const at = all.indexOf(list.current());
    const next = all[at + by];
    if (next) list.select(next, true);
  };
  const moment = (by) => {
    const now = list.current();
    const steps = [...new Set(momentsOf(now).map((one) => one.step))];
    const step = steps[steps.indexOf(now.step) + by];
    const next = momentsOf(now).find((one) => one.step === step);
    if (next) list.select(next, true);
  };

  const KEYS = [
    [["j", "ArrowRight"], "j or →", "next episode of the list", () => list.step(1)],
    [["k", "ArrowLeft"], "k or ←", "previous episode", () => list.step(-1)],
    [["n"], "n", "next of its group", () => among(siblingsOf(list.current()), 1)],
    [["p"], "p", "previous of its group", () => among(siblingsOf(list.current()), -1)],
    [["."], ".", "the same question later", () => moment(1)],
    [[","], ",", "the same question earlier", () => moment(-1)],
    [["c"], "c", "colour the tokens by the next number", () => colours?.next()],
    [["g"], "g", "the boxes of the whole group, on and off", () => { everybody = !everybody; show(list.current(), false); }],
    [["+", "="], "+", "closer", () => nearest()?.zoom(1.6)],
    [["-"], "−", "farther", () => nearest()?.zoom(1 / 1.6)],
    [["0"], "0", "the whole picture", () => nearest()?.whole()],
    [["z"], "z", "the picture large, and back", () => nearest()?.large()],
    [["/"], "/", "search", () => list.search.focus()],
    [["?"], "?", "these keys", () => help.showModal()],
  ];
  /** The picture that has the focus, else the first. */
  const nearest = () => (stages.find((figure) => figure.contains(document.activeElement)) ?? stages[0])?.stage;
  const help = element(
    "dialog", { class: "help", "aria-label": "keys" }, element("h3", {}, "Keys"),
    element("dl", {}, ...KEYS.flatMap(([, name, about]) => [element("dt", {}, element("kbd", {}, name)), element("dd", {}, about)])),
    element("p", { class: "note" }, "On a picture: drag to move it, double click or Ctrl and the wheel to come closer, two fingers on a phone."),
    element("form", { method: "dialog" }, element("button", {}, "close")),
  );

  const list = place && episodes.length ? episodeList(episodes, show) : null;
  if (list) {
    place.append(list.filters, element("div", { class: "browse" }, list.box, detail), help);
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
      const full = document.querySelector(".stage.full");
      if (event.key === "Escape" && full) full.stage.large();
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) {
        if (event.key === "Escape") event.target.blur();
        return;
      }
      const known = KEYS.find(([keys]) => keys.includes(event.key));
      if (!known) return;
      event.preventDefault();
      known[3]();
      const { top, bottom } = place.getBoundingClientRect();
      if (event.key !== "?" && (top > innerHeight * 0.8 || bottom < 80)) place.scrollIntoView();
    });
    const follow = () => {
      const episode = byKey.get(decodeURIComponent(location.hash.slice(1)));
      if (episode) {
        list.select(episode, false);
        place.scrollIntoView();
      }
      return episode;
    };
    addEventListener("hashchange", follow);
    // To begin with, one that looked and was right where a sibling was not: it shows most.
    const telling = (e) => e.right && e.looked.length > 0 && siblingsOf(e).some((one) => !one.right);
    if (!follow()) list.select(episodes.find(telling) ?? episodes.find((e) => e.looked.length > 0) ?? list.first(), false);
  }
}
