// Curves over depth, bars, histograms and similarities. Each chart is an SVG that fills the available width and shows
// values at the pointer.
"use strict";

const MARGIN = { left: 46, right: 12, top: 22, bottom: 30 };
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const GROUP_WORDS = { cls: "CLS", distillation: "distillation", registers: "registers", patches: "patches" };
const MIN_RATIO_FOR_LOG_SCALE = 30; // minimum ratio of largest to smallest norm for a logarithmic scale

const afterLayers = Array.from({ length: data.layers + 1 }, (_, layer) => layer); // 0 means the embeddings
const inLayers = afterLayers.slice(1);

// Style of the lines -----------------------------------------------------------------------------------------------

// One color per group; tokens of a group differ in lightness, dashes and markers.
const tokenStyles = data.tokens.map(({ name, group, read }, tokenIndex) => {
  const members = data.tokens.filter((token) => token.group === group);
  const index = tokenIndex - data.tokens.findIndex((token) => token.group === group);
  const fade = members.length > 1 ? Math.round((55 * index) / (members.length - 1)) : 0;
  return { name, group, read, color: `color-mix(in oklab, var(--${group}), var(--fade) ${fade}%)`, index };
});
const patchStyle = { name: "patches", group: "patches", read: data.patches_read, color: "var(--patches)", index: 0 };

