// Maps over images. A map is drawn when it becomes visible, shows values at the pointer, and is enlarged on click.
//
// The id of a map is { image, kind, layer, token }, where kind is "attention", "rollout" (one map per token), "attribution"
// (`token` is the index of the prediction), "colors" (principal components of the patches), "similarity" (of the patches
// to the selected patch) or "image" (without a map).
"use strict";

const SIDE = 200; // length of the longer side of a map in the grid, in pixels
const IMAGE_BRIGHTNESS = 0.75; // these four constants have the same values as in maps.py
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
  colors: image.colors.map(decodeBytes), // colors of all patches, and of the foreground patches
  features: image.features && new Int8Array(decodeBytes(image.features).buffer),
  selected: Math.floor(image.grid[0] / 2) * image.grid[1] + Math.floor(image.grid[1] / 2),
  loaded: loadImage(image.url),
  grays: new Map(),
}));

const control = (id) => document.getElementById(id);
const getHead = () => Number(control("head")?.value ?? 0);
const getScaleMode = () => control("brightness")?.value ?? "each";
const drawsBlocks = () => control("blocks").checked;
const getForeground = () => Number(control("foreground").checked);

async function loadImage(url) {
  const bitmap = new Image();
  bitmap.src = url;
  await bitmap.decode();
  return bitmap;
}

// Selection of maps ---------------------------------------------------------------------------------------------------

function getMapIndex(mapId) {
  if (mapId.kind !== "attention") return mapId.token;
  const { num_heads } = images[mapId.image]; // images without per-head maps show the mean map
  return (mapId.layer * (1 + num_heads) + (num_heads ? getHead() : 0)) * data.tokens.length + mapId.token;
}

// Return the values of a map, the largest value of the map, and the sum over patches.
function getMap(mapId) {
  const image = images[mapId.image];
  const count = image.grid[0] * image.grid[1];
  if (mapId.kind === "similarity") return getSimilarity(image, mapId.layer, count);
  const { values, largest, sum } = image[mapId.kind];
  const number = getMapIndex(mapId);
  const unit = largest[number];
  const bytes = values.subarray(number * count, (number + 1) * count);
  return { values: Float32Array.from(bytes, (byte) => SQUARES[byte] * unit), largest: unit, sum: sum[number] };
}

// Return the cosine similarity of all patches to the selected patch, from compressed features (patch_features.py).
function getSimilarity(image, layer, count) {
  const { scale, offset } = data.components[layer];
  const length = scale.length;
  const start = layer * count * length;
  const rows = image.features.subarray(start, start + count * length);
  const multiply = (patch, otherPatch) => {
    let sum = offset;
    for (let component = 0; component < length; component++)
      sum += scale[component] ** 2 * rows[patch * length + component] * rows[otherPatch * length + component];
    return sum;
  };
  const selectedSquare = multiply(image.selected, image.selected);
  const values = Float32Array.from(
    { length: count },
    (_, patch) => multiply(patch, image.selected) / Math.sqrt(Math.max(selectedSquare * multiply(patch, patch), 1e-12)),
  );
  return { values, largest: 1, sum: 0 };
}

// Return the value that is drawn in the brightest color: for one map, for all layers of a token, or for all maps of an
// image. As in maps.py, uniform attention is not bright everywhere.
function getMaxValue(mapId) {
  if (mapId.kind === "similarity") return 1;
  const image = images[mapId.image];
  const getScale = (other) => {
    const number = getMapIndex(other);
    const { largest, sum } = image[other.kind];
    return Math.max(largest[number], (data.min_scale * sum[number]) / (image.grid[0] * image.grid[1]));
  };
  if (mapId.kind !== "attention" || getScaleMode() === "each") return getScale(mapId);
  const tokens = getScaleMode() === "token" ? [mapId.token] : data.tokens.map((_, token) => token);
  let strongest = 0;
  for (let layer = 0; layer < data.layers; layer++)
    for (const token of tokens) strongest = Math.max(strongest, getScale({ ...mapId, layer, token }));
  return strongest;
}

