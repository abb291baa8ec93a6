"use strict";
// Draws the charts and heat maps from the JSON in #data. Text enters the page through textContent only.
const page = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const color = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
const view = { x: "epoch", smooth: 0 };
const drawn = [];

const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

const shown = (value, percent) => {
  if (value == null || Number.isNaN(value)) return "–";
  if (percent) return (100 * value).toFixed(2) + " %";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size !== 0 && size < 1e-4 ? value.toExponential(2) : String(+value.toPrecision(4));
};

// Ticks with as many decimals as their distance needs; on a logarithmic axis each has its own.
const tick = (value, step, percent, log) => {
  if (value == null) return "";
  if (log) return shown(value, percent);
  const factor = percent ? 100 : 1;
  const decimals = Math.max(0, Math.ceil(-Math.log10(step * factor) - 1e-9) + (String(step).includes("25") ? 1 : 0));
  return (factor * value).toLocaleString("en", { maximumFractionDigits: Math.min(decimals, 12) }) + (percent ? " %" : "");
};

// Exponential mean without bias at the start: m = sum s^k y_(t-k) / sum s^k. Gaps stay gaps.
const smoothed = (values, share) => {
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value == null) return value;
    sum = share * sum + value;
    weight = share * weight + 1;
    return sum / weight;
  });
};

const seriesOptions = (one, chart, faint) => {
  const stroke = one.run === null ? color("muted") : color("series-" + (one.run % 6));
  const name = [page.runs.length > 1 && one.run !== null ? page.runs[one.run] : "", one.name || ""];
  const few = one.y.length < 2;
  return {
    label: name.filter(Boolean).join(", ") || chart.title,
    stroke, alpha: faint ? 0.25 : one.name === "training" && chart.series.length > page.runs.length ? 0.75 : 1,
    width: faint ? 1 : one.dots ? 1 : 1.7,
    dash: one.run === null ? [6, 4] : undefined,
    points: { show: Boolean(one.dots) || few, size: 6, fill: stroke },
    paths: chart.stepped ? uPlot.paths.stepped({ align: 1 }) : undefined,
    value: (_, value) => shown(value, chart.percent),
    spanGaps: false,
  };
};

const tables = (chart) => {
  const lines = [], options = [];
  for (const one of chart.series) {
    const x = one.x[view.x];
    if (!x) continue;  // a published curve has epochs only
    const rows = x.map((value, index) => index).filter((index) => x[index] !== null);
    const line = (values) => [rows.map((index) => x[index]), rows.map((index) => values[index])];
    if (view.smooth > 0 && !one.dots && one.run !== null && !chart.stepped) {
      lines.push(line(one.y));
      options.push(Object.assign(seriesOptions(one, chart, true), { label: seriesOptions(one, chart).label + ", raw" }));
      lines.push(line(smoothed(one.y, view.smooth)));
    } else {
      lines.push(line(one.y));
    }
    options.push(seriesOptions(one, chart, false));
  }
  return { data: uPlot.join(lines), options };
};

const draw = (holder, chart, log) => {
  const { data, options } = tables(chart);
  const axis = { stroke: color("muted"), grid: { stroke: color("grid"), width: 1 }, ticks: { show: false } };
  const level = (u) => {
    if (chart.level == null || chart.level < u.scales.y.min || chart.level > u.scales.y.max) return;
    const y = Math.round(u.valToPos(chart.level, "y", true));
    u.ctx.save();
    u.ctx.strokeStyle = color("muted");
    u.ctx.setLineDash([2, 4]);
    u.ctx.beginPath();
    u.ctx.moveTo(u.bbox.left, y);
    u.ctx.lineTo(u.bbox.left + u.bbox.width, y);
    u.ctx.stroke();
    u.ctx.restore();
  };
  const range = chart.from_zero && !log ? (_, low, high) => [0, high > 0 ? 1.08 * high : 1] : undefined;
  return new uPlot({
    width: holder.clientWidth || 300, height: 240,
    cursor: { sync: { key: "x", setSeries: false }, drag: { x: true, y: false } },
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
    axes: [
      Object.assign({}, axis, { label: view.x === "step" ? "update" : view.x, labelSize: 20, size: 34 }),
      Object.assign({}, axis, { size: 64, values: (_, ticks, index, space, step) => ticks.map((v) => tick(v, step, chart.percent, log)) }),
    ],
    series: [{ label: view.x === "step" ? "update" : view.x, value: (_, value) => shown(value) }, ...options],
    hooks: { draw: [level] },
  }, data, holder);
};

const addChart = (chart) => {
  const figure = element("figure", "card chart");
  const caption = element("figcaption");
  caption.append(element("b", "", chart.title), element("span", "", chart.note));
  const label = element("label", "log"), box = element("input"), holder = element("div", "plot");
  box.type = "checkbox";
  label.append(box, " log");
  figure.append(label, caption, holder);
  document.getElementById("charts").append(figure);
  const entry = { holder, plot: null };
  entry.redraw = () => {
    if (entry.plot) entry.plot.destroy();
    entry.plot = draw(holder, chart, box.checked);
  };
  // A logarithmic axis has no place for zero or less: there the box is disabled.
  box.disabled = chart.series.some((one) => one.y.some((value) => value !== null && value <= 0));
  label.hidden = box.disabled;
  box.addEventListener("change", entry.redraw);
  entry.redraw();
  drawn.push(entry);
};

const addHeat = (map) => {
  const grid = element("div", "heat");
  const values = map.rows.flatMap((row) => row.values).filter((value) => value > 0).map(Math.log10);
  const low = Math.min(...values), high = Math.max(...values);
  for (const row of map.rows) {
    grid.append(element("span", "layer", row.name));
    const cells = element("div", "cells");
    row.values.forEach((value, index) => {
      const cell = element("i");
      const share = value > 0 ? (Math.log10(value) - low) / (high - low || 1) : 0;
      cell.style.background = `color-mix(in oklab, var(--heat-high) ${Math.round(100 * share)}%, var(--heat-low))`;
      cell.title = `${row.name}, epoch ${shown(map.epochs[index])}: ${shown(value)}`;
      cells.append(cell);
    });
    grid.append(cells);
  }
  const figure = element("figure", "card wide"), caption = element("figcaption");
  const scale = values.length ? `${shown(10 ** low)} (light) to ${shown(10 ** high)} (strong), logarithmic; ` : "";
  caption.append(element("b", "", map.title), element("span", "", scale + "left to right: the run; hover for a value"));
  figure.append(caption, grid);
  document.getElementById("heat").append(figure);
};

const redrawAll = () => drawn.forEach((entry) => entry.redraw());
page.charts.forEach(addChart);
page.heat.forEach(addHeat);
document.getElementById("x-axis").addEventListener("change", (event) => { view.x = event.target.value; redrawAll(); });
document.getElementById("smoothing").addEventListener("input", (event) => {
  view.smooth = Number(event.target.value);
  document.getElementById("smoothing-value").textContent = view.smooth ? view.smooth.toFixed(2) : "off";
  redrawAll();
});
new ResizeObserver(() => drawn.forEach(({ holder, plot }) => {
  if (holder.clientWidth && holder.clientWidth !== plot.width) plot.setSize({ width: holder.clientWidth, height: 240 });
})).observe(document.getElementById("charts"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
addEventListener("beforeprint", () => { root.classList.add("print"); redrawAll(); });
addEventListener("afterprint", () => { root.classList.remove("print"); redrawAll(); });
root.dataset.drawn = String(drawn.length);
