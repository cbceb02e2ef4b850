"use strict";
// Drawing: the histogram of scores and the curves, at the width of their boxes.

const HEIGHT = 240;
const MARGIN = { left: 48, right: 20, top: 10, bottom: 34 };
const BINS = 60;

function draw(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// A linear map from values to pixels, and back.
function scale(low, high, start, end) {
  const map = (value) => start + ((value - low) / (high - low)) * (end - start);
  map.invert = (pixel) => low + ((pixel - start) / (end - start)) * (high - low);
  return map;
}

// About `wanted` round numbers between low and high.
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
  return found;
}

function formatScore(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e5 ? value.toExponential(2) : value.toPrecision(4);
  return text.replace(/-/g, "−");
}

const formatTick = (value) => String(Number(value.toPrecision(6))).replace(/-/g, "−");
const formatCount = (value) => value.toLocaleString("en");
const formatPercent = (share) => `${(100 * share).toFixed(1)} %`;

function frame(box, words) {
  const width = Math.max(280, box.clientWidth);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": words });
  box.replaceChildren(svg);
  return { svg, left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: HEIGHT - MARGIN.bottom };
}

function axes(area, x, y, xTicks, yTicks, formatX, formatY, xTitle) {
  for (const value of yTicks) {
    const line = { x1: area.left, x2: area.right, y1: y(value), y2: y(value), stroke: "var(--line)" };
    area.svg.append(draw("line", line));
    const label = { x: area.left - 6, y: y(value) + 4, "text-anchor": "end" };
    area.svg.append(draw("text", label, formatY(value)));
  }
  for (const value of xTicks) {
    const label = { x: x(value), y: area.bottom + 15, "text-anchor": "middle" };
    area.svg.append(draw("text", label, formatX(value)));
  }
  const title = { x: area.right, y: HEIGHT - 3, "text-anchor": "end" };
  area.svg.append(draw("text", title, xTitle));
}

function legend(list, entries) {
  list.replaceChildren(
    ...entries.map(([colour, words]) => {
      const entry = document.createElement("li");
      const mark = document.createElement("i");
      mark.style.background = colour;
      entry.append(mark, words);
      return entry;
    }),
  );
}

// Counts per bin of [selected biased, selected other, biased, other]; where nothing is known, all are other.
function countBins(values, low, high, isBiased, isSelected) {
  const bins = Array.from({ length: BINS }, () => [0, 0, 0, 0]);
  for (let i = 0; i < values.length; i++) {
    const place = Math.min(BINS - 1, Math.floor(((values[i] - low) / (high - low)) * BINS));
    bins[place][(isSelected(i) ? 0 : 2) + (isBiased(i) ? 0 : 1)]++;
  }
  return bins;
}

// Returns the map from a pixel to a score, for the pointer.
function drawHistogram(box, values, low, high, threshold, isBiased, isSelected, words) {
  const area = frame(box, words);
  const bins = countBins(values, low, high, isBiased, isSelected);
  const most = Math.max(1, ...bins.map((bin) => bin[0] + bin[1] + bin[2] + bin[3]));
  const x = scale(low, high, area.left, area.right);
  const y = scale(0, most, area.bottom, area.top);
  const counts = ticks(0, most, 4).filter(Number.isInteger);
  axes(area, x, y, ticks(low, high, (area.right - area.left) / 90), counts, formatTick, formatCount, "score");
  const width = (area.right - area.left) / BINS;
  bins.forEach((bin, place) => {
    let level = 0;
    bin.forEach((count, kind) => {
      if (count === 0) return;
      const bar = { x: area.left + place * width, width: Math.max(1, width - 1), y: y(level + count) };
      bar.height = y(level) - y(level + count);
      bar.fill = kind % 2 === 0 ? "var(--series-2)" : "var(--series-3)";
      bar.opacity = kind < 2 ? 1 : 0.35;
      area.svg.append(draw("rect", bar));
      level += count;
    });
  });
  if (threshold !== null) {
    const place = Math.min(area.right, Math.max(area.left, x(threshold)));
    const line = { x1: place, x2: place, y1: area.top, y2: area.bottom, stroke: "var(--ink)", "stroke-width": 2 };
    area.svg.append(draw("line", { ...line, id: "threshold" }));
    area.svg.append(draw("circle", { cx: place, cy: area.top, r: 5, fill: "var(--ink)" }));
  }
  return x.invert;
}

// hits[n] is how many of the n highest scores are biased; `point` is the present selection.
function drawCurves(box, hits, point, words) {
  const area = frame(box, words);
  const [samples, biased] = [hits.length - 1, hits[hits.length - 1]];
  const x = scale(0, 1, area.left, area.right);
  const y = scale(0, 1, area.bottom, area.top);
  const percent = (value) => `${Math.round(100 * value)} %`;
  axes(area, x, y, [0, 0.25, 0.5, 0.75, 1], [0, 0.25, 0.5, 0.75, 1], percent, percent, "selected");
  const line = (measure, style) => {
    const steps = Math.min(samples, 400);
    const counts = Array.from({ length: steps }, (_, k) => Math.max(1, Math.round(((k + 1) * samples) / steps)));
    const points = counts.map((count) => `${x(count / samples).toFixed(1)},${y(measure(count)).toFixed(1)}`);
    area.svg.append(draw("polyline", { points: points.join(" "), fill: "none", "stroke-width": 2, ...style }));
  };
  const chance = { "stroke-dasharray": "3 5", "stroke-width": 1.5 };
  line((count) => count / samples, { ...chance, stroke: "var(--series-2)" });
  line(() => biased / samples, { ...chance, stroke: "var(--series-3)" });
  line((count) => hits[count] / biased, { stroke: "var(--series-2)" });
  line((count) => hits[count] / count, { stroke: "var(--series-3)" });
  const place = x(point.count / samples);
  const marker = { x1: place, x2: place, y1: area.top, y2: area.bottom, stroke: "var(--ink)" };
  area.svg.append(draw("line", marker));
  for (const [value, colour] of [[point.coverage, "var(--series-2)"], [point.precision, "var(--series-3)"]]) {
    if (value !== null) area.svg.append(draw("circle", { cx: place, cy: y(value), r: 5, fill: colour }));
  }
}