// Return whether the output of a map's layer is unused: no later layer and no head uses the token (attention) or the
// patches (colors, similarity).
function isUnread({ kind, layer, token }) {
  if (kind === "attention") return layer >= data.tokens[token].read;
  return (kind === "colors" || kind === "similarity") && layer >= data.patches_read;
}

function getTitle(mapId) {
  const image = images[mapId.image];
  if (mapId.kind === "image") return image.name;
  if (mapId.kind === "colors") return `patch features, layer ${mapId.layer + 1}, principal components`;
  if (mapId.kind === "similarity") return `similarity to a patch, layer ${mapId.layer + 1}`;
  if (mapId.kind === "attribution") return `attribution of ${image.attributed[mapId.token]}`;
  const name = data.tokens[mapId.token].name;
  if (mapId.kind === "rollout") return `${name}, rollout through all layers`;
  const heads = getHead() && image.num_heads ? data.heads[getHead() - 1] : "mean of the heads";
  return `${name}, layer ${mapId.layer + 1}, ${heads}`;
}

// Painting -------------------------------------------------------------------------------------------------------

function getSize(image, longerSide) {
  const scale = longerSide / Math.max(image.width, image.height);
  return [Math.max(Math.round(image.width * scale), 1), Math.max(Math.round(image.height * scale), 1)];
}

function drawBitmap(canvas, image, bitmap, longerSide) {
  [canvas.width, canvas.height] = getSize(image, longerSide);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = canvas.width < 4 * bitmap.naturalWidth; // pixels of tiny images stay visible
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return context;
}

// Scale an image so that the longer side has `longerSide` pixels, and return the gray values (0 to 255) of the image.
function getGray(image, bitmap, longerSide) {
  if (!image.grays.has(longerSide)) {
    const context = drawBitmap(document.createElement("canvas"), image, bitmap, longerSide);
    const { width, height } = context.canvas;
    const colors = context.getImageData(0, 0, width, height).data;
    const gray = Float32Array.from({ length: width * height }, (_, pixel) => {
      const first = 4 * pixel;
      return 0.299 * colors[first] + 0.587 * colors[first + 1] + 0.114 * colors[first + 2];
    });
    image.grays.set(longerSide, { gray, width, height });
  }
  return image.grays.get(longerSide);
}

// For each pixel along one image axis, return the indices of the two nearest patches, and the weight of the second
// patch. Outside the visible region, the first index is -1.
function getNeighbors(length, start, stop, patches, blocks) {
  const first = new Int16Array(length).fill(-1);
  const second = new Int16Array(length);
  const weight = new Float32Array(length);
  for (let pixel = 0; pixel < length; pixel++) {
    const fraction = ((pixel + 0.5) / length - start) / (stop - start);
    if (fraction < 0 || fraction > 1) continue;
    const position = Math.min(Math.max(fraction * patches - (blocks ? 0 : 0.5), 0), patches - 1);
    first[pixel] = Math.floor(position);
    second[pixel] = Math.min(first[pixel] + 1, patches - 1);
    weight[pixel] = blocks ? 0 : position - first[pixel];
  }
  return { first, second, weight };
}

async function paint(canvas, mapId, longerSide) {
  const image = images[mapId.image];
  const bitmap = await image.loaded;
  if (mapId.kind === "image") {
    drawBitmap(canvas, image, bitmap, longerSide);
    return;
  }
  const { gray, width, height } = getGray(image, bitmap, longerSide);
  const [left, top, right, bottom] = image.visible_region;
  const [rows, columns] = image.grid;
  const blocks = drawsBlocks() || mapId.kind === "colors";
  const x = getNeighbors(width, left, right, columns, blocks);
  const y = getNeighbors(height, top, bottom, rows, blocks);
  const drawPixel = mapId.kind === "colors" ? getPatchPainter(image, mapId, x, y) : getValuePainter(mapId, columns, x, y);
  const painted = new ImageData(width, height);
  const period = Math.max(Math.round(Math.max(height, width) / 40), 2);
  for (let row = 0, pixel = 0; row < height; row++) {
    for (let column = 0; column < width; column++, pixel++) {
      const target = 4 * pixel;
      painted.data[target + 3] = 255;
      if (y.first[row] < 0 || x.first[column] < 0) {
        const line = (row + column) % period < Math.max(period / 8, 1) ? 0.12 * 255 : 0;
        painted.data.fill(gray[pixel] * HIDDEN_BRIGHTNESS + line, target, target + 3);
      } else drawPixel(painted.data, target, row, column, gray[pixel]);
    }
  }
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.putImageData(painted, 0, 0);
  if (mapId.kind === "colors" || mapId.kind === "similarity") outlineSelected(context, image);
}

