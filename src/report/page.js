// The page's data, and the few things that every subject of this script needs: elements, numbers, pictures, the small box beside the pointer.
// Words of a model reach the page through text nodes and attributes alone, never as markup.
"use strict";
const report = JSON.parse(document.getElementById("data").textContent);

/** An element with attributes and children; a string among the children becomes text, a function among the attributes a listener. */
function element(name, attributes = {}, ...children) {
  const node = fill(document.createElement(name), attributes);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

/** The same for what is drawn. The namespace is taken from the page's own pictures: there is no address in this page. */
const SVG = document.querySelector("svg").namespaceURI;
function drawing(name, attributes = {}, ...children) {
  const node = fill(document.createElementNS(SVG, name), attributes);
  node.append(...children);
  return node;
}

function fill(node, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  return node;
}

/** A number for reading: short, without trailing zeros. */
function short(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "—";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  return String(Number(size >= 100 ? value.toFixed(1) : value.toPrecision(digits)));
}

function signed(value) {
  return (value > 0 ? "+" : "") + short(value);
}

/** A picture as a data URI. It lies in the page as text, and becomes a picture when it is first shown. */
function pictureUri(id) {
  const holder = document.getElementById(id);
  return holder.getAttribute("href") ?? holder.textContent;
}

// The box beside the pointer.
const tip = element("div", { class: "tip", hidden: true, "aria-hidden": "true" });
document.body.append(tip);

/** Shows pairs of name and value near a place on the screen. */
function showTip(rows, x, y) {
  tip.replaceChildren(
    ...rows.map(([name, value, kind]) => element("div", { class: kind ?? "" }, element("span", {}, name), element("b", {}, value))),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 14), innerWidth - width - 8);
  const top = y + height + 24 > innerHeight ? y - height - 14 : y + 18;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(8, top))}px)`;
}

function hideTip() {
  tip.hidden = true;
}
addEventListener("scroll", hideTip, { passive: true });
