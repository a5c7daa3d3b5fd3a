// Classify an image in the browser, and draw the attention of the CLS tokens. The folder model/ is written by
// transformers_js.py. `?dtype=fp16` or `?dtype=q8` in the URL selects another ONNX file.

import { AutoImageProcessor, AutoModelForImageClassification, RawImage, env, softmax } from "transformers.js";

const TOP_K = 5;
const HEAT_COLORS = [[13, 8, 135], [156, 23, 158], [237, 121, 83], [240, 249, 33]]; // no attention to most attention
const HEAT_OPACITY = 0.65;

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useBrowserCache = false; // the cache would keep the files of an older model
env.localModelPath = new URL("./", import.meta.url).pathname;

const dtype = new URLSearchParams(location.search).get("dtype") ?? "fp32";
const loaded = Promise.all([
  AutoModelForImageClassification.from_pretrained("model", { dtype, device: "wasm" }),
  AutoImageProcessor.from_pretrained("model"),
]);

/**
 * Return the predictions for an image (sorted by score), the attention of the CLS tokens, and the preprocessed image.
 * `attention` is a tensor [1, layers, CLS tokens, rows, columns], or undefined if the model does not output attention.
 */
export async function predict(source) {
  const [model, processor] = await loaded;
  const { pixel_values } = await processor(await RawImage.read(source));
  const { logits, cls_attention } = await model.forward({ pixel_values });
  const isMultiLabel = model.config.problem_type === "multi_label_classification";
  const scores = (isMultiLabel ? sigmoid : softmax)(Array.from(logits.data));
  const predictions = scores.map((score, index) => ({ label: model.config.id2label[index], score }));
  predictions.sort((first, second) => second.score - first.score);
  return { predictions, attention: cls_attention, image: toImageData(pixel_values, processor) };
}

const sigmoid = (logits) => logits.map((logit) => 1 / (1 + Math.exp(-logit)));

/** Undo the normalization of `pixel_values` [1, 3, H, W], and return an image. */
function toImageData({ data, dims: [, , height, width] }, processor) {
  const image = new ImageData(width, height);
  const { image_mean: mean, image_std: std, do_normalize: isNormalized } = processor;
  for (let index = 0; index < width * height; index++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = data[channel * width * height + index];
      image.data[4 * index + channel] = 255 * (isNormalized ? value * std[channel] + mean[channel] : value);
    }
    image.data[4 * index + 3] = 255;
  }
  return image;
}

const find = (id) => document.getElementById(id);
let result = null;

/** Return the color [red, green, blue] of an attention from 0 to 1. */
function getHeatColor(value) {
  const position = value * (HEAT_COLORS.length - 1);
  const index = Math.min(Math.floor(position), HEAT_COLORS.length - 2);
  return HEAT_COLORS[index].map((low, channel) => low + (position - index) * (HEAT_COLORS[index + 1][channel] - low));
}

/** Draw the image, and over it a heat map of the attention of the selected token. */
function draw() {
  const { attention, image } = result;
  const [, numLayers, numTokens, rows, columns] = attention.dims;
  const offset = ((find("layer").value - 1) * numTokens + find("token").selectedIndex) * rows * columns;
  const map = Array.from(attention.data.slice(offset, offset + rows * columns));
  const maxValue = Math.max(...map);
  const heat = new ImageData(columns, rows);
  map.forEach((value, index) => heat.data.set([...getHeatColor(value / maxValue), 255 * HEAT_OPACITY], 4 * index));
  const patches = new OffscreenCanvas(columns, rows);
  patches.getContext("2d").putImageData(heat, 0, 0);
  const canvas = find("map");
  Object.assign(canvas, { width: image.width, height: image.height });
  const context = canvas.getContext("2d");
  context.putImageData(image, 0, 0);
  context.drawImage(patches, 0, 0, image.width, image.height);
  find("number").value = `${find("layer").value} of ${numLayers}`;
}

/** Show the predictions for an image and the attention in the last layer. */
async function show(source) {
  find("labels").replaceChildren();
  find("attention").hidden = true;
  result = await predict(source);
  for (const { label, score } of result.predictions.slice(0, TOP_K)) {
    const row = find("labels").insertRow();
    row.insertCell().textContent = label;
    row.insertCell().textContent = `${(100 * score).toFixed(1)}%`;
  }
  find("attention").hidden = !result.attention;
  if (!result.attention) return;
  const [, numLayers, numTokens] = result.attention.dims;
  if (!find("token").length) {
    Object.assign(find("layer"), { max: numLayers, value: numLayers });
    for (let number = 1; number <= numTokens; number++) find("token").add(new Option(number));
    find("token").closest("p").hidden = numTokens === 1;
  }
  draw();
}

find("layer").oninput = draw;
find("token").onchange = draw;
find("file").onchange = async ({ target }) => {
  if (!target.files.length) return;
  find("status").textContent = "Classifying.";
  try {
    await show(target.files[0]);
    find("status").textContent = "";
  } catch (error) {
    find("status").textContent = `No prediction: ${error.message ?? error}`;
  }
};
loaded.then(
  () => (find("status").textContent = "Select an image."),
  (error) => (find("status").textContent = `The model cannot be loaded: ${error.message ?? error}`),
);