// Return a function that draws one pixel in the color of its value, over the gray image.
function getValuePainter(mapId, columns, x, y) {
  const { values } = getMap(mapId);
  const strongest = getMaxValue(mapId) || 1;
  const mix = (one, other, weight) => one * (1 - weight) + other * weight;
  return (pixels, target, row, column, gray) => {
    const mixRow = (patchRow) => {
      const start = patchRow * columns;
      return mix(values[start + x.first[column]], values[start + x.second[column]], x.weight[column]);
    };
    const mixed = mix(mixRow(y.first[row]), mixRow(y.second[row]), y.weight[row]) / strongest;
    const value = Math.min(Math.max(mixed, 0), 1);
    const color = 3 * Math.min(Math.floor(value * 256), 255);
    const opacity = MIN_OPACITY + OPACITY_RANGE * value;
    for (let channel = 0; channel < 3; channel++)
      pixels[target + channel] = gray * IMAGE_BRIGHTNESS * (1 - opacity) + COLORS[color + channel] * opacity;
  };
}

// Return a function that draws one pixel in the color of its patch, or in dark gray if the patch is background.
function getPatchPainter(image, mapId, x, y) {
  const [rows, columns] = image.grid;
  const colors = image.colors[getForeground()];
  const start = mapId.layer * rows * columns;
  return (pixels, target, row, column, gray) => {
    const first = 4 * (start + y.first[row] * columns + x.first[column]);
    for (let channel = 0; channel < 3; channel++)
      pixels[target + channel] = colors[first + 3] ? colors[first + channel] : gray * HIDDEN_BRIGHTNESS;
  };
}

function outlineSelected(context, image) {
  if (!image.features) return;
  const [left, top, right, bottom] = image.visible_region;
  const [rows, columns] = image.grid;
  const { width, height } = context.canvas;
  const patch = { width: ((right - left) * width) / columns, height: ((bottom - top) * height) / rows };
  const x = left * width + (image.selected % columns) * patch.width;
  const y = top * height + Math.floor(image.selected / columns) * patch.height;
  for (const [color, line] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = color;
    context.lineWidth = line * Math.max(width / 400, 1);
    context.strokeRect(x, y, patch.width, patch.height);
  }
}

// Values at the pointer ------------------------------------------------------------------------------------------

// Return the patch at a pointer position over a canvas; null outside the visible region.
function findPatch(canvas, image, event) {
  const box = canvas.getBoundingClientRect();
  const [left, top, right, bottom] = image.visible_region;
  const across = ((event.clientX - box.left) / box.width - left) / (right - left);
  const down = ((event.clientY - box.top) / box.height - top) / (bottom - top);
  if (across < 0 || across >= 1 || down < 0 || down >= 1) return null;
  return { row: Math.floor(down * image.grid[0]), column: Math.floor(across * image.grid[1]) };
}

function describeValue(mapId, patch) {
  if (!patch) return "outside the region that the model receives";
  const columns = images[mapId.image].grid[1];
  const where = `row ${patch.row + 1}, column ${patch.column + 1}`;
  if (mapId.kind === "colors") return where;
  const { values, largest } = getMap(mapId);
  const value = values[patch.row * columns + patch.column];
  if (mapId.kind === "similarity") return `${where}: cosine ${formatNumber(value)}`;
  if (mapId.kind === "attribution") return `${where}: ${formatNumber(value / (largest || 1))} of the maximum`;
  return `${where}: ${formatPercent(value)} of ${mapId.kind === "rollout" ? "the rollout" : "the attention"}`;
}

