"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 24;

function mark(parent, name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  parent.appendChild(element);
  return element;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return +(value / 1e9).toPrecision(3) + "B";
  if (size >= 1e6) return +(value / 1e6).toPrecision(3) + "M";
  if (size >= 1e4) return +(value / 1e3).toPrecision(3) + "k";
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
}

function steps(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= rough * 0.999);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(12));
  return found;
}

function powers(low, high) {
  const found = [], span = high / low, multiples = span > 50 ? [1] : span > 10 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const k of multiples) found.push(k * 10 ** e);
  return found.filter(v => v >= low * 0.999 && v <= high * 1.001);
}

function showTip(event, text) {
  tip.textContent = text;
  tip.style.visibility = "visible";
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - box.width - 14 : event.clientX + 14;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, Math.min(innerHeight - box.height - 4, event.clientY + 14)) + "px";
}
const hideTip = () => { tip.style.visibility = "hidden"; };

function chart(figure, spec) {
  figure.querySelector("svg")?.remove();
  const width = Math.max(160, figure.clientWidth - 28), svg = mark(figure, "svg", { height: HEIGHT, role: "img" });
  mark(svg, "title", {}, spec.title);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const xs = spec.series.flatMap(s => s.x), all = spec.series.flatMap(s => s.y.concat(s.low || [], s.high || []));
  const values = spec.log ? all.filter(v => v > 0) : all;
  let low = Math.min(...values), high = Math.max(...values);
  const log = spec.log && values.length > 0 && high > low;
  if (!log) {
    if (low > 0 && low < 0.25 * high) low = 0;
    if (high === low) { high += Math.abs(high) * 0.1 || 1; low -= low === 0 ? 0 : Math.abs(low) * 0.1; }
  }
  const first = Math.min(...xs), last = Math.max(...xs), span = last - first || 1;
  const X = x => LEFT + (x - first) / span * (width - LEFT - RIGHT);
  const f = log ? v => Math.log(Math.max(v, low)) : v => v;
  const Y = y => HEIGHT - BOTTOM - (f(y) - f(low)) / (f(high) - f(low)) * (HEIGHT - TOP - BOTTOM);
  let ticks = log ? powers(low, high) : steps(low, high, 4);
  if (log && ticks.length < 2) ticks = [low, Math.sqrt(low * high), high];
  for (const v of ticks) {
    mark(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: Y(v), y2: Y(v) });
    mark(svg, "text", { x: LEFT - 7, y: Y(v) + 4, "text-anchor": "end" }, short(v));
  }
  for (const v of steps(first, first + span, width < 420 ? 3 : 5))
    mark(svg, "text", { x: X(v), y: HEIGHT - 5, "text-anchor": "middle" }, short(v));
  mark(svg, "text", { x: LEFT - 7, y: HEIGHT - 5, "text-anchor": "end" }, "step");
  for (const s of spec.series) {
    const colour = `var(--run-${s.run % 6})`, points = s.x.map((x, i) => `${X(x).toFixed(1)},${Y(s.y[i]).toFixed(1)}`);
    if (s.low && report.runs.length < 4) {
      const back = s.x.map((x, i) => `${X(x).toFixed(1)},${Y(s.low[i]).toFixed(1)}`).reverse();
      const up = s.x.map((x, i) => `${X(x).toFixed(1)},${Y(s.high[i]).toFixed(1)}`);
      mark(svg, "polygon", { class: "band", points: up.concat(back).join(" "), style: `fill:${colour}` });
    }
    if (s.kind === "line" && s.x.length > 1)
      mark(svg, "polyline", { class: "curve", points: points.join(" "), style: `stroke:${colour}` });
    else s.x.forEach((x, i) => mark(svg, "circle",
      { class: "dot", cx: X(x), cy: Y(s.y[i]), r: 3.8, style: `stroke:${colour}` }));
  }
  const cross = mark(svg, "line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM });
  svg.onpointermove = event => {
    const x = first + (event.clientX - svg.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT) * span;
    const near = spec.series.map(s => s.x.reduce((best, v, i) => Math.abs(v - x) < Math.abs(s.x[best] - x) ? i : best, 0));
    const at = spec.series[0].x[near[0]];
    cross.setAttribute("x1", X(at)); cross.setAttribute("x2", X(at)); cross.style.visibility = "visible";
    const rows = spec.series.map((s, k) => {
      const i = near[k], name = report.runs.length > 1 ? report.runs[s.run] + " " : "";
      const range = s.low ? ` (${short(s.low[i])} to ${short(s.high[i])})` : "";
      return s.kind === "dots" ? `${name}held-out at ${s.x[i]}: ${short(s.y[i])}` : `${name}${short(s.y[i])} ${spec.unit}${range}`;
    });
    showTip(event, [`step ${at}`, ...rows].join("\n"));
  };
  svg.onpointerleave = () => { hideTip(); cross.style.visibility = "hidden"; };
}

function cellColour(load) {
  const part = load < 1 ? 1 - load : Math.min(1, load - 1);
  return `color-mix(in oklab, var(${load < 1 ? "--cool" : "--hot"}) ${Math.round(100 * part)}%, var(--even))`;
}

function loadMap(box, steps, columns, layer) {
  box.querySelector("svg")?.remove();
  const experts = columns[0].length, width = Math.max(80, box.clientWidth), left = 22;
  const cell = Math.max(2, Math.min(13, 180 / experts)), w = (width - left) / columns.length;
  const svg = mark(box, "svg", { height: cell * experts + 2, viewBox: `0 0 ${width} ${cell * experts + 2}`, role: "img" });
  mark(svg, "title", {}, `load of layer ${layer}`);
  for (let e = 0; e < experts; e += Math.max(1, Math.ceil(11 / cell)))
    mark(svg, "text", { x: left - 6, y: cell * (e + 0.5) + 4, "text-anchor": "end", style: "font-size:10px" }, e);
  columns.forEach((loads, c) => loads.forEach((load, e) => mark(svg, "rect", {
    class: "cell", x: (left + c * w).toFixed(2), y: (e * cell).toFixed(2), width: (w + 0.3).toFixed(2),
    height: Math.max(1, cell - (cell > 5 ? 1 : 0)).toFixed(2), style: `fill:${cellColour(load)}` })));
  svg.onpointermove = event => {
    const at = svg.getBoundingClientRect(), c = Math.floor((event.clientX - at.left - left) / w);
    const e = Math.floor((event.clientY - at.top) / cell);
    if (columns[c] === undefined || columns[c][e] === undefined) return hideTip();
    const from = c > 0 ? steps[c - 1] + 1 : 1, range = from < steps[c] ? `steps ${from} to ${steps[c]}` : `step ${steps[c]}`;
    showTip(event, `layer ${layer}, expert ${e}\n${range}\n${columns[c][e].toFixed(2)} of an even share`);
  };
  svg.onpointerleave = hideTip;
}

function draw() {
  report.charts.forEach((spec, i) => chart(document.getElementById("chart-" + i), spec));
  report.loads.forEach((run, r) => run.loads.forEach((columns, layer) =>
    loadMap(document.getElementById(`load-${r}-${layer}`), run.steps, columns, layer)));
}

let drawnAt = 0;
addEventListener("resize", () => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; draw(); } });
addEventListener("scroll", hideTip, { passive: true });
draw();
