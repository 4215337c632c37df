"use strict";
// Charts of lines over steps, in SVG: bands, limits, legends that switch lines, a cursor for mouse and keyboard.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** A number as a person reads it: about four digits. */
function shown(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 10000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** Round numbers in [low, high], about `count` of them, and their distance; `whole`: integers alone. */
function ticks(low, high, count, whole) {
  const raw = Math.max(whole ? 1 : 0, (high - low) / Math.max(1, count));
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = (whole ? [1, 2, 5, 10] : [1, 2, 2.5, 5, 10]).map((each) => each * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step + 0 || 0);
  return [found, step];
}

function tickText(value, step) {
  const size = Math.max(Math.abs(value), step);
  if (Math.abs(value) < step * 1e-6) return "0";
  if (size >= 1e6 || step < 1e-5) return value.toExponential(1);
  if (size >= 10000) return `${Number((value / 1000).toFixed(1))}k`;
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (Number.isInteger(step * 4) && !Number.isInteger(step * 2) ? 1 : 0));
  return value.toFixed(Math.min(6, /25/.test(step.toPrecision(2)) ? digits + 1 : digits));
}

/** Mean of neighbours on both sides, whose weights fall exponentially: it does not lag behind. Gaps stay gaps. */
function smoothed(values, weight) {
  const pass = (from) => {
    let sum = 0, norm = 0;
    return from.map((value) => {
      const before = [sum, norm];
      sum = weight * (sum + (value === null ? 0 : value));
      norm = weight * (norm + (value === null ? 0 : 1));
      return before;
    });
  };
  const past = pass(values), future = pass([...values].reverse()).reverse();
  return values.map((value, i) => value === null ? null : (past[i][0] + value + future[i][0]) / (past[i][1] + 1 + future[i][1]));
}