function getSummary(mapId) {
  const unread = isUnread(mapId) ? " This output of the layer is not used." : "";
  if (mapId.kind === "image") return "";
  if (mapId.kind === "attribution") return "Point at the map to see its values relative to the maximum.";
  if (mapId.kind === "colors" || mapId.kind === "similarity") {
    const { features, selected, grid } = images[mapId.image];
    if (!features) return `Similar colors mean similar features.${unread}`;
    const where = `row ${Math.floor(selected / grid[1]) + 1}, column ${(selected % grid[1]) + 1}`;
    const meaning = mapId.kind === "colors" ? "Similar colors mean similar features" : "Cosine similarity";
    return `${meaning}; selected patch: ${where}. Click or tap to select another patch.${unread}`;
  }
  const { largest, sum } = getMap(mapId);
  return `Maximum per patch ${formatPercent(largest)}, all patches ${formatPercent(sum)}; uniform attention would be ${formatPercent(
    1 / (data.tokens.length + images[mapId.image].grid[0] * images[mapId.image].grid[1]),
  )} per token.${unread}`;
}

// Grids ----------------------------------------------------------------------------------------------------------

const cells = new Map(); // canvas -> id of its map
const inView = new Set();
const watcher = new IntersectionObserver(watch, { rootMargin: "200px" });

function watch(entries) {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) {
      inView.add(target);
      repaint(target);
    } else inView.delete(target);
  }
}

const getState = (mapId) =>
  [getHead(), getScaleMode(), drawsBlocks() ? "blocks" : "smooth", getForeground(), images[mapId.image].selected].join(" ");

// Redraw a canvas of a grid if its state has changed.
function repaint(canvas) {
  const mapId = cells.get(canvas);
  const state = getState(mapId);
  if (canvas.dataset.state === state) return;
  canvas.dataset.state = state;
  paint(canvas, mapId, SIDE);
  const share = canvas.parentElement.querySelector(".share");
  if (!share) return;
  const { largest, sum } = getMap(mapId);
  const short = (value) => formatPercent(Number(value.toPrecision(2)));
  share.replaceChildren(short(sum), element("span", {}, `, peak ${short(largest)}${isUnread(mapId) ? ", not used" : ""}`));
}

const selectsPatch = ({ kind, image }) => (kind === "colors" || kind === "similarity") && images[image].features;

function selectPatch(mapId, canvas, event) {
  const image = images[mapId.image];
  const patch = findPatch(canvas, image, event);
  if (patch) image.selected = patch.row * image.grid[1] + patch.column;
  inView.forEach(repaint);
}

function buildCell(mapId, label, row, column) {
  const canvas = element("canvas", { "aria-hidden": "true" });
  const button = element("button", { type: "button", class: "cell", "aria-label": `${label}: enlarge`, tabindex: -1 });
  Object.assign(button.dataset, { row, column });
  const image = images[mapId.image];
  canvas.style.aspectRatio = image.width / image.height;
  button.append(canvas);
  if (mapId.kind === "attention" || mapId.kind === "rollout") button.append(element("span", { class: "share" }));
  else if (isUnread(mapId)) button.append(element("span", { class: "note" }, "not used"));
  cells.set(canvas, mapId);
  watcher.observe(canvas);
  button.addEventListener("click", (event) => {
    if (event.detail && selectsPatch(mapId)) selectPatch(mapId, canvas, event); // `detail` is 0 for keyboard clicks
    else enlarge(mapId, button);
  });
  if (selectsPatch(mapId)) {
    button.classList.add("selects");
    button.addEventListener("dblclick", () => enlarge(mapId, button));
  }
  if (mapId.kind !== "image")
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch") return; // a tap enlarges the map or selects a patch
      const text = describeValue(mapId, findPatch(canvas, image, event));
      tip.show(event.clientX, event.clientY, [getTitle(mapId), text]);
    });
  canvas.addEventListener("pointerleave", () => tip.hide());
  return button;
}

const addCaption = (button, text) => element("div", { class: "captioned" }, button, element("span", {}, text));

// Return the indices of the shown layers: every n-th layer, counted back from the last layer.
function getShownLayers() {
  const every = Number(control("every")?.value ?? 1);
  return Array.from({ length: data.layers }, (_, layer) => layer).filter((layer) => (data.layers - 1 - layer) % every === 0);
}

