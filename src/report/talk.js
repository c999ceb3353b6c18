// The conversation, token by token: who wrote each token, how likely it was, how the update saw it. Colours are tints behind the words, so that
// the words stay as readable as they were; the numbers are in the box beside the pointer and, for every reader, in a table.

/** Ways to colour: what is read of a token's numbers, which tint, how strong (0 to 1), and what the ends of the scale mean. */
const COLOURINGS = {
  author: { name: "who wrote it", read: () => 1, tint: () => "var(--c0)", strength: () => 0.45, ends: ["tinted: the policy, these tokens are trained", "plain: the task"] },
  logprob: { name: "log-prob", read: (t) => t.logprob, tint: () => "var(--c1)", strength: (v) => -v / 4, ends: ["0, certain", "−4 and less, a surprise"] },
  entropy: { name: "entropy", read: (t) => t.entropy, tint: () => "var(--c3)", strength: (v) => v / 2, ends: ["0, no choice", "2 nats and more"] },
  ratio: {
    name: "ratio", read: (t) => t.ratio, tint: (v) => (v < 1 ? "var(--c0)" : "var(--c1)"), strength: (v) => Math.abs(Math.log(v)) / 0.25,
    ends: ["1, as it was sampled", "blue: less likely at the update, orange: more"],
  },
  advantage: {
    name: "advantage", read: (t) => t.advantage, tint: (v) => (v < 0 ? "var(--bad)" : "var(--good)"), strength: (v) => Math.abs(v) / 2,
    ends: ["0, teaches nothing", "green: encouraged, red: discouraged"],
  },
};

/** A policy's turn as tokens with their numbers. */
function tokensOf(turn, episode) {
  const number = (list, at) => (list && list[at] !== null ? list[at] : undefined);
  return turn.pieces.map((text, at) => ({
    text, at,
    logprob: number(turn.logprobs, at),
    ratio: number(turn.ratios, at),
    entropy: number(turn.entropies, at),
    advantage: number(turn.advantages, at) ?? episode.advantage ?? undefined,
  }));
}

/** The whole conversation; `paint(way)` colours its tokens. */
function conversation(episode) {
  const all = [];
  const turns = episode.turns.map((turn) => {
    const kind = ["assistant", "policy"].includes(turn.role) ? "assistant" : turn.role === "system" ? "system" : "user";
    const tokens = turn.pieces ? tokensOf(turn, episode) : null;
    const words = element("p", {});
    if (tokens) {
      for (const token of tokens) {
        const special = /^<\|(\w+)\|>$/.exec(token.text.trim());
        token.span = element("span", { class: special ? "tok token" : "tok" }, special ? special[1] : token.text);
        token.span.token = token;
        words.append(token.span);
      }
      all.push(...tokens);
    } else {
      words.append(...marked(turn.text ?? ""));
    }
    const count = turn.tokens ? `${turn.tokens} tokens${kind === "assistant" ? "" : ", not trained"}` : "";
    return element(
      "div", { class: `turn ${kind}` },
      element("div", { class: "role" }, element("b", {}, turn.role), element("span", { class: "quiet" }, count)),
      words,
      ...(turn.read ?? []).map((text) => element("code", { class: "action" }, text)),
    );
  });
  const node = element("div", { class: "talk" }, ...turns);
  node.addEventListener("pointerover", (event) => {
    const token = event.target.token;
    if (token) showTip(numbersOf(token), event.clientX, event.clientY);
  });
  node.addEventListener("pointerout", hideTip);
  if (all.length > 0) node.append(tokenTable(all));
  node.paint = (way) => {
    const { read, tint, strength } = COLOURINGS[way];
    for (const token of all) {
      const value = read(token);
      const part = value === undefined ? 0 : Math.min(1, Math.max(0, strength(value)));
      token.span.style.setProperty("--tint", value === undefined ? "transparent" : tint(value));
      token.span.style.setProperty("--part", `${Math.round(part * 62)}%`);
    }
  };
  node.knows = (way) => all.some((token) => COLOURINGS[way].read(token) !== undefined);
  return node;
}

/** Words in which special tokens are small marks, and a row of the same token is one mark with its count. */
function marked(text) {
  const parts = [];
  let last = null;
  for (const part of text.split(/(<\|\w+\|>)/)) {
    const special = /^<\|(\w+)\|>$/.exec(part);
    if (special && last && last.name === special[1]) {
      last.node.textContent = `${last.name} ×${++last.count}`;
    } else if (special) {
      last = { name: special[1], count: 1, node: element("span", { class: "token" }, special[1]) };
      parts.push(last.node);
    } else if (part !== "") {
      last = null;
      parts.push(part);
    }
  }
  return parts;
}

function numbersOf(token) {
  const rows = [["token", JSON.stringify(token.text)], ["place in the turn", String(token.at + 1)]];
  if (token.logprob !== undefined) rows.push(["log-prob", short(token.logprob)], ["probability", `${(Math.exp(token.logprob) * 100).toFixed(1)} %`]);
  if (token.entropy !== undefined) rows.push(["entropy", `${short(token.entropy)} nats`]);
  if (token.ratio !== undefined) rows.push(["ratio", short(token.ratio, 4)]);
  if (token.advantage !== undefined) rows.push(["advantage", signed(token.advantage)]);
  return rows;
}

/** The same numbers without a pointer. */
function tokenTable(tokens) {
  const details = element("details", { class: "numbers" }, element("summary", {}, "the numbers as a table"));
  details.addEventListener("toggle", () => {
    if (details.querySelector("table")) return;
    const cells = (kind, values) => element("tr", {}, ...values.map((value) => element(kind, kind === "th" ? { scope: "col" } : {}, value)));
    const rows = tokens.map((t) => cells("td", [JSON.stringify(t.text), short(t.logprob), short(t.entropy), short(t.ratio, 4), short(t.advantage)]));
    const head = element("thead", {}, cells("th", ["token", "log-prob", "entropy", "ratio", "advantage"]));
    details.append(element("div", { class: "scroll" }, element("table", { class: "tokens" }, head, element("tbody", {}, ...rows))));
  });
  return details;
}

/** The choice of a colouring, with its scale. */
function colouring(talk, episode, way, chosen) {
  // A group whose answers are all as good has no gradient, and the update leaves it out.
  const missing = episode.advantage === 0 ? "its group is as good throughout, no update read it" : "not recorded";
  const scale = element("span", { class: "scale quiet" });
  const select = element(
    "select", { id: "colouring", "aria-label": "colour the tokens by" },
    ...Object.entries(COLOURINGS).map(([key, { name }]) =>
      element("option", { value: key, disabled: !talk.knows(key) }, talk.knows(key) ? name : `${name} (${missing})`)),
  );
  const apply = (key) => {
    const known = talk.knows(key) ? key : "author";
    select.value = known;
    talk.paint(known);
    scale.replaceChildren(element("i", { class: `scale-${known}` }), COLOURINGS[known].ends.join(" · "));
  };
  select.addEventListener("change", () => {
    apply(select.value);
    chosen(select.value);
  });
  apply(way);
  const node = element("div", { class: "colouring" }, element("label", { for: "colouring" }, "tokens by "), select, scale);
  node.next = () => {
    const known = Object.keys(COLOURINGS).filter((key) => talk.knows(key));
    const key = known[(known.indexOf(select.value) + 1) % known.length] ?? "author";
    apply(key);
    chosen(key);
  };
  return node;
}
