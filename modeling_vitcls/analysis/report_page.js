// Data and functions shared by the scripts of the page: report data, number formats, elements and the tooltip.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

const formatPercent = (fraction) => (fraction === null ? "unknown" : `${formatNumber(100 * fraction)}%`);
const formatNumber = (value) => (value === null ? "unknown" : String(Number(value.toPrecision(3))));

// Create an HTML or SVG element with the given attributes and children (elements or text).
function element(tag, attributes = {}, ...children) {
  const namespace = "svg g path line rect text circle".split(" ").includes(tag) ? "http://www.w3.org/2000/svg" : null;
  const created = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children);
  return created;
}

// Tooltip that shows lines (text or elements) next to a point in the window.
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