// Fill a box with the image, the attribution of each prediction, and a grid of maps (rows: patches and tokens, columns:
// rollout and layers).
function fillBox(box) {
  for (const canvas of box.querySelectorAll(".cell canvas")) {
    cells.delete(canvas);
    inView.delete(canvas);
    watcher.unobserve(canvas);
  }
  const index = Number(box.dataset.maps);
  const image = images[index];
  const layers = getShownLayers();
  box.style.setProperty("--ratio", Math.min(image.width / image.height, 1.6));
  box.style.setProperty("--columns", layers.length + 1);
  const overview = element("div", { class: "overview" });
  overview.append(addCaption(buildCell({ image: index, kind: "image" }, image.name, 0, 0), "image"));
  image.attributed.forEach((name, token) => {
    const mapId = { image: index, kind: "attribution", token };
    overview.append(addCaption(buildCell(mapId, getTitle(mapId), 0, token + 1), `attribution of ${name}`));
  });
  box.replaceChildren(overview, buildGrid(index, layers));
  if (data.heads.length > 1 && !image.num_heads)
    box.append(element("p", { class: "quiet" }, "Maps of individual heads are omitted for this image to limit the size of the page."));
  box.querySelector(".cell").tabIndex = 0;
}

function buildGrid(index, layers) {
  const grid = element("div", { class: "grid" });
  const addRow = (title, row, first, getMapId, label) => {
    grid.append(title, first);
    for (const [column, layer] of layers.entries())
      grid.append(buildCell(getMapId(layer), `${label}, layer ${layer + 1}`, row, column + 1));
  };
  grid.append(element("span", { class: "corner" }), element("span", { class: "layer" }, data.tokens.length ? "rollout" : ""));
  for (const layer of layers) grid.append(element("span", { class: "layer" }, `layer ${layer + 1}`));
  const kinds = { colors: "patches (PCA)", similarity: "similarity to a patch" };
  Object.entries(kinds).forEach(([kind, name], row) => {
    if (kind === "similarity" && !images[index].features) return;
    const title = element("span", { class: "token g-patches" }, name);
    addRow(title, row + 1, element("span", {}), (layer) => ({ image: index, kind, layer }), name);
  });
  data.tokens.forEach(({ name, group }, token) => {
    const title = element("span", { class: `token g-${group}` }, name);
    const rollout = buildCell({ image: index, kind: "rollout", token }, `${name}, rollout`, token + 3, 0);
    addRow(title, token + 3, rollout, (layer) => ({ image: index, kind: "attention", layer, token }), name);
  });
  return grid;
}

// Move the focus between maps with arrow keys; each image is one tab stop.
function moveFocus(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const box = event.currentTarget;
  const from = document.activeElement;
  if (!step || !from.matches(".cell")) return;
  const buttons = [...box.querySelectorAll(".cell")]; // row by row
  const rows = [...new Set(buttons.map((button) => button.dataset.row))];
  const row = rows[rows.indexOf(from.dataset.row) + step[0]];
  const distance = (button) => Math.abs(button.dataset.column - from.dataset.column - step[1]);
  const [to] = buttons
    .filter((button) => button.dataset.row === row)
    .sort((one, other) => distance(one) - distance(other));
  if (!to || to === from) return;
  event.preventDefault();
  focusOn(buttons, to);
}

function focusOn(buttons, button) {
  for (const other of buttons) other.tabIndex = other === button ? 0 : -1;
  button.focus();
}

// Enlarged map ---------------------------------------------------------------------------------------------------

const dialog = document.getElementById("enlarged");
const enlargedMap = document.getElementById("enlarged-map");
const enlargedValue = document.getElementById("enlarged-value");
const BY_LAYER = ["attention", "rollout", "colors", "similarity"];
let enlarged = null; // id of the enlarged map
let openedBy = null; // the button that opened the dialog

function enlarge(mapId, button) {
  tip.hide();
  openedBy = button;
  if (!dialog.open) dialog.showModal();
  showEnlarged(mapId);
}

