// Shared by the scripts of the page: data, number formats, elements, and the tooltip.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

const formatPercent = (share) => (share === null ? "unknown" : `${formatNumber(100 * share)}%`);
const formatNumber = (value) => (value === null ? "unknown" : String(Number(value.toPrecision(3))));

// Create an HTML or SVG element with attributes and children (elements or text).
function element(tag, attributes = {}, ...children) {
  const namespace = "svg g path line rect text circle".split(" ").includes(tag) ? "http://www.w3.org/2000/svg" : null;
  const created = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children);
  return created;
}

// Tooltip with lines of text or elements, next to a point of the window.
const tip = {
  box: document.getElementById("tip"),
  show(x, y, lines) {
    this.box.replaceChildren(...lines.map((line) => element("div", {}, line)));
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
    const top = y + 14 + height > innerHeight ? y - 14 - height : y + 14;
    this.box.style.left = `${Math.max(left, 4)}px`;
    this.box.style.top = `${Math.max(top, 4)}px`;
  },
  hide() {
    this.box.hidden = true;
  },
};
addEventListener("scroll", () => tip.hide(), { passive: true });
