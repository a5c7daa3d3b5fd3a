// Maps over images. A map is drawn when it becomes visible, shows values at the pointer, and is enlarged on click.
// A map is { image, kind, layer, token }, where kind is "image", "attention", "attribution" (`token` is the
// index of the prediction) or "colors" (principal components of the patches).
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const SIDE = 160; // length of the longer side of a map, in pixels
const IMAGE_BRIGHTNESS = 0.75; // these four constants have the same values as in maps.py
const HIDDEN_BRIGHTNESS = 0.35;
const MIN_OPACITY = 0.25;
const OPACITY_RANGE = 0.6;
const COLORS = Uint8Array.from(data.colors.match(/../g), (byte) => parseInt(byte, 16));

const control = (id) => document.getElementById(id);
const getHead = () => Number(control("head").value);
const formatPercent = (fraction) => `${Number((100 * fraction).toPrecision(2))}%`;
const decodeBytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const unpack = (packed) =>
  packed && {
    values: decodeBytes(packed.values),
    largest: new Float32Array(decodeBytes(packed.largest).buffer),
    sum: new Float32Array(decodeBytes(packed.sum).buffer),
  };
const images = data.images.map((image) => ({
  ...image,
  maps: { attention: unpack(image.attention), attribution: unpack(image.attribution) },
  colors: decodeBytes(image.patch_colors),
  loaded: load(image.url),
}));

async function load(url) {
  const bitmap = new Image();
  bitmap.src = url;
  await bitmap.decode();
  return bitmap;
}

function element(tag, attributes, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children);
  return created;
}

// Return the values of a map, the value in the brightest color, and the sum over patches. As in maps.py, uniform
// attention is not bright everywhere.
function getMap({ image, kind, layer, token }) {
  const { maps, grid, num_heads } = images[image];
  const head = num_heads ? getHead() : 0; // images without per-head maps show the mean map
  const number = kind === "attention" ? (layer * (1 + num_heads) + head) * data.tokens.length + token : token;
  const { values, largest, sum } = maps[kind];
  const count = grid[0] * grid[1];
  const bytes = values.subarray(number * count, (number + 1) * count);
  return {
    values: Float32Array.from(bytes, (byte) => (byte / 255) ** 2 * largest[number]),
    strongest: Math.max(largest[number], (data.min_scale * sum[number]) / count) || 1,
    sum: sum[number],
  };
}

function getTitle({ image, kind, layer, token }) {
  if (kind === "image") return images[image].name;
  if (kind === "colors") return `patch features, layer ${layer + 1}`;
  if (kind === "attribution") return `attribution of ${images[image].attributed[token]}`;
  const { name } = data.tokens[token];
  return `${name}, layer ${layer + 1}, ${getHead() ? data.heads[getHead() - 1] : "mean of all heads"}`;
}

const isUnused = ({ kind, layer, token }) =>
  (kind === "attention" && layer >= data.tokens[token].used) || (kind === "colors" && layer >= data.patch_layers);

// Return the position of a pixel (0 to 1) in patches along one axis; NaN outside the visible region.
function locate(position, start, stop, patches) {
  const fraction = (position - start) / (stop - start);
  return fraction < 0 || fraction > 1 ? NaN : fraction * patches;
}

async function paint(canvas, map, longerSide) {
  const image = images[map.image];
  const bitmap = await image.loaded;
  const scale = longerSide / Math.max(image.width, image.height);
  canvas.width = Math.max(Math.round(image.width * scale), 1);
  canvas.height = Math.max(Math.round(image.height * scale), 1);
  const { width, height } = canvas;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = width < 4 * bitmap.naturalWidth; // pixels of tiny images stay visible
  context.drawImage(bitmap, 0, 0, width, height);
  if (map.kind === "image") return;
  const [left, top, right, bottom] = image.visible_region;
  const [rows, columns] = image.grid;
  const values = map.kind === "colors" ? null : getMap(map);
  const painted = context.getImageData(0, 0, width, height);
  const pixels = painted.data;
  const clamp = (value, most) => Math.min(Math.max(value, 0), most);
  for (let row = 0, target = 0; row < height; row++) {
    const y = locate((row + 0.5) / height, top, bottom, rows);
    for (let column = 0; column < width; column++, target += 4) {
      const x = locate((column + 0.5) / width, left, right, columns);
      const gray = 0.299 * pixels[target] + 0.587 * pixels[target + 1] + 0.114 * pixels[target + 2];
      if (Number.isNaN(x + y)) {
        pixels.fill(gray * HIDDEN_BRIGHTNESS + ((row + column) % 6 ? 0 : 30), target, target + 3);
        continue;
      }
      if (!values) {
        const patch = clamp(Math.floor(y), rows - 1) * columns + clamp(Math.floor(x), columns - 1);
        const first = 3 * (map.layer * rows * columns + patch);
        for (let channel = 0; channel < 3; channel++) pixels[target + channel] = image.colors[first + channel];
        continue;
      }
      const [v, u] = [clamp(y - 0.5, rows - 1), clamp(x - 0.5, columns - 1)]; // bilinear between patch centers
      const [i, j] = [Math.floor(v), Math.floor(u)];
      const mixRow = (patchRow) => {
        const start = patchRow * columns;
        return values.values[start + j] * (1 - u + j) + values.values[start + Math.min(j + 1, columns - 1)] * (u - j);
      };
      const value = clamp((mixRow(i) * (1 - v + i) + mixRow(Math.min(i + 1, rows - 1)) * (v - i)) / values.strongest, 1);
      const color = 3 * Math.min(Math.floor(value * 256), 255);
      const opacity = MIN_OPACITY + OPACITY_RANGE * value;
      for (let channel = 0; channel < 3; channel++)
        pixels[target + channel] = gray * IMAGE_BRIGHTNESS * (1 - opacity) + COLORS[color + channel] * opacity;
    }
  }
  context.putImageData(painted, 0, 0);
}

