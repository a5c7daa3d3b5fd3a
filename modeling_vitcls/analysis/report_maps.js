// Maps over images: drawn when they become visible, with values at the pointer, and enlarged on click.
//
// A spot identifies a map: { image, kind, layer, token }, where kind is "attention", "rollout" (one per token),
// "attribution" (`token` is the index of the prediction) or "image" (without a map).
"use strict";

const SIDE = 200; // pixels of the longer side of a map in the grid
const IMAGE_BRIGHTNESS = 0.75; // these four constants are the same as in maps.py
const HIDDEN_BRIGHTNESS = 0.35;
const MIN_OPACITY = 0.25;
const OPACITY_RANGE = 0.6;
const SQUARES = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);
const COLORS = Uint8Array.from(data.colors.match(/../g), (byte) => parseInt(byte, 16));

const decodeBytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const unpackMaps = (packed) =>
  packed && {
    values: decodeBytes(packed.values),
    largest: new Float32Array(decodeBytes(packed.largest).buffer),
    sum: new Float32Array(decodeBytes(packed.sum).buffer),
  };

const images = data.images.map((image) => ({
  ...image,
  attention: unpackMaps(image.attention),
  rollout: unpackMaps(image.rollout),
  attribution: unpackMaps(image.attribution),
  loaded: loadImage(image.url),
  grays: new Map(),
}));

const headChoice = document.getElementById("head");
const brightnessChoice = document.getElementById("brightness");
const head = () => Number(headChoice?.value ?? 0);

async function loadImage(url) {
  const bitmap = new Image();
  bitmap.src = url;
  await bitmap.decode();
  return bitmap;
}

// Selection of maps ---------------------------------------------------------------------------------------------------

function getMapIndex(spot) {
  if (spot.kind !== "attention") return spot.token;
  return (spot.layer * (1 + data.heads.length) + head()) * data.tokens.length + spot.token;
}

// The bytes of a map, its largest value, and the sum over patches.
function getMap(spot) {
  const image = images[spot.image];
  const [rows, columns] = image.grid;
  const { values, largest, sum } = image[spot.kind];
  const number = getMapIndex(spot);
  const start = number * rows * columns;
  return { bytes: values.subarray(start, start + rows * columns), largest: largest[number], sum: sum[number] };
}

// The value of the brightest color, for one map or for all layers of an image. As in maps.py, uniform attention is not
// bright everywhere.
function getMaxValue(spot) {
  const [rows, columns] = images[spot.image].grid;
  const getScale = ({ largest, sum }) => Math.max(largest, (data.min_scale * sum) / (rows * columns));
  if (spot.kind !== "attention" || brightnessChoice.value === "each") return getScale(getMap(spot));
  let strongest = 0;
  for (let layer = 0; layer < data.layers; layer++)
    for (let token = 0; token < data.tokens.length; token++)
      strongest = Math.max(strongest, getScale(getMap({ ...spot, layer, token })));
  return strongest;
}

// Whether nothing reads the output of the token in the layer of a spot.
const isUnread = ({ kind, layer, token }) => kind === "attention" && layer >= data.tokens[token].read;

function getTitle(spot) {
  const image = images[spot.image];
  if (spot.kind === "image") return image.name;
  if (spot.kind === "attribution") return `attribution of ${image.attributed[spot.token]}`;
  const name = data.tokens[spot.token].name;
  if (spot.kind === "rollout") return `${name}, rollout through all layers`;
  return `${name}, layer ${spot.layer + 1}, ${head() ? data.heads[head() - 1] : "mean of the heads"}`;
}

// Painting -------------------------------------------------------------------------------------------------------

function getSize(image, longer) {
  const scale = longer / Math.max(image.width, image.height);
  return [Math.max(Math.round(image.width * scale), 1), Math.max(Math.round(image.height * scale), 1)];
}

function drawBitmap(canvas, image, bitmap, longer) {
  [canvas.width, canvas.height] = getSize(image, longer);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = canvas.width < 4 * bitmap.naturalWidth; // pixels of tiny images stay visible
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return context;
}

// The gray values of an image at a size, 0 to 255.
function getGray(image, bitmap, longer) {
  if (!image.grays.has(longer)) {
    const context = drawBitmap(document.createElement("canvas"), image, bitmap, longer);
    const { width, height } = context.canvas;
    const colors = context.getImageData(0, 0, width, height).data;
    const gray = Float32Array.from({ length: width * height }, (_, pixel) => {
      const first = 4 * pixel;
      return 0.299 * colors[first] + 0.587 * colors[first + 1] + 0.114 * colors[first + 2];
    });
    image.grays.set(longer, { gray, width, height });
  }
  return image.grays.get(longer);
}

