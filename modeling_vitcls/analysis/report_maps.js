// Maps over pictures: painted when they come into view, with values under the pointer, and enlarged.
//
// A spot says which map: { picture, kind, layer, token }, where kind is "attention", "rollout" (one per token),
// "attribution" (`token` is the number of the answer) or "picture" (nothing over it).
"use strict";

const SIDE = 200; // pixels of the longer side of a map in the grid
const PICTURE_LIGHT = 0.75; // these four as in maps.py
const UNSEEN_LIGHT = 0.35;
const LEAST_OPACITY = 0.25;
const MORE_OPACITY = 0.6;
const SQUARES = Float32Array.from({ length: 256 }, (_, byte) => (byte / 255) ** 2);
const COLOURS = Uint8Array.from(data.colours.match(/../g), (byte) => parseInt(byte, 16));

const bytesOf = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const unpacked = (packed) =>
  packed && {
    values: bytesOf(packed.values),
    largest: new Float32Array(bytesOf(packed.largest).buffer),
    sum: new Float32Array(bytesOf(packed.sum).buffer),
  };

const pictures = data.pictures.map((picture) => ({
  ...picture,
  attention: unpacked(picture.attention),
  rollout: unpacked(picture.rollout),
  attribution: unpacked(picture.attribution),
  loaded: loadedImage(picture.image),
  greys: new Map(),
}));

const headChoice = document.getElementById("head");
const brightnessChoice = document.getElementById("brightness");
const head = () => Number(headChoice?.value ?? 0);

async function loadedImage(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

// Which map ------------------------------------------------------------------------------------------------------

function numberOf(spot) {
  if (spot.kind !== "attention") return spot.token;
  return (spot.layer * (1 + data.heads.length) + head()) * data.tokens.length + spot.token;
}

// The bytes of a map, its largest value, and the sum over patches.
function mapAt(spot) {
  const picture = pictures[spot.picture];
  const [rows, columns] = picture.grid;
  const { values, largest, sum } = picture[spot.kind];
  const number = numberOf(spot);
  const start = number * rows * columns;
  return { bytes: values.subarray(start, start + rows * columns), largest: largest[number], sum: sum[number] };
}

// The value of the brightest colour: of the map itself, or of all the picture's layers; as in maps.py, even attention
// does not glow everywhere.
function strongestFor(spot) {
  const [rows, columns] = pictures[spot.picture].grid;
  const ownOf = ({ largest, sum }) => Math.max(largest, (data.even * sum) / (rows * columns));
  if (spot.kind !== "attention" || brightnessChoice.value === "each") return ownOf(mapAt(spot));
  let strongest = 0;
  for (let layer = 0; layer < data.layers; layer++)
    for (let token = 0; token < data.tokens.length; token++)
      strongest = Math.max(strongest, ownOf(mapAt({ ...spot, layer, token })));
  return strongest;
}

function titleOf(spot) {
  const picture = pictures[spot.picture];
  if (spot.kind === "picture") return picture.name;
  if (spot.kind === "attribution") return `attribution of ${picture.attributed[spot.token]}`;
  const name = data.tokens[spot.token].name;
  if (spot.kind === "rollout") return `${name}, rollout through all layers`;
  return `${name}, layer ${spot.layer + 1}, ${head() ? data.heads[head() - 1] : "mean of the heads"}`;
}

// Painting -------------------------------------------------------------------------------------------------------

function sizeFor(picture, longer) {
  const scale = longer / Math.max(picture.width, picture.height);
  return [Math.max(Math.round(picture.width * scale), 1), Math.max(Math.round(picture.height * scale), 1)];
}

function drawPicture(canvas, picture, image, longer) {
  [canvas.width, canvas.height] = sizeFor(picture, longer);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = canvas.width < 4 * image.naturalWidth; // pixels of tiny pictures stay visible
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  return context;
}

// The picture's lightness at a size, 0 to 255.
function greyOf(picture, image, longer) {
  if (!picture.greys.has(longer)) {
    const context = drawPicture(document.createElement("canvas"), picture, image, longer);
    const { width, height } = context.canvas;
    const colours = context.getImageData(0, 0, width, height).data;
    const grey = Float32Array.from({ length: width * height }, (_, pixel) => {
      const first = 4 * pixel;
      return 0.299 * colours[first] + 0.587 * colours[first + 1] + 0.114 * colours[first + 2];
    });
    picture.greys.set(longer, { grey, width, height });
  }
  return picture.greys.get(longer);
}

// For each pixel of a side, the two patches whose centres it lies between, and how near to the second; -1 outside.
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
  const picture = pictures[spot.picture];
  const image = await picture.loaded;
  if (spot.kind === "picture") {
    drawPicture(canvas, picture, image, longer);
    return;
  }
  const { grey, width, height } = greyOf(picture, image, longer);
  const [left, top, right, bottom] = picture.seen;
  const [rows, columns] = picture.grid;
  const x = between(width, left, right, columns);
  const y = between(height, top, bottom, rows);
  const { bytes, largest } = mapAt(spot);
  const strongest = strongestFor(spot) || 1;
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
        painted.data.fill(grey[pixel] * UNSEEN_LIGHT + line, target, target + 3);
        continue;
      }
      const value = Math.min(mixed(row, column), 1);
      const colour = 3 * Math.min(Math.floor(value * 256), 255);
      const opacity = LEAST_OPACITY + MORE_OPACITY * value;
      for (let channel = 0; channel < 3; channel++)
        painted.data[target + channel] =
          grey[pixel] * PICTURE_LIGHT * (1 - opacity) + COLOURS[colour + channel] * opacity;
    }
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(painted, 0, 0);
}

