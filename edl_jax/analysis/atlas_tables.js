"use strict";

// Elements, tips, tables and the switch of colours. Text becomes
// text nodes, never markup.

const find = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Returns a function of the indices into an array that `packed` wrote.
function unpack({ bits, shape, scale, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const read = bits === 8 ? (place) => view.getUint8(place)
    : (place) => view.getUint16(2 * place, true);
  const [a, b = 0, c = 0, d = 0] = shape.map((_, axis) =>
    shape.slice(axis + 1).reduce((size, n) => size * n, 1));
  return (i, j = 0, k = 0, l = 0) =>
    scale * read(a * i + b * j + c * k + d * l);
}

const range = (count) => [...Array(count).keys()];
const everyPair = (count) =>
  range(count).flatMap((i) => range(count).map((j) => [i, j]));
const percent = (x) => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`;
const exact = (x) => `${(100 * x).toPrecision(3)}%`;
// Neighbouring numbers get hues far apart: the golden angle.
const hue = (index) => (index * 137.508) % 360;

// The tip, and tables of cells that the arrow keys walk through.

const tip = find("tip");
const described = new WeakMap();
let shown = null;

function showTip(target) {
  shown = target;
  const text = target && described.get(target);
  tip.hidden = !text;
  if (!text) return;
  const said = text();
  if (tip.textContent !== said) tip.textContent = said;
  const box = target.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(box.left, innerWidth - own.width - 8);
  const below = box.bottom + 8;
  const fits = below + own.height < innerHeight;
  tip.style.left = `${Math.max(left, 8)}px`;
  tip.style.top = `${fits ? below : Math.max(box.top - own.height - 8, 8)}px`;
}

for (const name of ["mouseover", "focusin"]) {
  document.addEventListener(name, (event) =>
    showTip(event.target.closest?.("td, span, .point") ?? null));
}
document.addEventListener("focusout", () => showTip(null));
// A focused cell may scroll into view after it has got the focus.
document.addEventListener("scroll", () => showTip(shown), true);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") showTip(null);
});

// Moves the focus inside rows of elements; one of them can be tabbed to.
function walk(container, rows) {
  if (rows[0]?.[0]) rows[0][0].tabIndex = 0;
  container.addEventListener("keydown", (event) => {
    const row = rows.findIndex((cells) => cells.includes(event.target));
    if (row < 0) return;
    const column = rows[row].indexOf(event.target);
    const moved = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      Home: [row, 0],
      End: [row, rows[row].length - 1],
    }[event.key];
    if (!moved) return;
    event.preventDefault();
    const next = rows[moved[0]]?.[moved[1]];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// Colour by the square root, which keeps small shares visible.
const level = (x, top) => Math.round(100 * Math.sqrt(Math.min(x / top, 1)));
// The style has the colour of the cell's text.
const heat = (v) => `heat${v > 62 ? " high" : v > 48 ? " middle" : ""}`;

// A table of coloured cells. `rows` and `columns` are header cells' content;
// `cell(r, c)` returns {value, text, tip, mark}, or null for an empty cell.
function grid({ label, corner, rows, columns, cell, top, upright }) {
  const dense = columns.length > 16;
  const head = element("tr", {},
    element("th", { scope: "col" }, element("span", {}, corner)));
  for (const content of columns) {
    const turned = (dense || upright) && "upright";
    head.append(element("th", { scope: "col", class: turned }, content));
  }
  const body = element("tbody");
  // Cloned, as pages have tens of thousands of cells.
  const blank = element("td", { tabindex: -1 });
  const cells = rows.map((content, r) => {
    const made = columns.map((_, c) => {
      const { value, text, tip, mark } = cell(r, c) ?? {};
      const shown = blank.cloneNode();
      shown.textContent = text ?? "–";
      if (text === undefined) return shown;
      const v = level(value, top);
      shown.className = mark ? `${heat(v)} ${mark}` : heat(v);
      shown.style.setProperty("--v", v);
      described.set(shown, tip);
      return shown;
    });
    body.append(element("tr", {},
      element("th", { scope: "row" }, content), ...made));
    return made;
  });
  const table = element("table",
    { role: "grid", "aria-label": label, class: dense ? "grid dense" : "grid" },
    element("thead", {}, head), body);
  walk(table, cells);
  return element("div", { class: "scroll" }, table);
}

function legend(top, format, above = "") {
  const made = element("div", { class: "legend", "aria-hidden": "true" });
  for (const v of [0, 25, 50, 75, 100]) {
    const value = format(top * (v / 100) ** 2) + (v === 100 ? above : "");
    made.append(
      element("span", { class: heat(v), "--v": v }, value));
  }
  return made;
}

function plainTable(caption, headings, rows) {
  const kind = (x) => (typeof x === "number" ? "number" : false);
  const cells = (row, tag) => row.map((x, i) =>
    element(i ? tag : "th", {
      class: kind(rows[0]?.[i]),
      scope: tag === "th" ? "col" : i ? false : "row",
    }, x instanceof Node ? x : String(x)));
  return element("div", { class: "scroll" },
    element("table", { class: "plain", "aria-label": caption },
      element("thead", {}, element("tr", {}, ...cells(headings, "th"))),
      element("tbody", {},
        ...rows.map((row) => element("tr", {}, ...cells(row, "td"))))));
}

// The style follows the system until the switch is used.
function startTheme() {
  const theme = find("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => document.documentElement.dataset.theme;
  const show = () => theme.setAttribute("aria-pressed",
    String(chosen() ? chosen() === "dark" : system.matches));
  show();
  system.addEventListener("change", show);
  theme.addEventListener("click", () => {
    const dark = theme.getAttribute("aria-pressed") !== "true";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    show();
  });
}