// For each pixel along a side: the two neighboring patches, and the weight of the second; -1 outside.
function between(length, start, stop, patches) {
  const first = new Int16Array(length).fill(-1);
  const second = new Int16Array(length);
  const weight = new Float32Array(length);
  for (let pixel = 0; pixel < length; pixel++) {
    const part = ((pixel + 0.5) / length - start) / (stop - start);
    if (part < 0 || part > 1) continue;
    const place = Math.min(Math.max(part * patches - 0.5, 0), patches - 1);
    first[pixel] = Math.floor(place);
    second[pixel] = Math.min(first[pixel] + 1, patches - 1);
    weight[pixel] = place - first[pixel];
  }
  return { first, second, weight };
}

async function paint(canvas, spot, longer) {
  const image = images[spot.image];
  const bitmap = await image.loaded;
  if (spot.kind === "image") {
    drawBitmap(canvas, image, bitmap, longer);
    return;
  }
  const { gray, width, height } = getGray(image, bitmap, longer);
  const [left, top, right, bottom] = image.visible_region;
  const [rows, columns] = image.grid;
  const x = between(width, left, right, columns);
  const y = between(height, top, bottom, rows);
  const { bytes, largest } = getMap(spot);
  const strongest = getMaxValue(spot) || 1;
  const strength = (row, column) => SQUARES[bytes[row * columns + column]];
  const mixed = (row, column) => {
    const upper =
      strength(y.first[row], x.first[column]) * (1 - x.weight[column]) +
      strength(y.first[row], x.second[column]) * x.weight[column];
    const lower =
      strength(y.second[row], x.first[column]) * (1 - x.weight[column]) +
      strength(y.second[row], x.second[column]) * x.weight[column];
    return (upper * (1 - y.weight[row]) + lower * y.weight[row]) * (largest / strongest);
  };
  const painted = new ImageData(width, height);
  const period = Math.max(Math.round(Math.max(height, width) / 40), 2);
  for (let row = 0, pixel = 0; row < height; row++) {
    for (let column = 0; column < width; column++, pixel++) {
      const target = 4 * pixel;
      painted.data[target + 3] = 255;
      if (y.first[row] < 0 || x.first[column] < 0) {
        const line = (row + column) % period < Math.max(period / 8, 1) ? 0.12 * 255 : 0;
        painted.data.fill(gray[pixel] * HIDDEN_BRIGHTNESS + line, target, target + 3);
        continue;
      }
      const value = Math.min(mixed(row, column), 1);
      const color = 3 * Math.min(Math.floor(value * 256), 255);
      const opacity = MIN_OPACITY + OPACITY_RANGE * value;
      for (let channel = 0; channel < 3; channel++)
        painted.data[target + channel] =
          gray[pixel] * IMAGE_BRIGHTNESS * (1 - opacity) + COLORS[color + channel] * opacity;
    }
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(painted, 0, 0);
}

// Values at the pointer --- ---------------------------------------------------------------------------------------

// The patch at a pointer position over a canvas; null outside the visible region.
function findPatch(canvas, image, event) {
  const box = canvas.getBoundingClientRect();
  const [left, top, right, bottom] = image.visible_region;
  const across = ((event.clientX - box.left) / box.width - left) / (right - left);
  const down = ((event.clientY - box.top) / box.height - top) / (bottom - top);
  if (across < 0 || across >= 1 || down < 0 || down >= 1) return null;
  return { row: Math.floor(down * image.grid[0]), column: Math.floor(across * image.grid[1]) };
}

function describeValue(spot, patch) {
  if (!patch) return "outside the visible region of the model";
  const columns = images[spot.image].grid[1];
  const { bytes, largest } = getMap(spot);
  const share = SQUARES[bytes[patch.row * columns + patch.column]];
  const where = `row ${patch.row + 1}, column ${patch.column + 1}`;
  if (spot.kind === "attribution") return `${where}: ${plain(share)} of the maximum`;
  return `${where}: ${percent(share * largest)} of ${spot.kind === "rollout" ? "its rollout" : "its attention"}`;
}

function getSummary(spot) {
  if (spot.kind === "image") return "";
  const { largest, sum } = getMap(spot);
  const unread = isUnread(spot) ? " Nothing reads the output of this token in this layer." : "";
  if (spot.kind === "attribution") return "Point at the map for its values, relative to the maximum.";
  return `Maximum per patch ${percent(largest)}, all patches ${percent(sum)}; uniform attention would be ${percent(
    1 / (data.tokens.length + images[spot.image].grid[0] * images[spot.image].grid[1]),
  )} per token.${unread}`;
}

// The grids ------------------------------------------------------------------------------------------------------

const cells = new Map(); // canvas -> its spot
const inView = new Set();
const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        inView.add(target);
        repaint(target);
      } else inView.delete(target);
    }
  },
  { rootMargin: "200px" },
);