// Show the value of the patch at the pointer.
function showValue(canvas, map, event) {
  const image = images[map.image];
  const box = canvas.getBoundingClientRect();
  const [left, top, right, bottom] = image.visible_region;
  const x = locate((event.clientX - box.left) / box.width, left, right, image.grid[1]);
  const y = locate((event.clientY - box.top) / box.height, top, bottom, image.grid[0]);
  let text = "outside the region that the model receives";
  if (!Number.isNaN(x + y)) {
    const [row, column] = [Math.min(Math.floor(y), image.grid[0] - 1), Math.min(Math.floor(x), image.grid[1] - 1)];
    text = `row ${row + 1}, column ${column + 1}`;
    if (image.maps[map.kind]) {
      const { values, strongest } = getMap(map);
      const value = values[row * image.grid[1] + column];
      text += `: ${formatPercent(map.kind === "attribution" ? value / strongest : value)}`;
    }
  }
  control("value").textContent = `${getTitle(map)}; ${text}`;
}

const cells = new Map(); // canvas -> map
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting) paint(target, cells.get(target), SIDE);
});

function buildCell(map, caption = "") {
  const canvas = element("canvas", {});
  canvas.style.aspectRatio = images[map.image].width / images[map.image].height;
  const button = element("button", { type: "button", class: "cell", "aria-label": `enlarge ${getTitle(map)}` }, canvas);
  if (isUnused(map)) button.classList.add("unused");
  if (caption) button.append(element("span", {}, caption));
  button.addEventListener("click", () => {
    control("enlarged-title").textContent = `${getTitle(map)} · ${images[map.image].name}`;
    control("enlarged").showModal();
    paint(control("enlarged-map"), map, 720);
  });
  canvas.addEventListener("pointermove", (event) => showValue(canvas, map, event));
  cells.set(canvas, map);
  watcher.observe(canvas);
  return button;
}

// Layers from the last to the first, so that the last layers are visible without scrolling.
const LAYERS = Array.from({ length: data.layers }, (_, index) => data.layers - 1 - index);
const buildLayerNames = () => LAYERS.map((layer) => element("span", {}, `layer ${layer + 1}`));

// Fill the strip of the first screen: the attention of the first token (if any) and the patch colors in each layer.
function fillStrip(box) {
  const image = Number(box.dataset.strip);
  const kinds = data.tokens.length ? ["attention", "colors"] : ["colors"];
  box.style.setProperty("--columns", data.layers);
  const rows = kinds.flatMap((kind) => LAYERS.map((layer) => buildCell({ image, kind, layer, token: 0 })));
  box.replaceChildren(...buildLayerNames(), ...rows);
}

// Fill a box with a grid of maps. Rows: patches and tokens; columns: the image, then layers.
function fillBox(box) {
  const image = Number(box.dataset.maps);
  box.style.setProperty("--columns", data.layers + 1);
  const first = [element("span", {}), element("span", {}, ""), ...buildLayerNames()];
  const patches = [
    element("span", { class: "g-patches" }, "patches"),
    buildCell({ image, kind: "image" }, "image"),
    ...LAYERS.map((layer) => buildCell({ image, kind: "colors", layer })),
  ];
  const tokens = data.tokens.flatMap(({ name, group }, token) => [
    element("span", { class: `g-${group}` }, name),
    element("span", {}),
    ...LAYERS.map((layer) => {
      const map = { image, kind: "attention", layer, token };
      return buildCell(map, formatPercent(getMap(map).sum));
    }),
  ]);
  const attributions = images[image].attributed.flatMap((name, token) => [
    element("span", {}, `attribution of ${name}`),
    buildCell({ image, kind: "attribution", token }),
    ...LAYERS.map(() => element("span", {})),
  ]);
  box.replaceChildren(...first, ...patches, ...tokens, ...attributions);
}

const boxes = [...document.querySelectorAll("[data-maps]")];
data.heads.forEach((name, index) => control("head").append(element("option", { value: index + 1 }, name)));
control("head-choice").hidden = data.heads.length < 2 || !data.tokens.length;
control("head").addEventListener("change", () => boxes.forEach(fillBox));
boxes.forEach(fillBox);
document.querySelectorAll("[data-strip]").forEach(fillStrip);
