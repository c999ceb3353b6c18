// A picture with boxes on it that can be looked at closely: zoom by buttons, keys, double click, pinch or Ctrl and wheel; pan by dragging. Boxes are in the
// picture's own coordinates, so they cannot drift from it.

/**
 * A figure. `picture` is {id, width, height} or {missing, path}; `boxes` are {box: [x1, y1, x2, y2], kind, label, number?}, where the kind is a class
 * of the style sheet: region, target, said, sibling.
 */
function stage(picture, boxes, caption, label) {
  if (picture.missing !== undefined) {
    return element(
      "div", { class: "missing" },
      element("b", {}, "picture not shown"), picture.path ? element("code", {}, picture.path) : "", element("span", {}, picture.missing),
    );
  }
  const { width, height } = picture;
  const canvas = drawing(
    "svg",
    { class: "picture", viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img", "aria-label": `${label}. Keys: plus, minus, 0, arrows` },
    drawing("image", { width, height, preserveAspectRatio: "none", href: pictureUri(picture.id) }),
  );
  const flags = [];
  for (const { box, kind, label: name, number } of boxes) {
    const [x1, y1, x2, y2] = box;
    const place = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    canvas.append(drawing("rect", { class: kind === "sibling" ? "hush" : "halo", ...place }));
    canvas.append(drawing("rect", { class: kind, ...place }, drawing("title", {}, name)));
    if (number) {
      const back = drawing("rect", { class: "flag" });
      const text = drawing("text", { class: "flag" }, String(number));
      flags.push({ back, text, x: x1, y: y1 });
      canvas.append(back, text);
    }
  }

  // What part of the picture is seen.
  let seen = { x: 0, y: 0, width };
  const show = () => {
    const tall = (seen.width * height) / width;
    seen.x = Math.min(Math.max(0, seen.x), width - seen.width);
    seen.y = Math.min(Math.max(0, seen.y), height - tall);
    canvas.setAttribute("viewBox", `${seen.x} ${seen.y} ${seen.width} ${tall}`);
    canvas.classList.toggle("zoomed", seen.width < width);
    // Flags keep their size on the screen.
    const side = 0.045 * Math.max(seen.width, tall * 0.8);
    for (const { back, text, x, y } of flags) {
      const above = y >= side ? y - side : y;
      fill(back, { x, y: above, width: side, height: side });
      fill(text, { x: x + side / 2, y: above + side * 0.76, "font-size": side * 0.76 });
    }
  };
  const zoom = (factor, at = [0.5, 0.5]) => {
    const wide = Math.min(width, Math.max(width / 40, seen.width / factor));
    seen.x += (seen.width - wide) * at[0];
    seen.y += ((seen.width - wide) * at[1] * height) / width;
    seen.width = wide;
    show();
  };
  const whole = () => {
    seen = { x: 0, y: 0, width };
    show();
  };
  const shareAt = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const move = (right, down) => {
    const box = canvas.getBoundingClientRect();
    seen.x += (right * seen.width) / box.width;
    seen.y += (down * seen.width) / box.width;
    show();
  };

  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200), shareAt(event));
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(event.shiftKey ? 0.5 : 2, shareAt(event)));
  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    if (canvas.classList.contains("zoomed") || fingers.size > 1) canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = (one) => Math.hypot(one[0] - other[0], one[1] - other[1]);
      zoom(apart(now) / Math.max(1, apart(before)), shareAt({ clientX: (now[0] + other[0]) / 2, clientY: (now[1] + other[1]) / 2 }));
    } else if (canvas.classList.contains("zoomed")) {
      move(before[0] - now[0], before[1] - now[1]);
    }
    fingers.set(event.pointerId, now);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("keydown", (event) => {
    const far = canvas.getBoundingClientRect().width / 8;
    const arrows = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] };
    if (event.key in arrows && canvas.classList.contains("zoomed")) move(...arrows[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const figure = element("figure", { class: "stage" });
  const large = () => {
    const on = figure.classList.toggle("full");
    document.documentElement.classList.toggle("covered", on);
    canvas.focus({ preventScroll: true });
  };
  figure.stage = { zoom, whole, large };
  const button = (text, name, act) => element("button", { type: "button", title: name, "aria-label": name, click: act }, text);
  figure.append(
    element(
      "div", { class: "pane", style: `aspect-ratio: ${width} / ${height}; --ratio: ${width / height}` }, canvas,
      element("div", { class: "tools" }, button("+", "closer", () => zoom(1.6)), button("−", "farther", () => zoom(1 / 1.6)), button("○", "the whole picture", whole), button("⤢", "large, and back", large)),
    ),
    element("figcaption", {}, ...caption),
  );
  show();
  return figure;
}

/** A small picture of an episode: the picture it looked at, and its boxes. */
function mini(episode) {
  const image = episode.looked[0]?.[0] ?? episode.targets[0]?.[0] ?? 0;
  const picture = episode.pictures[image];
  if (!picture || picture.missing !== undefined) return element("span", { class: "mini empty" }, "no picture");
  const { width, height } = picture;
  const canvas = drawing("svg", { class: "picture mini", viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  canvas.append(drawing("image", { width, height, preserveAspectRatio: "none", href: pictureUri(picture.id) }));
  const draw = ([x1, y1, x2, y2], kind) => {
    const place = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    canvas.append(drawing("rect", { class: "halo", ...place }), drawing("rect", { class: kind, ...place }));
  };
  episode.targets.forEach(([on, box]) => on === image && box && draw(box, "target"));
  episode.looked.forEach(([on, box]) => on === image && draw(box, "region"));
  return canvas;
}