// Values under the pointer ---------------------------------------------------------------------------------------

// The patch at a point of the window over a canvas; null outside of what the model sees.
function patchAt(canvas, picture, event) {
  const box = canvas.getBoundingClientRect();
  const [left, top, right, bottom] = picture.seen;
  const across = ((event.clientX - box.left) / box.width - left) / (right - left);
  const down = ((event.clientY - box.top) / box.height - top) / (bottom - top);
  if (across < 0 || across >= 1 || down < 0 || down >= 1) return null;
  return { row: Math.floor(down * picture.grid[0]), column: Math.floor(across * picture.grid[1]) };
}

function valueInWords(spot, patch) {
  if (!patch) return "the model does not see this part";
  const columns = pictures[spot.picture].grid[1];
  const { bytes, largest } = mapAt(spot);
  const share = SQUARES[bytes[patch.row * columns + patch.column]];
  const where = `row ${patch.row + 1}, column ${patch.column + 1}`;
  if (spot.kind === "attribution") return `${where}: ${plain(share)} of the strongest`;
  return `${where}: ${percent(share * largest)} of ${spot.kind === "rollout" ? "what reached it" : "its attention"}`;
}

function summaryOf(spot) {
  if (spot.kind === "picture") return "";
  const { largest, sum } = mapAt(spot);
  if (spot.kind === "attribution") return "Point at the map for its values, relative to the strongest.";
  return `To one patch at most ${percent(largest)}, to all patches ${percent(sum)}; alike would be ${percent(
    1 / (data.tokens.length + pictures[spot.picture].grid[0] * pictures[spot.picture].grid[1]),
  )} for each.`;
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

const stateOf = () => `${head()} ${brightnessChoice?.value}`;

// Paint a canvas of a grid, unless it is as it should be.
function repaint(canvas) {
  if (canvas.dataset.state === stateOf()) return;
  canvas.dataset.state = stateOf();
  const spot = cells.get(canvas);
  paint(canvas, spot, SIDE);
  const share = canvas.parentElement.querySelector(".share");
  if (share) share.textContent = percent(Number(mapAt(spot).sum.toPrecision(2)));
}

function cell(spot, label) {
  const canvas = element("canvas", { "aria-hidden": "true" });
  const button = element("button", { type: "button", class: "cell", "aria-label": `${label}: enlarge`, tabindex: -1 });
  const picture = pictures[spot.picture];
  canvas.style.aspectRatio = `${picture.width} / ${picture.height}`;
  button.append(canvas);
  if (spot.kind === "attention" || spot.kind === "rollout") button.append(element("span", { class: "share" }));
  cells.set(canvas, spot);
  watcher.observe(canvas);
  button.addEventListener("click", () => enlarge(spot, button));
  if (spot.kind !== "picture")
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch") return; // a tap enlarges
      const text = valueInWords(spot, patchAt(canvas, picture, event));
      tip.show(event.clientX, event.clientY, [titleOf(spot), text]);
    });
  canvas.addEventListener("pointerleave", () => tip.hide());
  return button;
}

function captioned(button, text) {
  return element("div", { class: "captioned" }, button, element("span", {}, text));
}