const getState = () => `${head()} ${brightnessChoice?.value}`;

// Redraw a canvas of a grid if its state has changed.
function repaint(canvas) {
  if (canvas.dataset.state === getState()) return;
  canvas.dataset.state = getState();
  const spot = cells.get(canvas);
  paint(canvas, spot, SIDE);
  const share = canvas.parentElement.querySelector(".share");
  if (share) share.textContent = percent(Number(getMap(spot).sum.toPrecision(2))) + (isUnread(spot) ? ", not read" : "");
}

function cell(spot, label) {
  const canvas = element("canvas", { "aria-hidden": "true" });
  const button = element("button", { type: "button", class: "cell", "aria-label": `${label}: enlarge`, tabindex: -1 });
  const image = images[spot.image];
  canvas.style.aspectRatio = `${image.width} / ${image.height}`;
  button.append(canvas);
  if (spot.kind === "attention" || spot.kind === "rollout") button.append(element("span", { class: "share" }));
  cells.set(canvas, spot);
  watcher.observe(canvas);
  button.addEventListener("click", () => enlarge(spot, button));
  if (spot.kind !== "image")
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch") return; // a tap enlarges
      const text = describeValue(spot, findPatch(canvas, image, event));
      tip.show(event.clientX, event.clientY, [getTitle(spot), text]);
    });
  canvas.addEventListener("pointerleave", () => tip.hide());
  return button;
}

function captioned(button, text) {
  return element("div", { class: "captioned" }, button, element("span", {}, text));
}

// The image, the attributions of its predictions, and the grid of tokens and layers.
function fill(box) {
  const place = Number(box.dataset.maps);
  const image = images[place];
  box.style.setProperty("--ratio", Math.min(image.width / image.height, 1.6));
  box.style.setProperty("--columns", data.layers + 1);
  const overview = element("div", { class: "overview" });
  overview.append(captioned(cell({ image: place, kind: "image" }, image.name), "image"));
  image.attributed.forEach((name, token) => {
    const spot = { image: place, kind: "attribution", token };
    overview.append(captioned(cell(spot, getTitle(spot)), `attribution of ${name}`));
  });
  box.append(overview);
  if (data.tokens.length) box.append(buildGrid(place));
  const buttons = [...box.querySelectorAll(".cell")];
  buttons[0].tabIndex = 0;
  box.addEventListener("keydown", (event) => walkFocus(event, box, buttons));
}

function buildGrid(place) {
  const grid = element("div", { class: "grid" });
  grid.append(element("span", { class: "corner" }));
  for (let layer = 1; layer <= data.layers; layer++) grid.append(element("span", { class: "layer" }, `layer ${layer}`));
  grid.append(element("span", { class: "layer" }, "rollout"));
  data.tokens.forEach(({ name, group }, token) => {
    grid.append(element("span", { class: `token g-${group}` }, name));
    for (let layer = 0; layer < data.layers; layer++)
      grid.append(cell({ image: place, kind: "attention", layer, token }, `${name}, layer ${layer + 1}`));
    grid.append(cell({ image: place, kind: "rollout", token }, `${name}, rollout`));
  });
  return grid;
}

// Arrow keys move between maps; each image is one tab stop.
function walkFocus(event, box, buttons) {
  const inOverview = box.querySelectorAll(".overview .cell").length;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -(data.layers + 1), ArrowDown: data.layers + 1 };
  const from = buttons.indexOf(document.activeElement);
  if (!(event.key in steps) || from < 0) return;
  let to = from + steps[event.key];
  if (event.key === "ArrowDown" && from < inOverview) to = inOverview;
  if (event.key === "ArrowUp" && from >= inOverview && to < inOverview) to = 0;
  if (!buttons[to]) return;
  event.preventDefault();
  focusOn(buttons, buttons[to]);
}