function path(points) {
  let text = "", open = false;
  for (const point of points) {
    if (point === null) { open = false; continue; }
    text += `${open ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
    open = true;
  }
  return text;
}

class Chart {
  /** lines: {name, color, dash, training, steps, values, low, high}; limits: {value, color}. */
  constructor(spec, lines, limits) {
    Object.assign(this, { spec, lines, limits, off: new Set(), log: false, wide: false, smoothing: 0, at: null });
    this.svg = svg("svg", { role: "img", tabindex: "0" });
    this.tip = el("div", { class: "tip", hidden: "" });
    this.legend = el("div", { class: "legend" });
    const acts = el("span", { class: "acts" });
    const positive = lines.flatMap((line) => line.values).filter((value) => value !== null);
    if (positive.length && Math.min(...bounds(positive)) > 0 && Math.max(...bounds(positive)) / Math.min(...bounds(positive)) > 20)
      acts.append(this.switch("log", "logarithmic", (on) => { this.log = on; }));
    acts.append(this.switch("wide", "large", (on) => { this.node.classList.toggle("wide", on); }));
    this.node = el("figure", { class: "chart", "data-chart": spec.key },
      el("figcaption", {}, el("span", {}, spec.title), el("span", { class: "unit" }, spec.unit || ""), acts),
      spec.about ? el("p", { class: "why" }, spec.about) : null, this.svg, this.legend, this.tip);
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (event) => this.key(event));
    for (const line of lines) this.legend.append(this.entry(line));
  }

  switch(name, label, act) {
    const button = el("button", { type: "button", "aria-pressed": "false", title: label, "aria-label": `${this.spec.title}: ${label}` }, name);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", on);
      act(on);
      this.draw();
    });
    return button;
  }

  entry(line) {
    const mark = svg("svg", { viewBox: "0 0 20 10", "aria-hidden": "true" });
    svg("line", { x1: 0, x2: 20, y1: 5, y2: 5, stroke: line.color, "stroke-width": 2.5, "stroke-dasharray": line.dash || "none" }, mark);
    if (line.low) svg("rect", { x: 0, y: 1, width: 20, height: 8, fill: line.color, opacity: 0.18 }, mark);
    const last = [...line.values].reverse().find((value) => value !== null);
    const each = line.each > 1 ? ` (means of ${line.each})` : "";
    const button = el("button", { type: "button", "aria-pressed": "true", title: line.tag }, mark, `${line.name}${each} `, el("b", {}, shown(last)));
    button.addEventListener("click", () => {
      if (this.off.has(line)) this.off.delete(line); else this.off.add(line);
      button.setAttribute("aria-pressed", !this.off.has(line));
      this.draw();
    });
    return button;
  }

  /** Smoothing of a line: its weight, 0 for none. */
  weight(line) {
    const window = this.smoothing * line.values.length / 100;
    return line.training && line.values.length > 40 && window > 0 ? 1 - 1 / Math.max(2, window) : 0;
  }

  draw() {
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (!width) return;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const on = this.lines.filter((line) => !this.off.has(line));
    const steps = bounds(on.flatMap((line) => [line.steps[0], line.steps.at(-1)]));
    const values = bounds(on.flatMap((line) => [...line.values, ...(line.low || []), ...(line.high || [])]));
    if (!values.length) {
      svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg).textContent = on.length ? "no finite value" : "all lines are off";
      this.svg.setAttribute("aria-label", `${this.spec.title}: nothing to draw`);
      return;
    }
    this.scale(steps, values, width, height);
    this.axes(width, height);
    for (const limit of this.limits) this.limit(limit, width);
    for (const line of on) this.line(line);
    this.cursor = svg("g", {}, this.svg);
    const told = on.map((line) => `${line.name} ${shown([...line.values].reverse().find((value) => value !== null))}`);
    this.svg.setAttribute("aria-label", `${this.spec.title} over steps ${steps[0]} to ${steps.at(-1)}; last: ${told.join(", ")}. Arrow keys read values.`);
    if (this.at !== null) this.show(this.at);
  }

  scale(steps, values, width, height) {
    let [low, high] = [values[0], values.at(-1)];
    const room = high - low || Math.abs(high) || 1;
    for (const { value } of this.limits) if (value > low - room * 0.8 && value < high + room * 0.8) { low = Math.min(low, value); high = Math.max(high, value); }
    this.log = this.log && low > 0;
    if (low === 0 && high === 0) high = 1;
    if (low === high) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
    const pad = (high - low) * 0.06;
    if (!this.log) { low = low >= 0 && low - pad < 0 ? 0 : low - pad; high += pad; }
    const [first, last] = steps[0] === steps.at(-1) ? [steps[0] - 1, steps[0] + 1] : [steps[0], steps.at(-1)];
    const f = this.log ? Math.log10 : (value) => value;
    this.range = [low, high];
    this.yTicks = this.log ? logTicks(low, high) : ticks(low, high, Math.max(3, height / 48));
    this.left = 12 + 6.2 * Math.max(...this.yTicks[0].map((value) => this.yText(value).length));
    this.x = (step) => this.left + (step - first) / (last - first) * (width - this.left - 12);
    this.y = (value) => height - 24 - (f(value) - f(low)) / (f(high) - f(low)) * (height - 34);
    this.xTicks = ticks(first, last, Math.max(2, (width - this.left) / 70), true);
  }

  yText(value) { return this.log ? shown(value) : tickText(value, this.yTicks[1]); }

  axes(width, height) {
    for (const value of this.yTicks[0]) {
      svg("line", { class: "grid", x1: this.left, x2: width - 12, y1: this.y(value), y2: this.y(value) }, this.svg);
      svg("text", { x: this.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, this.svg).textContent = this.yText(value);
    }
    svg("line", { class: "axis", x1: this.left, x2: width - 12, y1: height - 24, y2: height - 24 }, this.svg);
    for (const step of this.xTicks[0]) {
      svg("line", { class: "axis", x1: this.x(step), x2: this.x(step), y1: height - 24, y2: height - 20 }, this.svg);
      const end = this.x(step) > width - 34 ? "end" : "middle";
      svg("text", { x: end === "end" ? width - 8 : this.x(step), y: height - 8, "text-anchor": end }, this.svg).textContent = step.toLocaleString("en");
    }
  }

  limit({ value, color }, width) {
    if (value < this.range[0] || value > this.range[1]) return;
    const style = color ? `stroke:${color}` : "";
    svg("line", { class: "limit", style, x1: this.left, x2: width - 12, y1: this.y(value), y2: this.y(value) }, this.svg);
    const above = this.y(value) > 22 ? -4 : 12;
    svg("text", { class: "limit-name", x: this.left + 4, y: this.y(value) + above }, this.svg).textContent = `limit ${shown(value)}`;
  }

  line(line) {
    const at = (values) => line.steps.map((step, i) => values[i] === null || (this.log && values[i] <= 0) ? null : [this.x(step), this.y(values[i])]);
    if (line.low) {
      const lows = at(line.low.map((value) => value === null ? null : this.log ? Math.max(value, this.range[0]) : value)), highs = at(line.high);
      const both = lows.map((point, i) => point && highs[i]).map(Boolean);
      const upper = highs.filter((_, i) => both[i]), lower = lows.filter((_, i) => both[i]).reverse();
      if (upper.length > 1) svg("path", { d: path([...upper, ...lower]) + "Z", fill: line.color, opacity: 0.15 }, this.svg);
      if (upper.length === 1) svg("line", { x1: upper[0][0], x2: upper[0][0], y1: upper[0][1], y2: lower[0][1], stroke: line.color, "stroke-width": 6, opacity: 0.25 }, this.svg);
    }
    const weight = this.weight(line), points = at(line.values);
    const style = { fill: "none", stroke: line.color, "stroke-linejoin": "round", "stroke-dasharray": line.dash || "none" };
    if (weight) svg("path", { ...style, d: path(points), "stroke-width": 1, opacity: this.lines.length > 2 ? 0.14 : 0.28 }, this.svg);
    svg("path", { ...style, d: path(weight ? at(smoothed(line.values, weight)) : points), "stroke-width": 1.8 }, this.svg);
    const real = points.filter(Boolean);
    if (real.length <= 40) for (const [x, y] of real) svg("circle", { cx: x, cy: y, r: real.length === 1 ? 3.5 : 2.4, fill: line.color }, this.svg);
    line.values.forEach((value, i) => {
      if (value === null) svg("text", { x: this.x(line.steps[i]), y: 12, "text-anchor": "middle", style: `fill:${line.color}` }, this.svg).textContent = "×";
    });
  }

  steps() {
    return [...new Set(this.lines.filter((line) => !this.off.has(line)).flatMap((line) => line.steps))].sort((a, b) => a - b);
  }

  point(x) {
    if (!this.x) return;
    let best = null;
    for (const step of this.steps()) if (best === null || Math.abs(this.x(step) - x) < Math.abs(this.x(best) - x)) best = step;
    if (best !== null) this.show(best);
  }

  key(event) {
    const steps = this.steps(), move = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") return this.leave();
    if (move === undefined || !steps.length || !this.x) return;
    event.preventDefault();
    const place = this.at === null ? (move < 0 ? steps.length : -1) : steps.indexOf(this.at);
    this.show(steps[Math.min(steps.length - 1, Math.max(0, place + move))]);
  }

  show(step) {
    this.at = step;
    this.cursor.replaceChildren();
    const x = this.x(step), height = this.svg.clientHeight;
    svg("line", { class: "cursor", x1: x, x2: x, y1: 4, y2: height - 24 }, this.cursor);
    this.tip.replaceChildren(el("span", { class: "quiet" }, `step ${step.toLocaleString("en")}`));
    for (const line of this.lines.filter((each) => !this.off.has(each))) {
      const i = line.steps.indexOf(step);
      if (i < 0) continue;
      const value = line.values[i];
      if (value !== null) svg("circle", { cx: x, cy: this.y(value), r: 4, fill: line.color }, this.cursor);
      const band = line.low && line.low[i] !== null ? ` (${shown(line.low[i])} to ${shown(line.high[i])})` : "";
      this.tip.append(el("div", {}, el("i", { style: `background:${line.color}` }), line.name, el("b", {}, value === null ? "not finite" : shown(value) + band)));
    }
    this.tip.hidden = false;
    const room = this.node.clientWidth - this.tip.offsetWidth - 8, left = this.svg.offsetLeft || 0;
    this.tip.style.left = `${Math.max(4, Math.min(room, x + left + 14 > room ? x + left - this.tip.offsetWidth + 2 : x + left + 24))}px`;
    this.tip.style.top = `${this.svg.getBoundingClientRect().top - this.node.getBoundingClientRect().top + 6}px`;
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    if (this.cursor) this.cursor.replaceChildren();
  }
}

/** The smallest and the largest, in this order; nothing of nothing. */
function bounds(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (value !== null && value !== undefined) { if (value < low) low = value; if (value > high) high = value; }
  return low <= high ? [low, high] : [];
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.ceil(Math.log10(low) - 1e-9); 10 ** power <= high * 1.0001; power++) found.push(10 ** power);
  return [found.length >= 2 ? found : [low, high], 1];
}
