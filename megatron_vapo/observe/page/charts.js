// Charts of the critic as SVG, each with its numbers as a table.

const SVG = "http://www.w3.org/2000/svg";
const BOX = { width: 360, height: 190, left: 34, right: 8, top: 8, bottom: 26 };

function drawn(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function element(name, text, ...children) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

/** Return functions from data to the pixels of a chart. */
function axes([x0, x1], [y0, y1]) {
  const { width, height, left, right, top, bottom } = BOX;
  return {
    x: (number) => left + ((number - x0) / (x1 - x0 || 1)) * (width - left - right),
    y: (number) => height - bottom - ((number - y0) / (y1 - y0 || 1)) * (height - top - bottom),
  };
}

const label = (x, y, anchor, text) => drawn("text", { x, y, "text-anchor": anchor }, text);

function frame({ x, y }, xTicks, yTicks, xLabel) {
  const { width, height, left, right, bottom } = BOX;
  return [
    ...yTicks.map(([number]) => drawn("path", { class: "axis", d: `M${left} ${y(number)}H${width - right}` })),
    ...yTicks.map(([number, text]) => label(left - 4, y(number) + 4, "end", text)),
    ...xTicks.map(([number, text]) => label(x(number), height - bottom + 12, "middle", text)),
    label((left + width - right) / 2, height - 3, "middle", xLabel),
  ];
}

function line({ x, y }, points, names) {
  const finite = points.filter(([, number]) => Number.isFinite(number));
  return drawn("polyline", { class: names, points: finite.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") });
}

/** Put a chart into a figure, in place of the one before. */
function place(figure, about, parts, heads, rows) {
  figure.querySelector("svg")?.remove();
  figure.querySelector("details")?.remove();
  const view = { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": about };
  const cells = (name, row) => element("tr", undefined, ...row.map((cell) => element(name, cell)));
  const table = element("table", undefined, cells("th", heads), ...rows.map((row) => cells("td", row)));
  figure.append(drawn("svg", view, ...parts));
  figure.append(element("details", undefined, element("summary", "Numbers"), element("div", undefined, table)));
}

const TENTHS = Array.from({ length: 10 }, (_, tenth) => tenth);
const two = (number) => (Number.isFinite(number) ? number.toFixed(2) : "-");
const ends = (items) => (items.length > 1 ? [items[0], items.at(-1)] : items);

function drawExplained(figure, steps) {
  const cell = axes([0, 10], [0, steps.length]);
  const [x, y] = [(tenth) => cell.x(tenth), (row) => cell.y(steps.length - row)];
  const tiles = steps.flatMap((step, row) => TENTHS.map((tenth) => {
    const number = step.explained[tenth];
    const tile = drawn("rect", {
      x: x(tenth), y: y(row), width: x(1) - x(0), height: y(1) - y(0), "shape-rendering": "crispEdges",
    }, drawn("title", {}, `step ${stepName(step)}, tenth ${tenth + 1}: ${two(number)}`));
    const share = Math.min(1, Math.abs(number || 0));
    tile.style.fill = mixed(number < 0 ? "negative" : "positive", share);
    return tile;
  }));
  const labels = ends(steps.map((step, row) => [row, step])).map(([row, step]) =>
    label(BOX.left - 4, y(row + 0.5) + 4, "end", stepName(step).replace("pretraining ", "p")));
  const keys = [[-1, "≤ -1"], [-0.5, "-0.5"], [0.5, "0.5"], [1, "1"]].flatMap(([number, text], index) => {
    const swatch = drawn("rect", { x: 120 + 58 * index, y: BOX.height - 12, width: 12, height: 10, class: "axis" });
    swatch.style.fill = mixed(number < 0 ? "negative" : "positive", Math.abs(number));
    return [swatch, drawn("text", { x: 136 + 58 * index, y: BOX.height - 3 }, text)];
  });
  const outline = drawn("path", { class: "axis", d: `M${x(0)} ${y(0)}H${x(10)}V${y(steps.length)}H${x(0)}Z` });
  const last = steps.at(-1).explained;
  const about = `Explained variance by tenth of the response over ${steps.length} steps; in the last step `
    + `${two(last[0])} in the first tenth, ${two(last[9])} in the last`;
  const rows = steps.map((step) => [stepName(step), ...Array.from(step.explained, two)]);
  place(figure, about, [...tiles, outline, ...labels, ...keys], ["step", ...TENTHS.map((tenth) => tenth + 1)], rows);
}

/** Return the bins of a step that have tokens as [predicted, measured, tokens]; none where the step kept nothing. */
const binsOf = ({ calibration }) =>
  TENTHS.map((bin) => calibration?.subarray(3 * bin, 3 * bin + 3)).filter((bin) => bin?.[2] > 0);

function drawCalibration(figure, step, first) {
  const bins = binsOf(step);
  const low = Math.min(0, ...bins.map(([predicted]) => predicted));
  const high = Math.max(1, ...bins.map(([predicted]) => predicted));
  const scale = axes([low, high], [0, 1]);
  const most = Math.max(...bins.map((bin) => bin[2]));
  const dots = bins.map(([predicted, measured, tokens]) => drawn("circle", {
    class: "dot", cx: scale.x(predicted), cy: scale.y(measured), r: 2 + 5 * Math.sqrt(tokens / most),
  }, drawn("title", {}, `predicted ${two(predicted)}, measured ${two(measured)}, ${tokens} tokens`)));
  const diagonal = line(scale, [[0, 0], [1, 1]], "axis");
  const ticks = [[0, "0"], [0.5, "0.5"], [1, "1"]];
  const rows = bins.map(([predicted, measured, tokens]) => [two(predicted), two(measured), tokens]);
  place(figure, `Calibration in step ${stepName(step)}`, [
    ...frame(scale, ticks, ticks, "predicted: (value + 1) / 2; area: tokens"), diagonal,
    line(scale, binsOf(first), "points thin"), line(scale, bins, "points"), ...dots,
  ], ["predicted", "measured", "tokens"], rows);
}

function drawPosition(figure, step, first) {
  const curves = [step.right, step.wrong, first.right, first.wrong];
  const finite = curves.flatMap((curve) => Array.from(curve)).filter(Number.isFinite);
  const limit = Math.ceil(Math.max(1, ...finite.map(Math.abs)));
  const scale = axes([0.5, 10.5], [-limit, limit]);
  const points = (curve) => Array.from(curve, (number, tenth) => [tenth + 1, number]);
  const about = `Mean value by tenth in step ${stepName(step)}: right responses from ${two(step.right[0])} to `
    + `${two(step.right[9])}, wrong ones from ${two(step.wrong[0])} to ${two(step.wrong[9])}`;
  const [xTicks, yTicks] = [[1, 5, 10], [-limit, 0, limit]].map((ticks) => ticks.map((tick) => [tick, String(tick)]));
  const rows = TENTHS.map((tenth) => [tenth + 1, two(step.right[tenth]), two(step.wrong[tenth])]);
  place(figure, about, [
    ...frame(scale, xTicks, yTicks, "tenth of the response"),
    line(scale, points(first.right), "right thin"), line(scale, points(first.wrong), "wrong thin"),
    line(scale, points(step.right), "right"), line(scale, points(step.wrong), "wrong"),
    drawn("text", { class: "key-right", x: BOX.left + 6, y: 20 }, "— right"),
    drawn("text", { class: "key-wrong", x: BOX.left + 60, y: 20 }, "-- wrong"),
  ], ["tenth", "right", "wrong"], rows);
}