function focusOn(buttons, button) {
  for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
  button.focus();
}

// Enlarged -------------------------------------------------------------------------------------------------------

const dialog = document.getElementById("enlarged");
const enlargedMap = document.getElementById("enlarged-map");
const enlargedValue = document.getElementById("enlarged-value");
let enlarged = null; // the enlarged spot
let openedBy = null; // the button that opened the dialog

function enlarge(spot, button) {
  tip.hide();
  openedBy = button;
  if (!dialog.open) dialog.showModal();
  showEnlarged(spot);
}

function showEnlarged(spot) {
  enlarged = spot;
  const image = images[spot.image];
  const title = spot.kind === "image" ? image.name : `${getTitle(spot)} · ${image.name}`;
  document.getElementById("enlarged-title").textContent = title;
  enlargedMap.setAttribute("aria-label", title);
  enlargedValue.textContent = getSummary(spot);
  const ratio = image.width / image.height;
  enlargedMap.style.aspectRatio = ratio;
  enlargedMap.style.width = `min(100%, ${ratio} * 66vh)`;
  dialog.querySelector(".walk").hidden = !["attention", "rollout"].includes(spot.kind);
  paint(enlargedMap, spot, Math.min(900, Math.max(innerWidth, innerHeight) * devicePixelRatio));
}

// Arrow keys and buttons: layers to the left and right, rollout after the last; tokens up and down.
function walk(direction) {
  if (!["attention", "rollout"].includes(enlarged.kind)) return;
  const clamp = (value, most) => Math.min(Math.max(value, 0), most);
  const layer = enlarged.kind === "rollout" ? data.layers : enlarged.layer;
  const [across, down] = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] }[direction];
  const to = clamp(layer + across, data.layers);
  const token = clamp(enlarged.token + down, data.tokens.length - 1);
  const kind = to === data.layers ? "rollout" : "attention";
  showEnlarged({ image: enlarged.image, kind, layer: to, token });
}

function findButton(spot) {
  for (const [canvas, other] of cells)
    if (["image", "kind", "token"].every((key) => other[key] === spot[key]))
      if (spot.kind !== "attention" || other.layer === spot.layer) return canvas.parentElement;
  return openedBy;
}

dialog.addEventListener("keydown", (event) => {
  const direction = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" }[event.key];
  if (!direction) return;
  event.preventDefault();
  walk(direction);
});
for (const button of dialog.querySelectorAll("[data-walk]"))
  button.addEventListener("click", () => walk(button.dataset.walk));
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // click outside the dialog
});
dialog.addEventListener("close", () => {
  const button = findButton(enlarged);
  focusOn([...button.closest(".maps").querySelectorAll(".cell")], button);
});
for (const kind of ["pointermove", "pointerdown"])
  enlargedMap.addEventListener(kind, (event) => {
    if (enlarged.kind === "image") return;
    enlargedValue.textContent = describeValue(enlarged, findPatch(enlargedMap, images[enlarged.image], event));
  });
enlargedMap.addEventListener("pointerleave", (event) => {
  if (event.pointerType !== "touch") enlargedValue.textContent = getSummary(enlarged); // keep the value after a tap
});

// At the start ---------------------------------------------------------------------------------------------------

for (const box of document.querySelectorAll("[data-maps]")) fill(box);
for (const canvas of document.querySelectorAll("[data-thumbnail]"))
  paint(canvas, { image: Number(canvas.dataset.thumbnail), kind: "image" }, SIDE);

if (headChoice) {
  data.heads.forEach((name, place) => headChoice.append(element("option", { value: place + 1 }, name)));
  document.getElementById("head-choice").hidden = data.heads.length < 2;
  const scale = document.getElementById("scale").getContext("2d");
  for (let step = 0; step < 256; step++) {
    scale.fillStyle = `rgb(${COLORS.subarray(3 * step, 3 * step + 3).join(" ")})`;
    scale.fillRect(step, 0, 1, 1);
  }
  for (const choice of [headChoice, brightnessChoice])
    choice.addEventListener("change", () => inView.forEach(repaint));
}
addEventListener("beforeprint", () => {
  for (const canvas of cells.keys()) if (canvas.closest("details").open) repaint(canvas);
});