function showEnlarged(mapId) {
  enlarged = mapId;
  const image = images[mapId.image];
  const title = mapId.kind === "image" ? image.name : `${getTitle(mapId)} · ${image.name}`;
  document.getElementById("enlarged-title").textContent = title;
  enlargedMap.setAttribute("aria-label", title);
  enlargedValue.textContent = getSummary(mapId);
  const ratio = image.width / image.height;
  enlargedMap.style.aspectRatio = ratio;
  enlargedMap.style.width = `min(100%, ${ratio} * 66vh)`;
  dialog.querySelector(".walk").hidden = !BY_LAYER.includes(mapId.kind);
  paint(enlargedMap, mapId, Math.min(900, Math.max(innerWidth, innerHeight) * devicePixelRatio));
}

// Select another map with arrow keys or buttons. Left and right change the layer (the rollout is before the first layer);
// up and down change the token.
function walk(direction) {
  if (!BY_LAYER.includes(enlarged.kind)) return;
  const clamp = (value, least, most) => Math.min(Math.max(value, least), most);
  const [across, down] = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1] }[direction];
  const isToken = enlarged.kind === "attention" || enlarged.kind === "rollout";
  const layer = clamp((enlarged.kind === "rollout" ? -1 : enlarged.layer) + across, isToken ? -1 : 0, data.layers - 1);
  if (!isToken) return showEnlarged({ ...enlarged, layer });
  const token = clamp(enlarged.token + down, 0, data.tokens.length - 1);
  showEnlarged({ image: enlarged.image, kind: layer < 0 ? "rollout" : "attention", layer, token });
}

function findButton(mapId) {
  for (const [canvas, other] of cells)
    if (["image", "kind", "token"].every((key) => other[key] === mapId[key]))
      if (mapId.kind === "rollout" || other.layer === mapId.layer) return canvas.parentElement;
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
  if (event.target === dialog) dialog.close(); // the click was outside the dialog
});
dialog.addEventListener("close", () => {
  const button = findButton(enlarged);
  focusOn([...button.closest(".maps").querySelectorAll(".cell")], button);
});
for (const kind of ["pointermove", "pointerdown"])
  enlargedMap.addEventListener(kind, (event) => {
    if (enlarged.kind === "image") return;
    if (kind === "pointerdown" && selectsPatch(enlarged)) {
      selectPatch(enlarged, enlargedMap, event);
      showEnlarged(enlarged);
      return;
    }
    enlargedValue.textContent = describeValue(enlarged, findPatch(enlargedMap, images[enlarged.image], event));
  });
enlargedMap.addEventListener("pointerleave", (event) => {
  if (event.pointerType !== "touch") enlargedValue.textContent = getSummary(enlarged); // the value stays visible after a tap
});

// Initialization ---------------------------------------------------------------------------------------------------

const boxes = [...document.querySelectorAll("[data-maps]")];
for (const box of boxes) {
  fillBox(box);
  box.addEventListener("keydown", moveFocus);
}
for (const canvas of document.querySelectorAll("[data-thumbnail]"))
  paint(canvas, { image: Number(canvas.dataset.thumbnail), kind: "image" }, SIDE);

if (control("head")) {
  data.heads.forEach((name, index) => control("head").append(element("option", { value: index + 1 }, name)));
  control("head-choice").hidden = data.heads.length < 2;
  const scale = control("scale").getContext("2d");
  for (let step = 0; step < 256; step++) {
    scale.fillStyle = `rgb(${COLORS.subarray(3 * step, 3 * step + 3).join(" ")})`;
    scale.fillRect(step, 0, 1, 1);
  }
}
for (const name of ["head", "brightness", "blocks", "foreground"])
  control(name)?.addEventListener("change", () => inView.forEach(repaint));
control("every").addEventListener("change", () => boxes.forEach(fillBox));
control("size").addEventListener("input", () => {
  control("images").style.setProperty("--size", control("size").value);
});
control("filter")?.addEventListener("change", () => {
  const wanted = control("filter").value;
  for (const details of document.querySelectorAll(".image"))
    details.hidden = wanted !== "all" && details.dataset.kind !== wanted;
});
addEventListener("beforeprint", () => {
  for (const canvas of cells.keys()) if (canvas.closest("details").open) repaint(canvas);
});
