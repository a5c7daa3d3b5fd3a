// Curves over depth, bars, histograms and similarities: SVG with the available width, and values at the pointer.
"use strict";

const MARGIN = { left: 46, right: 12, top: 22, bottom: 30 };
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const GROUP_WORDS = { cls: "CLS", distillation: "distillation", registers: "registers", patches: "patches" };
const MIN_LOG_RATIO = 30; // minimum ratio of largest to smallest norm for a logarithmic scale

const afterLayers = Array.from({ length: data.layers + 1 }, (_, layer) => layer); // 0 means the embeddings
const inLayers = afterLayers.slice(1);

// Style of the lines -----------------------------------------------------------------------------------------------

// One color per group; tokens of a group differ in lightness, dashes and markers.
const tokenStyles = data.tokens.map(({ name, group, read }, place) => {
  const members = data.tokens.filter((token) => token.group === group);
  const index = place - data.tokens.findIndex((token) => token.group === group);
  const fade = members.length > 1 ? Math.round((55 * index) / (members.length - 1)) : 0;
  return { name, group, read, color: `color-mix(in oklab, var(--${group}), var(--fade) ${fade}%)`, index };
});
const patchStyle = { name: "patches", group: "patches", read: data.patches_read, color: "var(--patches)", index: 0 };