function buildMarker(index, x, y, color) {
  const r = 3.2;
  const shapes = [
    () => element("circle", { cx: x, cy: y, r }),
    () => element("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r }),
    () => element("path", { d: `M${x},${y - r - 1}L${x + r + 1},${y + r}L${x - r - 1},${y + r}Z` }),
    () => element("path", { d: `M${x},${y - r - 1}L${x + r + 1},${y}L${x},${y + r + 1}L${x - r - 1},${y}Z` }),
  ];
  const shape = shapes[index % shapes.length]();
  shape.style.fill = color;
  return shape;
}

// Axes -------------------------------------------------------------------------------------------------------------

// Return round tick values that cover all values from `least` to `most`.
function getTicks(least, most) {
  const rough = (most - least || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let value = Math.floor(least / step) * step; value < most + step * 0.999; value += step)
    ticks.push(Number(value.toPrecision(12)));
  return ticks;
}

// Return the powers of ten between two values, and 2 and 5 times these powers if there are few powers.
function getLogTicks(least, most) {
  const first = Math.floor(Math.log10(least));
  const powers = Array.from({ length: Math.ceil(Math.log10(most)) - first + 1 }, (_, index) => 10 ** (first + index));
  const inside = (values) => values.filter((value) => value >= least * 0.999 && value <= most * 1.001);
  const fine = inside(powers.flatMap((power) => [power, 2 * power, 5 * power]));
  if (fine.length <= 6) return fine;
  const coarse = inside(powers);
  return coarse.filter((_, index) => index % Math.ceil(coarse.length / 6) === 0);
}

// Return a y axis: tick values, and the function `toY` that converts values to pixels.
function buildYAxis(values, height, { log = false, format = formatNumber, unit = "" }) {
  const finite = values.filter((value) => value !== null);
  const least = Math.min(...finite, ...(log ? [] : [0]));
  const most = log ? Math.max(...finite) : Math.max(...finite, 0) || (format === formatPercent ? 0.01 : 1);
  const ticks = log ? getLogTicks(least, most) : getTicks(least, most);
  const [low, high] = log ? [Math.log10(least), Math.log10(most)] : [Math.min(ticks[0], least), Math.max(ticks.at(-1), most)];
  const room = height - MARGIN.top - MARGIN.bottom;
  const toY = (value) => MARGIN.top + room * (1 - ((log ? Math.log10(value) : value) - low) / (high - low || 1));
  return { ticks, toY, format, unit: log ? `${unit}, logarithmic` : unit };
}

function drawAxes(svg, width, height, y, labels, getX, xTitle) {
  svg.append(element("text", { x: 0, y: 11, class: "tick unit" }, y.unit));
  for (const tick of y.ticks) {
    svg.append(element("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y.toY(tick), y2: y.toY(tick), class: "grid-line" }));
    svg.append(element("text", { x: MARGIN.left - 6, y: y.toY(tick) + 4, class: "tick end" }, y.format(tick)));
  }
  const every = Math.ceil(labels.length / Math.max(Math.floor((width - MARGIN.left) / 42), 1));
  labels.forEach((label, index) => {
    if (index % every === 0)
      svg.append(element("text", { x: getX(index), y: height - MARGIN.bottom + 15, class: "tick middle" }, formatNumber(label)));
  });
  svg.append(element("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 2, class: "tick middle" }, xTitle));
}

// Shade the last layer if some outputs of this layer are unused, and list the tokens with unused outputs.
function drawUnread(svg, width, height, lines, labels, getX) {
  const unread = lines.filter(({ read }) => read !== undefined && read < labels.at(-1));
  if (!unread.length || labels.length < 2) return;
  const left = (getX(labels.length - 2) + getX(labels.length - 1)) / 2;
  const names = [...new Set(unread.map(({ group, name }) => (lines.filter((line) => line.group === group).every((line) => unread.includes(line)) ? GROUP_WORDS[group] : name)))];
  const box = { x: left, y: MARGIN.top, width: width - MARGIN.right - left, height: height - MARGIN.top - MARGIN.bottom };
  svg.append(element("rect", { ...box, class: "unread" }));
  svg.append(element("text", { x: width - MARGIN.right - 2, y: 11, class: "tick end unread-label" }, `not used: ${names.join(", ")}`));
}

// Add an SVG to a figure, and redraw the SVG when the width of the figure changes. Return the function that redraws.
function addDrawing(figure, height, label, draw) {
  const svg = element("svg", { role: "img", "aria-label": label, height });
  figure.append(svg);
  let drawnWidth = 0;
  const redraw = () => {
    if (!drawnWidth) return; // the figure is not laid out yet
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${drawnWidth} ${height}`);
    draw(svg, drawnWidth);
  };
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (!width || width === drawnWidth) return;
    drawnWidth = width;
    redraw();
  }).observe(figure);
  return redraw;
}

// Show the values (`lines(index)`) at the index of the x axis that the pointer or the arrow keys select.
function showValues(svg, count, getX, lines, height) {
  const cross = element("line", { y1: MARGIN.top, y2: height - MARGIN.bottom, class: "cross", visibility: "hidden" });
  svg.append(cross);
  let selected = -1;
  const choose = (index, x, y) => {
    selected = index;
    cross.setAttribute("x1", getX(index));
    cross.setAttribute("x2", getX(index));
    cross.setAttribute("visibility", "visible");
    tip.show(x, y, lines(index));
  };
  const leave = () => {
    selected = -1;
    cross.setAttribute("visibility", "hidden");
    tip.hide();
  };
  const nearest = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    const distances = Array.from({ length: count }, (_, index) => Math.abs(getX(index) - x));
    choose(distances.indexOf(Math.min(...distances)), event.clientX, event.clientY);
  };
  svg.onpointermove = svg.onpointerdown = nearest;
  svg.onblur = leave;
  svg.onpointerleave = (event) => event.pointerType === "touch" || leave(); // the value stays visible after a tap
  svg.setAttribute("tabindex", 0);
  svg.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const index = Math.min(Math.max(selected + step, 0), count - 1);
    const box = svg.getBoundingClientRect();
    choose(index, box.left + getX(index), box.top + 20);
  };
}

// Build the sample line of a legend entry.
function buildSample({ color, index = 0, dash }) {
  const svg = element("svg", { width: 26, height: 12, "aria-hidden": "true" });
  const line = { x1: 1, x2: 25, y1: 6, y2: 6, "stroke-dasharray": dash ?? DASHES[index % DASHES.length], class: "line" };
  svg.append(element("line", { ...line, style: `stroke: ${color}` }));
  if (dash === undefined) svg.append(buildMarker(index, 13, 6, color));
  return svg;
}

// Add the values as a table, for screen readers and copying.
function addTable(figure, header, rows) {
  const buildCells = (values, tag) => values.map((value) => element(tag, {}, typeof value === "string" ? value : formatNumber(value)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...buildCells(header, "th"))));
  table.append(element("tbody", {}, ...rows.map((row) => element("tr", {}, ...buildCells(row, "td")))));
  figure.append(element("details", { class: "numbers" }, element("summary", {}, "numbers"), element("div", { class: "wide" }, table)));
}

// Curves -----------------------------------------------------------------------------------------------------------

// Draw a line chart: `series` are { name, color, index, mean, low?, high? }, `labels` are the labels of the x axis, and
// `baselines` are { name, value }.
function drawLineChart(figure, { series, labels, xTitle, unit, baselines = [], format = formatNumber, log = false, height = 242 }) {
  const hidden = new Set();
  const legend = element("div", { class: "legend" });
  const title = figure.querySelector("h3").textContent;
  const redraw = addDrawing(figure, height, `${title}, by layer`, (svg, width) => {
    const shown = series.filter(({ name }) => !hidden.has(name));
    const values = shown.flatMap(({ mean, low = [], high = [] }) => [...mean, ...low, ...high]);
    const y = buildYAxis([...values, ...baselines.map(({ value }) => value)], height, { log, format, unit });
    const room = width - MARGIN.left - MARGIN.right - 12;
    const getX = (index) => MARGIN.left + 6 + (labels.length > 1 ? (room * index) / (labels.length - 1) : room / 2);
    drawUnread(svg, width, height, shown, labels, getX);
    drawAxes(svg, width, height, y, labels, getX, xTitle);
    for (const { value } of baselines) {
      const at = y.toY(value);
      svg.append(element("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at, class: "baseline" }));
    }
    const points = (row) => row.map((value, index) => [getX(index), value === null ? null : y.toY(value)]).filter(([, at]) => at !== null);
    for (const { low, high, color } of shown) {
      if (!low) continue;
      const corners = [...points(low), ...points(high).reverse()].map((point) => point.join(","));
      svg.append(element("path", { d: `M${corners.join("L")}Z`, class: "band", style: `fill: ${color}` }));
    }
    for (const { mean, color, index } of shown) {
      const line = element("path", { d: `M${points(mean).map((point) => point.join(",")).join("L")}`, "stroke-dasharray": DASHES[index % DASHES.length], class: "line" });
      line.style.stroke = color;
      svg.append(line, ...points(mean).map(([x, at]) => buildMarker(index, x, at, color)));
    }
    const describe = ({ name, mean, low, high }, index) =>
      `${name}: ${format(mean[index])}${low && data.heads.length !== 1 ? ` (${format(low[index])} to ${format(high[index])})` : ""}`;
    showValues(svg, labels.length, getX, (index) => [
      `${xTitle} ${labels[index]}`,
      ...shown.map((line) => describe(line, index)),
      ...baselines.map(({ name, value }) => `${name}: ${format(value)}`),
    ], height);
  });
  for (const line of series) {
    const button = element("button", { type: "button", "aria-pressed": "true" }, buildSample(line), line.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(line.name)) hidden.add(line.name);
      button.setAttribute("aria-pressed", String(!hidden.has(line.name)));
      redraw();
    });
    if (series.length > 1) legend.append(button);
  }
  if (baselines.length) legend.append(element("span", {}, buildSample({ color: "var(--ink)", dash: "5 4" }), baselines[0].name));
  figure.append(legend);
  addTable(figure, [xTitle, ...series.map(({ name }) => name)], labels.map((label, index) => [String(label), ...series.map(({ mean }) => mean[index])]));
}

const getUniformBaseline = (name) => [{ name: "uniform", value: data.curves.uniform[name] }];

// Return the baselines of uniform attention; tokens with different visible regions have separate baselines.
function getUniformBaselines(name) {
  const baselines = getUniformBaseline(name);
  (data.curves.uniform_by_token[name] ?? []).forEach((value, index) => {
    const tokenName = data.tokens[index].name;
    if (value !== baselines[0].value) baselines.push({ name: `uniform over the region of ${tokenName}`, value });
  });
  return baselines;
}

const addTokenStyles = (rows) => rows.map((row, index) => ({ ...tokenStyles[index], ...(Array.isArray(row) ? { mean: row } : row) }));
// `{ group, read }` replaces the group of the tokens and the number of layers whose output is used. The attention that
// tokens receive from patches requires the values of the patches, whose output may be used in fewer layers.
const buildAttentionChart = (name, more = {}, { group, read } = {}) => (figure) =>
  drawLineChart(figure, { series: addTokenStyles(data.curves[name]).map((line) => (group ? { ...line, group, read } : line)), labels: inLayers, xTitle: "layer", baselines: getUniformBaselines(name), ...more });
const buildStateChart = (name, more = {}) => (figure) =>
  drawLineChart(figure, { series: addTokenStyles(data.curves[name]), labels: afterLayers, xTitle: "after layer", ...more });

const drawPatchDistance = (figure) => {
  const series = [{ ...patchStyle, ...data.curves.patch_distance[0] }];
  drawLineChart(figure, { series, labels: inLayers, xTitle: "layer", baselines: getUniformBaseline("patch_distance"), unit: "pixels" });
};

function drawNorms(figure) {
  const { median, low, high } = data.curves.patch_norms;
  const patches = { ...patchStyle, mean: median, low, high };
  const series = [patches, ...addTokenStyles(data.curves.token_norms)];
  const values = series.flatMap(({ mean, low: lowest = [], high: highest = [] }) => [...mean, ...lowest, ...highest]).filter((value) => value !== null);
  const log = Math.min(...values) > 0 && Math.max(...values) > MIN_RATIO_FOR_LOG_SCALE * Math.min(...values);
  drawLineChart(figure, { series, labels: afterLayers, xTitle: "after layer", log, format: formatNumber, unit: "norm" });
}

function drawOutliers(figure) {
  const series = [{ ...patchStyle, mean: data.curves.outliers }];
  const withoutRegisters = data.curves.outliers_without_registers;
  if (withoutRegisters) series.push({ name: "registers hidden from attention", color: "var(--registers)", index: 1, mean: withoutRegisters });
  drawLineChart(figure, { series, labels: afterLayers, xTitle: "after layer", format: formatPercent, unit: "patches" });
}

// Draw the deletion or insertion curves of the maps and of a random order of patches.
const buildMapCheckChart = (name, verb) => (figure) => {
  const checks = Object.entries(data.map_checks);
  const colors = ["var(--cls)", "var(--registers)"];
  const series = checks.map(([map, check], index) => ({ name: map, index, color: colors[index], mean: check[name] }));
  series.push({ name: "random order", index: 2, color: "var(--patches)", mean: checks[0][1][`random_${name}`] });
  const labels = data.check_fractions.map((fraction) => 100 * fraction);
  drawLineChart(figure, { series, labels, xTitle: `% of the patches ${verb}`, format: formatPercent, unit: "probability" });
};

// Bars -------------------------------------------------------------------------------------------------------------

function drawMass(box) {
  const groups = Object.keys(GROUP_WORDS);
  const visibleGroups = groups.filter((group) => group === "patches" || data.tokens.some((token) => token.group === group));
  data.tokens.forEach(({ name, read }, token) => {
    const figure = element("figure", {}, element("figcaption", {}, element("h4", {}, name)));
    box.append(figure);
    if (read < data.layers) figure.firstChild.append(element("p", {}, `The output of layer ${data.layers} is not used for this token.`));
    const getFraction = (group, layer) => data.curves.mass[token][groups.indexOf(group)][layer];
    const height = 162;
    addDrawing(figure, height, `attention of ${name} to groups of tokens, by layer`, (svg, width) => {
      const y = buildYAxis([0, 1], height, { format: formatPercent, unit: "attention" });
      const step = (width - MARGIN.left - MARGIN.right) / data.layers;
      const getX = (index) => MARGIN.left + step * (index + 0.5);
      drawAxes(svg, width, height, { ...y, ticks: [0, 0.5, 1] }, inLayers, getX, "layer");
      inLayers.forEach((_, layer) => {
        let below = 0;
        for (const group of visibleGroups) {
          const top = Math.min(below + getFraction(group, layer), 1);
          svg.append(element("rect", { x: getX(layer) - step * 0.46, width: step * 0.92, y: y.toY(top), height: Math.max(y.toY(below) - y.toY(top), 0), class: `bar g-${group}${layer < read ? "" : " unread-bar"}` }));
          below = top;
        }
      });
      const describe = (layer) => visibleGroups.map((group) => `${GROUP_WORDS[group]}: ${formatPercent(getFraction(group, layer))}`);
      showValues(svg, data.layers, getX, (layer) => [`${name}, layer ${layer + 1}`, ...describe(layer).reverse()], height);
    });
    addTable(figure, ["layer", ...visibleGroups.map((group) => GROUP_WORDS[group])], inLayers.map((label, layer) => [String(label), ...visibleGroups.map((group) => getFraction(group, layer))]));
  });
  const names = visibleGroups.map((group) => element("span", {}, element("span", { class: `square g-${group}` }), GROUP_WORDS[group]));
  box.after(element("div", { class: "legend" }, ...names));
}

// Add a slider over layers that calls `show(layer)` when a layer is selected. Return a function that shows the initial
// layer.
function addLayerSlider(figure, show) {
  const output = element("output");
  const slider = element("input", { type: "range", min: 0, max: data.layers, value: data.layers, "aria-label": "layer" });
  const choose = () => {
    const unread = figure.dataset.chart === "histogram" && slider.value > data.patches_read ? " (the patches are not used)" : "";
    output.textContent = (Number(slider.value) ? `after layer ${slider.value}` : "the embeddings") + unread;
    show(Number(slider.value));
  };
  slider.addEventListener("input", choose);
  figure.querySelector("figcaption").after(element("label", { class: "slider" }, slider, output));
  return choose;
}

function drawHistogram(figure) {
  const height = 240;
  let layer = data.layers;
  const mode = element("p", { class: "mode" });
  const redraw = addDrawing(figure, height, "histogram of the norms of the patches", (svg, width) => {
    const { counts, low, high, mode: second, registers } = data.histograms[layer];
    const y = buildYAxis([1, Math.max(...counts, 10)], height, { log: true, format: (tick) => tick.toLocaleString("en"), unit: "patches" });
    const room = width - MARGIN.left - MARGIN.right;
    const xFor = (ratio) => MARGIN.left + (room * Math.log(ratio / low)) / Math.log(high / low);
    const edge = (bin) => low * (high / low) ** (bin / counts.length);
    const middle = (bin) => xFor(edge(bin + 0.5));
    drawAxes(svg, width, height, y, [], middle, "norm / median norm of the image, logarithmic");
    for (const tick of getLogTicks(low, high))
      svg.append(element("text", { x: xFor(tick), y: height - MARGIN.bottom + 15, class: "tick middle" }, formatNumber(tick)));
    const step = room / counts.length;
    const floor = height - MARGIN.bottom;
    const limit = second ? second.threshold : Infinity;
    counts.forEach((count, bin) => {
      if (!count) return;
      const isBeyond = edge(bin + 0.5) > limit;
      const top = Math.min(y.toY(count), floor - 3); // the bar of a single patch stays visible
      svg.append(element("rect", { x: MARGIN.left + bin * step + 0.5, width: Math.max(step - 1, 1), y: top, height: floor - top, class: isBeyond ? "bar beyond" : "bar g-patches" }));
    });
    if (second) svg.append(element("line", { x1: xFor(limit), x2: xFor(limit), y1: MARGIN.top, y2: floor, class: "baseline" }));
    for (const norm of registers) {
      const x = xFor(norm);
      svg.append(element("path", { d: `M${x - 5},${MARGIN.top}L${x + 5},${MARGIN.top}L${x},${MARGIN.top + 9}Z`, class: "bar g-registers" }));
    }
    mode.textContent = second ? `Second mode: ${formatPercent(second.fraction)} of the patches, at ${formatNumber(second.ratio)} times the median.` : "One mode.";
    showValues(svg, counts.length, middle, (bin) => [
      `${formatNumber(edge(bin))} to ${formatNumber(edge(bin + 1))} times the median`,
      `${counts[bin].toLocaleString("en")} patches`,
    ], height);
  });
  figure.append(mode);
  addLayerSlider(figure, (selected) => {
    layer = selected;
    redraw();
  })();
}

// Similarities -----------------------------------------------------------------------------------------------------

// Draw a matrix of cosines as squares, with numbers if the squares are large enough. Return the side length of a
// square in pixels.
function drawSquares(svg, width, matrix, names, { side, left, top, words }) {
  const room = Math.min((width - left - 4) / names.length, side);
  matrix.forEach((row, down) =>
    row.forEach((value, across) => {
      const x = left + across * room;
      const y = top + down * room;
      const square = element("rect", { x, y, width: room - (room > 12 ? 1 : 0), height: room - (room > 12 ? 1 : 0), class: "square-cell" });
      const strength = Math.round(100 * Math.min(Math.abs(value ?? 0), 1));
      square.style.fill = `color-mix(in oklab, var(${value < 0 ? "--opposite" : "--alike"}) ${strength}%, var(--panel))`;
      square.addEventListener("pointermove", (event) => tip.show(event.clientX, event.clientY, [words(down, across), `cosine ${formatNumber(value)}`]));
      square.addEventListener("pointerleave", () => tip.hide());
      svg.append(square);
      if (room >= 34)
        svg.append(element("text", { x: x + room / 2, y: y + room / 2 + 4, class: `inside ${strength > 55 ? "on-strong" : ""}` }, value === null ? "" : value.toFixed(2)));
    }),
  );
  return room;
}

function drawTokenSimilarity(figure) {
  let layer = data.layers;
  const names = data.tokens.map(({ name }, index) => `${index + 1}  ${name}`);
  const longest = Math.min(Math.max(...names.map((name) => name.length)) * 7 + 10, 150);
  const side = 64;
  const height = names.length * side + 24;
  const numbers = element("div");
  const redraw = addDrawing(figure, height, "cosine similarity of the tokens to each other", (svg, width) => {
    const words = (down, across) => `${data.tokens[down].name} and ${data.tokens[across].name}, ${layer ? `after layer ${layer}` : "embeddings"}`;
    const room = drawSquares(svg, width, data.curves.between_tokens[layer], names, { side, left: longest, top: 22, words });
    names.forEach((name, index) => {
      const short = name.length * 7 > longest - 10 ? `${name.slice(0, Math.floor(longest / 7) - 2)}…` : name;
      svg.append(element("text", { x: longest - 6, y: 22 + (index + 0.5) * room + 4, class: "tick end" }, short));
      svg.append(element("text", { x: longest + (index + 0.5) * room, y: 14, class: "tick middle" }, String(index + 1)));
    });
    const used = Math.ceil(22 + room * names.length + 2);
    svg.setAttribute("height", used);
    svg.setAttribute("viewBox", `0 0 ${width} ${used}`);
  });
  const choose = addLayerSlider(figure, (selected) => {
    layer = selected;
    redraw();
    numbers.replaceChildren();
    addTable(numbers, ["", ...names], data.curves.between_tokens[layer].map((row, index) => [names[index], ...row]));
  });
  figure.append(numbers);
  choose();
}

function drawLayerSimilarity(box) {
  data.tokens.forEach(({ name }, token) => {
    const figure = element("figure", {}, element("figcaption", {}, element("h4", {}, name)));
    box.append(figure);
    const matrix = data.curves.across_layers[token];
    const height = 240;
    addDrawing(figure, height, `cosine similarity of ${name} across layers`, (svg, width) => {
      const words = (down, across) => `${name}, after layer ${down} and ${across}`;
      const room = drawSquares(svg, width, matrix, afterLayers, { side: 210 / afterLayers.length, left: 24, top: 4, words });
      const every = Math.ceil(afterLayers.length / Math.max(Math.floor((room * afterLayers.length) / 22), 1));
      afterLayers.forEach((layer) => {
        if (layer % every) return;
        svg.append(element("text", { x: 20, y: 4 + (layer + 0.5) * room + 4, class: "tick end" }, String(layer)));
        svg.append(element("text", { x: 24 + (layer + 0.5) * room, y: 4 + room * afterLayers.length + 15, class: "tick middle" }, String(layer)));
      });
    });
    addTable(figure, ["after layer", ...afterLayers.map(String)], matrix.map((row, layer) => [String(layer), ...row]));
  });
}

// Initialization -----------------------------------------------------------------------------------------------------

const CHARTS = {
  entropy: buildAttentionChart("entropy", { unit: "nats" }),
  spread: buildAttentionChart("spread", { unit: "pixels" }),
  received: buildAttentionChart("received", { format: formatPercent, unit: "attention of patches" }, patchStyle),
  patch_distance: drawPatchDistance,
  mass: drawMass,
  norms: drawNorms,
  outliers: drawOutliers,
  histogram: drawHistogram,
  deletion: buildMapCheckChart("deletion", "replaced"),
  insertion: buildMapCheckChart("insertion", "kept"),
  variation: buildStateChart("variation", { format: formatPercent, unit: "of the norm" }),
  to_patches: buildStateChart("to_patches", { unit: "cosine" }),
  between_tokens: drawTokenSimilarity,
  across_layers: drawLayerSimilarity,
};
for (const chart of document.querySelectorAll("[data-chart]")) CHARTS[chart.dataset.chart](chart);