// The picture, what speaks for its answers, and the grid of tokens and layers.
function fill(box) {
  const place = Number(box.dataset.maps);
  const picture = pictures[place];
  box.style.setProperty("--ratio", Math.min(picture.width / picture.height, 1.6));
  box.style.setProperty("--columns", data.layers + 1);
  const overview = element("div", { class: "overview" });
  overview.append(captioned(cell({ picture: place, kind: "picture" }, picture.name), "the picture"));
  picture.attributed.forEach((name, token) => {
    const spot = { picture: place, kind: "attribution", token };
    overview.append(captioned(cell(spot, titleOf(spot)), `what speaks for ${name}`));
  });
  box.append(overview);
  if (data.tokens.length) box.append(gridOf(place));
  const buttons = [...box.querySelectorAll(".cell")];
  buttons[0].tabIndex = 0;
  box.addEventListener("keydown", (event) => walkFocus(event, box, buttons));
}

function gridOf(place) {
  const grid = element("div", { class: "grid" });
  grid.append(element("span", { class: "corner" }));
  for (let layer = 1; layer <= data.layers; layer++) grid.append(element("span", { class: "layer" }, `layer ${layer}`));
  grid.append(element("span", { class: "layer" }, "rollout"));
  data.tokens.forEach(({ name, group }, token) => {
    grid.append(element("span", { class: `token g-${group}` }, name));
    for (let layer = 0; layer < data.layers; layer++)
      grid.append(cell({ picture: place, kind: "attention", layer, token }, `${name}, layer ${layer + 1}`));
    grid.append(cell({ picture: place, kind: "rollout", token }, `${name}, rollout`));
  });
  return grid;
}

// Arrow keys from map to map: one stop of the tab key for each picture.
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
let enlarged = null; // the spot
let openedBy = null; // its button

function enlarge(spot, button) {
  tip.hide();
  openedBy = button;
  if (!dialog.open) dialog.showModal();
  showEnlarged(spot);
}

function showEnlarged(spot) {
  enlarged = spot;
  const picture = pictures[spot.picture];
  const title = spot.kind === "picture" ? picture.name : `${titleOf(spot)} · ${picture.name}`;
  document.getElementById("enlarged-title").textContent = title;
  enlargedMap.setAttribute("aria-label", title);
  enlargedValue.textContent = summaryOf(spot);
  const ratio = picture.width / picture.height;
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
  showEnlarged({ picture: enlarged.picture, kind, layer: to, token });
}

function buttonOf(spot) {
  for (const [canvas, other] of cells)
    if (["picture", "kind", "token"].every((key) => other[key] === spot[key]))
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
  if (event.target === dialog) dialog.close(); // beside it
});
dialog.addEventListener("close", () => {
  const button = buttonOf(enlarged);
  focusOn([...button.closest(".maps").querySelectorAll(".cell")], button);
});
for (const kind of ["pointermove", "pointerdown"])
  enlargedMap.addEventListener(kind, (event) => {
    if (enlarged.kind === "picture") return;
    enlargedValue.textContent = valueInWords(enlarged, patchAt(enlargedMap, pictures[enlarged.picture], event));
  });
enlargedMap.addEventListener("pointerleave", (event) => {
  if (event.pointerType !== "touch") enlargedValue.textContent = summaryOf(enlarged); // what was tapped stays
});

// At the start ---------------------------------------------------------------------------------------------------

for (const box of document.querySelectorAll("[data-maps]")) fill(box);
for (const canvas of document.querySelectorAll("[data-thumbnail]"))
  paint(canvas, { picture: Number(canvas.dataset.thumbnail), kind: "picture" }, SIDE);

if (headChoice) {
  data.heads.forEach((name, place) => headChoice.append(element("option", { value: place + 1 }, name)));
  document.getElementById("head-choice").hidden = data.heads.length < 2;
  const scale = document.getElementById("scale").getContext("2d");
  for (let step = 0; step < 256; step++) {
    scale.fillStyle = `rgb(${COLOURS.subarray(3 * step, 3 * step + 3).join(" ")})`;
    scale.fillRect(step, 0, 1, 1);
  }
  for (const choice of [headChoice, brightnessChoice])
    choice.addEventListener("change", () => inView.forEach(repaint));
}
addEventListener("beforeprint", () => {
  for (const canvas of cells.keys()) if (canvas.closest("details").open) repaint(canvas);
});