function marker(index, x, y, color) {
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

// Round tick values from 0 (or below) to the largest value.
function ticksFor(least, most) {
  const rough = (most - least || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const ticks = [];
  for (let value = Math.floor(least / step) * step; value < most + step * 0.999; value += step)
    ticks.push(Number(value.toPrecision(12)));
  return ticks;
}

// Powers of ten between two values; also their multiples by 2 and 5 if there are few.
function logarithmicTicks(least, most) {
  const first = Math.floor(Math.log10(least));
  const powers = Array.from({ length: Math.ceil(Math.log10(most)) - first + 1 }, (_, place) => 10 ** (first + place));
  const inside = (values) => values.filter((value) => value >= least * 0.999 && value <= most * 1.001);
  const fine = inside(powers.flatMap((power) => [power, 2 * power, 5 * power]));
  if (fine.length <= 6) return fine;
  const coarse = inside(powers);
  return coarse.filter((_, place) => place % Math.ceil(coarse.length / 6) === 0);
}

// The y axis: ticks, and a function from values to positions.
function yAxis(values, height, { log = false, format = plain, unit = "" }) {
  const finite = values.filter((value) => value !== null);
  const least = Math.min(...finite, ...(log ? [] : [0]));
  const most = log ? Math.max(...finite) : Math.max(...finite, 0) || (format === percent ? 0.01 : 1);
  const ticks = log ? logarithmicTicks(least, most) : ticksFor(least, most);
  const [low, high] = log ? [Math.log10(least), Math.log10(most)] : [Math.min(ticks[0], least), Math.max(ticks.at(-1), most)];
  const room = height - MARGIN.top - MARGIN.bottom;
  const place = (value) => MARGIN.top + room * (1 - ((log ? Math.log10(value) : value) - low) / (high - low || 1));
  return { ticks, place, format, unit: log ? `${unit}, logarithmic` : unit };
}

function drawAxes(svg, width, height, y, labels, xOf, xTitle) {
  svg.append(element("text", { x: 0, y: 11, class: "tick unit" }, y.unit));
  for (const tick of y.ticks) {
    svg.append(element("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y.place(tick), y2: y.place(tick), class: "grid-line" }));
    svg.append(element("text", { x: MARGIN.left - 6, y: y.place(tick) + 4, class: "tick end" }, y.format(tick)));
  }
  const every = Math.ceil(labels.length / Math.max(Math.floor((width - MARGIN.left) / 42), 1));
  labels.forEach((label, place) => {
    if (place % every === 0)
      svg.append(element("text", { x: xOf(place), y: height - MARGIN.bottom + 15, class: "tick middle" }, plain(label)));
  });
  svg.append(element("text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 2, class: "tick middle" }, xTitle));
}

// Shade the last layer if nothing reads the output of some of the lines there, and name these.
function drawUnread(svg, width, height, lines, labels, xOf) {
  const unread = lines.filter(({ read }) => read !== undefined && read < labels.at(-1));
  if (!unread.length || labels.length < 2) return;
  const left = (xOf(labels.length - 2) + xOf(labels.length - 1)) / 2;
  const names = [...new Set(unread.map(({ group, name }) => (lines.filter((line) => line.group === group).every((line) => unread.includes(line)) ? GROUP_WORDS[group] : name)))];
  const box = { x: left, y: MARGIN.top, width: width - MARGIN.right - left, height: height - MARGIN.top - MARGIN.bottom };
  svg.append(element("rect", { ...box, class: "unread" }));
  svg.append(element("text", { x: width - MARGIN.right - 2, y: 11, class: "tick end unread-label" }, `not read: ${names.join(", ")}`));
}

// An SVG in a figure, redrawn for each width.
function drawing(figure, height, label, draw) {
  const svg = element("svg", { role: "img", "aria-label": label, height });
  figure.append(svg);
  let drawnWidth = 0;
  const redraw = () => {
    if (!drawnWidth) return; // not laid out yet
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

// The pointer or the arrow keys select an index along x; `lines(index)` returns its values.
function readable(svg, count, xOf, lines, height) {
  const cross = element("line", { y1: MARGIN.top, y2: height - MARGIN.bottom, class: "cross", visibility: "hidden" });
  svg.append(cross);
  let chosen = -1;
  const choose = (place, x, y) => {
    chosen = place;
    cross.setAttribute("x1", xOf(place));
    cross.setAttribute("x2", xOf(place));
    cross.setAttribute("visibility", "visible");
    tip.show(x, y, lines(place));
  };
  const leave = () => {
    chosen = -1;
    cross.setAttribute("visibility", "hidden");
    tip.hide();
  };
  const nearest = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    const distances = Array.from({ length: count }, (_, place) => Math.abs(xOf(place) - x));
    choose(distances.indexOf(Math.min(...distances)), event.clientX, event.clientY);
  };
  svg.onpointermove = svg.onpointerdown = nearest;
  svg.onblur = leave;
  svg.onpointerleave = (event) => event.pointerType === "touch" || leave(); // keep the value after a tap
  svg.setAttribute("tabindex", 0);
  svg.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const place = Math.min(Math.max(chosen + step, 0), count - 1);
    const box = svg.getBoundingClientRect();
    choose(place, box.left + xOf(place), box.top + 20);
  };
}

// A sample of a line, for the legend.
function sample({ color, index = 0, dash }) {
  const svg = element("svg", { width: 26, height: 12, "aria-hidden": "true" });
  const line = { x1: 1, x2: 25, y1: 6, y2: 6, "stroke-dasharray": dash ?? DASHES[index % DASHES.length], class: "line" };
  svg.append(element("line", { ...line, style: `stroke: ${color}` }));
  if (dash === undefined) svg.append(marker(index, 13, 6, color));
  return svg;
}

// The values as a table, for screen readers and copying.
function numbersBelow(figure, header, rows) {
  const cellsOf = (values, tag) => values.map((value) => element(tag, {}, typeof value === "string" ? value : plain(value)));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...cellsOf(header, "th"))));
  table.append(element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cellsOf(row, "td")))));
  figure.append(element("details", { class: "numbers" }, element("summary", {}, "numbers"), element("div", { class: "wide" }, table)));
}

// Curves -----------------------------------------------------------------------------------------------------------

// `series`: { name, color, index, mean, low?, high? }; `labels`: of x; `baselines`: of { name, value }.
function lineChart(figure, { series, labels, xTitle, unit, baselines = [], format = plain, log = false, height = 242 }) {
  const hidden = new Set();
  const legend = element("div", { class: "legend" });
  const title = figure.querySelector("h3").textContent;
  const redraw = drawing(figure, height, `${title}, by layer`, (svg, width) => {
    const shown = series.filter(({ name }) => !hidden.has(name));
    const values = shown.flatMap(({ mean, low = [], high = [] }) => [...mean, ...low, ...high]);
    const y = yAxis([...values, ...baselines.map(({ value }) => value)], height, { log, format, unit });
    const room = width - MARGIN.left - MARGIN.right - 12;
    const xOf = (place) => MARGIN.left + 6 + (labels.length > 1 ? (room * place) / (labels.length - 1) : room / 2);
    drawUnread(svg, width, height, shown, labels, xOf);
    drawAxes(svg, width, height, y, labels, xOf, xTitle);
    for (const { value } of baselines) {
      const at = y.place(value);
      svg.append(element("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at, class: "baseline" }));
    }
    const points = (row) => row.map((value, place) => [xOf(place), value === null ? null : y.place(value)]).filter(([, at]) => at !== null);
    for (const { low, high, color } of shown) {
      if (!low) continue;
      const corners = [...points(low), ...points(high).reverse()].map((point) => point.join(","));
      svg.append(element("path", { d: `M${corners.join("L")}Z`, class: "band", style: `fill: ${color}` }));
    }
    for (const { mean, color, index } of shown) {
      const line = element("path", { d: `M${points(mean).map((point) => point.join(",")).join("L")}`, "stroke-dasharray": DASHES[index % DASHES.length], class: "line" });
      line.style.stroke = color;
      svg.append(line, ...points(mean).map(([x, at]) => marker(index, x, at, color)));
    }
    const describe = ({ name, mean, low, high }, place) =>
      `${name}: ${format(mean[place])}${low && data.heads.length !== 1 ? ` (${format(low[place])} to ${format(high[place])})` : ""}`;
    readable(svg, labels.length, xOf, (place) => [
      `${xTitle} ${labels[place]}`,
      ...shown.map((line) => describe(line, place)),
      ...baselines.map(({ name, value }) => `${name}: ${format(value)}`),
    ], height);
  });
  for (const line of series) {
    const button = element("button", { type: "button", "aria-pressed": "true" }, sample(line), line.name);
    button.addEventListener("click", () => {
      if (!hidden.delete(line.name)) hidden.add(line.name);
      button.setAttribute("aria-pressed", String(!hidden.has(line.name)));
      redraw();
    });
    if (series.length > 1) legend.append(button);
  }
  if (baselines.length) legend.append(element("span", {}, sample({ color: "var(--ink)", dash: "5 4" }), baselines[0].name));
  figure.append(legend);
  numbersBelow(figure, [xTitle, ...series.map(({ name }) => name)], labels.map((label, place) => [String(label), ...series.map(({ mean }) => mean[place])]));
}

const uniform = (name) => [{ name: "uniform", value: data.curves.uniform[name] }];

// Tokens with different visible regions have separate baselines.
function uniformByToken(name) {
  const baselines = uniform(name);
  (data.curves.uniform_by_token[name] ?? []).forEach((value, place) => {
    const tokenName = data.tokens[place].name;
    if (value !== baselines[0].value) baselines.push({ name: `uniform over the region of ${tokenName}`, value });
  });
  return baselines;
}

const ofTokens = (rows) => rows.map((row, place) => ({ ...tokenStyles[place], ...(Array.isArray(row) ? { mean: row } : row) }));
// The attention that tokens receive is that of the patches (`{ group, read }`), which may be read in fewer layers.
const attentionChart = (name, more = {}, { group, read } = {}) => (figure) =>
  lineChart(figure, { series: ofTokens(data.curves[name]).map((line) => (group ? { ...line, group, read } : line)), labels: inLayers, xTitle: "layer", baselines: uniformByToken(name), ...more });
const stateChart = (name, more = {}) => (figure) =>
  lineChart(figure, { series: ofTokens(data.curves[name]), labels: afterLayers, xTitle: "after layer", ...more });

const patchDistance = (figure) => {
  const series = [{ ...patchStyle, ...data.curves.patch_distance[0] }];
  lineChart(figure, { series, labels: inLayers, xTitle: "layer", baselines: uniform("patch_distance"), unit: "pixels" });
};

function norms(figure) {
  const { median, low, high } = data.curves.patch_norms;
  const patches = { ...patchStyle, mean: median, low, high };
  const series = [patches, ...ofTokens(data.curves.token_norms)];
  const values = series.flatMap(({ mean, low: lowest = [], high: highest = [] }) => [...mean, ...lowest, ...highest]).filter((value) => value !== null);
  const log = Math.min(...values) > 0 && Math.max(...values) > MIN_LOG_RATIO * Math.min(...values);
  lineChart(figure, { series, labels: afterLayers, xTitle: "after layer", log, format: plain, unit: "norm" });
}

function outliers(figure) {
  const series = [{ ...patchStyle, mean: data.curves.outliers }];
  const withoutRegisters = data.curves.outliers_without_registers;
  if (withoutRegisters) series.push({ name: "registers hidden from attention", color: "var(--registers)", index: 1, mean: withoutRegisters });
  lineChart(figure, { series, labels: afterLayers, xTitle: "after layer", format: percent, unit: "patches" });
}

// Deletion and insertion curves of the maps, and of a random order of patches.
const curveChart = (name, verb) => (figure) => {
  const checks = Object.entries(data.map_checks);
  const colors = ["var(--cls)", "var(--registers)"];
  const series = checks.map(([map, check], index) => ({ name: map, index, color: colors[index], mean: check[name] }));
  series.push({ name: "random order", index: 2, color: "var(--patches)", mean: checks[0][1][`random_${name}`] });
  const labels = data.check_fractions.map((fraction) => 100 * fraction);
  lineChart(figure, { series, labels, xTitle: `% of the patches ${verb}`, format: percent, unit: "probability" });
};

// Bars -------------------------------------------------------------------------------------------------------------

function mass(box) {
  const groups = Object.keys(GROUP_WORDS);
  const visibleGroups = groups.filter((group) => group === "patches" || data.tokens.some((token) => token.group === group));
  data.tokens.forEach(({ name, read }, token) => {
    const figure = element("figure", {}, element("figcaption", {}, element("h4", {}, name)));
    box.append(figure);
    if (read < data.layers) figure.firstChild.append(element("p", {}, `Nothing reads layer ${data.layers} of this token.`));
    const height = 162;
    drawing(figure, height, `where the attention of ${name} goes, by layer`, (svg, width) => {
      const y = yAxis([0, 1], height, { format: percent, unit: "attention" });
      const step = (width - MARGIN.left - MARGIN.right) / data.layers;
      const xOf = (place) => MARGIN.left + step * (place + 0.5);
      drawAxes(svg, width, height, { ...y, ticks: [0, 0.5, 1] }, inLayers, xOf, "layer");
      inLayers.forEach((_, layer) => {
        let below = 0;
        for (const group of visibleGroups) {
          const share = data.curves.mass[token][groups.indexOf(group)][layer];
          const top = Math.min(below + share, 1);
          svg.append(element("rect", { x: xOf(layer) - step * 0.46, width: step * 0.92, y: y.place(top), height: Math.max(y.place(below) - y.place(top), 0), class: `bar g-${group}${layer < read ? "" : " unread-bar"}` }));
          below = top;
        }
      });
      const describe = (layer) => visibleGroups.map((group) => `${GROUP_WORDS[group]}: ${percent(data.curves.mass[token][groups.indexOf(group)][layer])}`);
      readable(svg, data.layers, xOf, (layer) => [`${name}, layer ${layer + 1}`, ...describe(layer).reverse()], height);
    });
    numbersBelow(figure, ["layer", ...visibleGroups.map((group) => GROUP_WORDS[group])], inLayers.map((label, layer) => [String(label), ...visibleGroups.map((group) => data.curves.mass[token][groups.indexOf(group)][layer])]));
  });
  const names = visibleGroups.map((group) => element("span", {}, element("span", { class: `square g-${group}` }), GROUP_WORDS[group]));
  box.after(element("div", { class: "legend" }, ...names));
}

// A slider over layers: `show(layer)` is called for each selection, initially for the last layer.
function layerSlider(figure, show) {
  const output = element("output");
  const slider = element("input", { type: "range", min: 0, max: data.layers, value: data.layers, "aria-label": "layer" });
  const choose = () => {
    const unread = figure.dataset.chart === "histogram" && slider.value > data.patches_read ? " (nothing reads the patches)" : "";
    output.textContent = (Number(slider.value) ? `after layer ${slider.value}` : "the embeddings") + unread;
    show(Number(slider.value));
  };
  slider.addEventListener("input", choose);
  figure.querySelector("figcaption").after(element("label", { class: "slider" }, slider, output));
  return choose;
}

function histogram(figure) {
  const height = 240;
  let layer = data.layers;
  const mode = element("p", { class: "mode" });
  const redraw = drawing(figure, height, "norms of the patches, a histogram", (svg, width) => {
    const { counts, low, high, mode: second, registers } = data.histograms[layer];
    const y = yAxis([1, Math.max(...counts, 10)], height, { log: true, format: (tick) => tick.toLocaleString("en"), unit: "patches" });
    const room = width - MARGIN.left - MARGIN.right;
    const xFor = (ratio) => MARGIN.left + (room * Math.log(ratio / low)) / Math.log(high / low);
    const edge = (bin) => low * (high / low) ** (bin / counts.length);
    const middle = (bin) => xFor(edge(bin + 0.5));
    drawAxes(svg, width, height, y, [], middle, "norm / median norm of the image, logarithmic");
    for (const tick of logarithmicTicks(low, high))
      svg.append(element("text", { x: xFor(tick), y: height - MARGIN.bottom + 15, class: "tick middle" }, plain(tick)));
    const step = room / counts.length;
    const floor = height - MARGIN.bottom;
    const limit = second ? second.threshold : Infinity;
    counts.forEach((count, bin) => {
      if (!count) return;
      const isBeyond = edge(bin + 0.5) > limit;
      const top = Math.min(y.place(count), floor - 3); // keep a single patch visible
      svg.append(element("rect", { x: MARGIN.left + bin * step + 0.5, width: Math.max(step - 1, 1), y: top, height: floor - top, class: isBeyond ? "bar beyond" : "bar g-patches" }));
    });
    if (second) svg.append(element("line", { x1: xFor(limit), x2: xFor(limit), y1: MARGIN.top, y2: floor, class: "baseline" }));
    for (const norm of registers) {
      const x = xFor(norm);
      svg.append(element("path", { d: `M${x - 5},${MARGIN.top}L${x + 5},${MARGIN.top}L${x},${MARGIN.top + 9}Z`, class: "bar g-registers" }));
    }
    mode.textContent = second ? `Second mode: ${percent(second.fraction)} of the patches, at ${plain(second.ratio)} times the median.` : "One mode.";
    readable(svg, counts.length, middle, (bin) => [
      `${plain(edge(bin))} to ${plain(edge(bin + 1))} times the median`,
      `${counts[bin].toLocaleString("en")} patches`,
    ], height);
  });
  figure.append(mode);
  layerSlider(figure, (chosen) => {
    layer = chosen;
    redraw();
  })();
}

// Similarities -----------------------------------------------------------------------------------------------------

// A matrix of cosines as squares, with numbers if they fit.
function squares(svg, width, matrix, names, { side, left, top, words }) {
  const room = Math.min((width - left - 4) / names.length, side);
  matrix.forEach((row, down) =>
    row.forEach((value, across) => {
      const x = left + across * room;
      const y = top + down * room;
      const square = element("rect", { x, y, width: room - (room > 12 ? 1 : 0), height: room - (room > 12 ? 1 : 0), class: "square-cell" });
      const strength = Math.round(100 * Math.min(Math.abs(value ?? 0), 1));
      square.style.fill = `color-mix(in oklab, var(${value < 0 ? "--opposite" : "--alike"}) ${strength}%, var(--panel))`;
      square.addEventListener("pointermove", (event) => tip.show(event.clientX, event.clientY, [words(down, across), `cosine ${plain(value)}`]));
      square.addEventListener("pointerleave", () => tip.hide());
      svg.append(square);
      if (room >= 34)
        svg.append(element("text", { x: x + room / 2, y: y + room / 2 + 4, class: `inside ${strength > 55 ? "on-strong" : ""}` }, value === null ? "" : value.toFixed(2)));
    }),
  );
  return room;
}

function betweenTokens(figure) {
  let layer = data.layers;
  const names = data.tokens.map(({ name }, place) => `${place + 1}  ${name}`);
  const longest = Math.min(Math.max(...names.map((name) => name.length)) * 7 + 10, 150);
  const side = 64;
  const height = names.length * side + 24;
  const numbers = element("div");
  const redraw = drawing(figure, height, "cosine similarity of the tokens to each other", (svg, width) => {
    const words = (down, across) => `${data.tokens[down].name} and ${data.tokens[across].name}, ${layer ? `after layer ${layer}` : "embeddings"}`;
    const room = squares(svg, width, data.curves.between_tokens[layer], names, { side, left: longest, top: 22, words });
    names.forEach((name, place) => {
      const short = name.length * 7 > longest - 10 ? `${name.slice(0, Math.floor(longest / 7) - 2)}…` : name;
      svg.append(element("text", { x: longest - 6, y: 22 + (place + 0.5) * room + 4, class: "tick end" }, short));
      svg.append(element("text", { x: longest + (place + 0.5) * room, y: 14, class: "tick middle" }, String(place + 1)));
    });
    const used = Math.ceil(22 + room * names.length + 2);
    svg.setAttribute("height", used);
    svg.setAttribute("viewBox", `0 0 ${width} ${used}`);
  });
  const choose = layerSlider(figure, (chosen) => {
    layer = chosen;
    redraw();
    numbers.replaceChildren();
    numbersBelow(numbers, ["", ...names], data.curves.between_tokens[layer].map((row, place) => [names[place], ...row]));
  });
  figure.append(numbers);
  choose();
}

function acrossLayers(box) {
  data.tokens.forEach(({ name }, token) => {
    const figure = element("figure", {}, element("figcaption", {}, element("h4", {}, name)));
    box.append(figure);
    const matrix = data.curves.across_layers[token];
    const height = 240;
    drawing(figure, height, `cosine similarity of ${name} across layers`, (svg, width) => {
      const words = (down, across) => `${name}, after layer ${down} and ${across}`;
      const room = squares(svg, width, matrix, afterLayers, { side: 210 / afterLayers.length, left: 24, top: 4, words });
      const every = Math.ceil(afterLayers.length / Math.max(Math.floor((room * afterLayers.length) / 22), 1));
      afterLayers.forEach((layer) => {
        if (layer % every) return;
        svg.append(element("text", { x: 20, y: 4 + (layer + 0.5) * room + 4, class: "tick end" }, String(layer)));
        svg.append(element("text", { x: 24 + (layer + 0.5) * room, y: 4 + room * afterLayers.length + 15, class: "tick middle" }, String(layer)));
      });
    });
    numbersBelow(figure, ["after layer", ...afterLayers.map(String)], matrix.map((row, layer) => [String(layer), ...row]));
  });
}

// At the start -----------------------------------------------------------------------------------------------------

const CHARTS = {
  entropy: attentionChart("entropy", { unit: "nats" }),
  spread: attentionChart("spread", { unit: "pixels" }),
  received: attentionChart("received", { format: percent, unit: "attention of patches" }, patchStyle),
  patch_distance: patchDistance,
  mass,
  norms,
  outliers,
  histogram,
  deletion: curveChart("deletion", "replaced"),
  insertion: curveChart("insertion", "kept"),
  variation: stateChart("variation", { format: percent, unit: "of the norm" }),
  to_patches: stateChart("to_patches", { unit: "cosine" }),
  between_tokens: betweenTokens,
  across_layers: acrossLayers,
};
for (const place of document.querySelectorAll("[data-chart]")) CHARTS[place.dataset.chart](place);
