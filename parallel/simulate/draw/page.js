// Draws a simulated step and lets one look around in it. `page.py` says what is in the data.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("steps");
const tip = document.getElementById("tip");
const legend = document.getElementById("legend");
const ctx = canvas.getContext("2d");
const OPS = "FBIW";
const FINISH = ["reduce", "mirror", "optimizer"];
const STATIC = ["weights", "gradients", "optimizer"];
const LEFT = 64, TOP = 24, BETWEEN = 26, MEMORY = 150, BOTTOM = 8;
const MOST_ARROWS = 4000;

// ---- what the data say, spread out into arrays by step ----

const numSteps = data.first[data.ranks];
const first = new Int32Array(numSteps).fill(-1); // the action of a step, the forward of a pair
const second = new Int32Array(numSteps).fill(-1); // the backward of a pair
const starts = new Float64Array(numSteps);
const ends = new Float64Array(numSteps);
const lastMessage = new Int32Array(numSteps).fill(-1); // the one that arrived last

for (let step = 0, at = 0; step < numSteps; step++, at++) {
  // A pair is -1 - its forward, and then its backward.
  if (data.steps[at] < 0) {
    first[step] = -1 - data.steps[at++];
    second[step] = data.steps[at];
  } else {
    first[step] = data.steps[at];
  }
}
for (let rank = 0; rank < data.ranks; rank++) {
  for (let step = data.first[rank], now = 0; step < data.first[rank + 1]; step++) {
    starts[step] = now + data.gaps[step];
    now = ends[step] = starts[step] + data.durations[step];
  }
}
const messages = data.messages.target.length;
const source = new Int32Array(messages);
const leaves = new Float64Array(messages);
const arrives = new Float64Array(messages);
for (let m = 0, step = 0; m < messages; m++) {
  step += data.messages.source[m];
  source[m] = step;
  leaves[m] = ends[step] + data.messages.queued[m];
  arrives[m] = leaves[m] + data.messages.time[m];
  const target = data.messages.target[m];
  if (lastMessage[target] < 0 || arrives[m] > arrives[lastMessage[target]]) lastMessage[target] = m;
}
const memory = data.memory.map(({ fixed, times, levels }) => {
  let time = 0, level = 0;
  return {
    fixed,
    base: fixed.reduce((a, b) => a + b, 0),
    times: Float64Array.from(times, (step) => (time += step)),
    levels: Float64Array.from(levels, (step) => (level += step) / data.level_parts),
  };
});
for (const held of memory) held.peak = held.base + held.levels.reduce((a, b) => Math.max(a, b), 0);
const highest = Math.max(...memory.map((held) => held.peak)) || 1;

const opOf = (action) => action % 4;
const stageOf = (action) => Math.floor(action / 4) % data.stages;
const microbatchOf = (action) => Math.floor(action / 4 / data.stages);
const nameOf = (action) => `${stageOf(action)}${OPS[opOf(action)]}${microbatchOf(action)}`;
const shadeOf = (action) => data.shades[data.route_of[microbatchOf(action)]][stageOf(action)];
const stepName = (step) =>
  second[step] < 0 ? nameOf(first[step]) : `(${nameOf(first[step])};${nameOf(second[step])})`;
const rankOf = (step) => upperBound(data.first, step, 0, data.ranks + 1) - 1;

// The first place from `low` to `high` whose value is more than `value`; they ascend.
function upperBound(values, value, low, high) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

// ---- the view ----

const state = {
  from: 0, to: data.makespan, width: 800, row: 20,
  rank: memory.findIndex((held) => held.peak === Math.max(...memory.map((h) => h.peak))),
  step: -1, finish: -1, cursor: null,
  critical: false, messages: false, phases: data.phases !== null,
};
let paint = null; // colours and hatches of the page as it is, light or dark
let waiting = false;

const plotWidth = () => state.width - LEFT - 10;
const x = (time) => LEFT + ((time - state.from) / (state.to - state.from)) * plotWidth();
const timeAt = (px) => state.from + ((px - LEFT) / plotWidth()) * (state.to - state.from);
const y = (rank) => TOP + rank * state.row;
const memoryTop = () => y(data.ranks) + BETWEEN;
const height = () => memoryTop() + MEMORY + BOTTOM;

function zoom(factor, at = (state.from + state.to) / 2) {
  const span = Math.min(data.makespan, Math.max(data.makespan * 1e-6, (state.to - state.from) / factor));
  const share = (at - state.from) / (state.to - state.from);
  moveTo(at - share * span, span);
}

function moveTo(from, span = state.to - state.from) {
  state.from = Math.max(0, Math.min(data.makespan - span, from));
  state.to = state.from + span;
  redraw();
}

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

function resize() {
  const ratio = window.devicePixelRatio || 1;
  state.width = Math.max(320, canvas.parentElement.clientWidth);
  const least = state.phases ? 36 : 9;
  state.row = Math.max(least, Math.min(state.phases ? 60 : 40, Math.floor(600 / data.ranks)));
  canvas.style.height = `${height()}px`;
  canvas.width = Math.round(state.width * ratio);
  canvas.height = Math.round(height() * ratio);
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  redraw();
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const shaded = (name) => data.whites.map((white) => paler(colour(name), white));
  paint = { ink: colour("ink"), faint: colour("faint"), grid: colour("grid"), paper: colour("paper"),
    critical: colour("critical"), activations: colour("activations"), edge: data.on_bar,
    ops: [...OPS].map(shaded), finish: FINISH.map(colour), fixed: STATIC.map(colour),
    hatches: [null, "/", "\\", "-"].map((kind) => kind && data.hatch.map((c) => hatch(kind, c))) };
  redraw();
}

function paler(colour, white) {
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return `rgb(${parts.map((part) => Math.round(part + (255 - part) * white)).join(",")})`;
}

function hatch(kind, colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 7;
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour;
  const lines = { "/": [[-1, 8, 8, -1], [-1, 1, 1, -1], [6, 8, 8, 6]],
    "\\": [[-1, -1, 8, 8], [6, -1, 8, 1], [-1, 6, 1, 8]], "-": [[0, 3.5, 7, 3.5]] }[kind];
  for (const [x0, y0, x1, y1] of lines) {
    pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke();
  }
  return ctx.createPattern(tile, "repeat");
}

// ---- what is under the pointer, in words ----

function shown(time) {
  return String(+(time * data.tick).toPrecision(9));
}

function withUnit(time) {
  return data.unit ? `${shown(time)} ${data.unit}` : shown(time);
}

function idleBefore(step) {
  const before = data.first[rankOf(step)] === step ? 0 : ends[step - 1];
  return starts[step] - before;
}

function describeStep(step) {
  const lines = [`${stepName(step)} on rank ${rankOf(step)}`];
  for (const action of [first[step], second[step]]) {
    if (action < 0) continue;
    const name = data.shade_names[shadeOf(action)];
    lines.push(`${data.meanings[opOf(action)]}: stage ${stageOf(action)}, micro-batch ` +
      `${microbatchOf(action)}${name ? `, ${name}` : ""}`);
  }
  lines.push(`${withUnit(starts[step])} to ${withUnit(ends[step])}: ${withUnit(ends[step] - starts[step])}`);
  const idle = idleBefore(step), m = lastMessage[step];
  if (idle > 0 && m >= 0) {
    const made = source[m], free = starts[step] - idle;
    const action = second[made] >= 0 && data.messages.member[m] ? second[made] : first[made];
    const travelling = starts[step] - Math.max(free, ends[made]);
    lines.push(`waited ${withUnit(idle)} for ${nameOf(action)} of rank ${rankOf(made)}` +
      (travelling > 0 ? `, ${withUnit(travelling)} of it under way` : ""));
  }
  return lines;
}

function describeFinish([rank, kind, stage, start, end]) {
  return [`${data.finish_meanings[kind]}, stage ${stage}, rank ${rank}`,
    `${withUnit(start)} to ${withUnit(end)}: ${withUnit(end - start)}`];
}

function describeMemory(time) {
  const unit = data.memory_unit ? ` ${data.memory_unit}` : "";
  const size = (value) => `${+value.toPrecision(6)}${unit}`;
  const totals = memory.map((held) => held.base + levelAt(held, time));
  return [`at ${withUnit(time)}`,
    `rank ${state.rank}: activations ${size(levelAt(memory[state.rank], time))}, all ${size(totals[state.rank])}`,
    `all ranks: ${size(Math.min(...totals))} to ${size(Math.max(...totals))}`];
}

function describeIdle(rank, time) {
  const [low, high] = [data.first[rank], data.first[rank + 1]];
  const next = upperBound(starts, time, low, high);
  return [`rank ${rank} is idle at ${withUnit(time)}`, ...(next < high ? describeStep(next).slice(-1) : [])];
}

function showTip(lines, px, py) {
  tip.replaceChildren(...lines.map((line, index) => {
    const element = document.createElement(index ? "div" : "strong");
    element.textContent = line;
    return element;
  }));
  tip.hidden = false;
  const beside = px + 16 + tip.offsetWidth > state.width ? px - tip.offsetWidth - 12 : px + 16;
  tip.style.left = `${Math.max(0, beside)}px`;
  tip.style.top = `${py + 14}px`;
}

function pointAt(px, py) {
  const time = timeAt(px);
  state.step = state.finish = -1;
  state.cursor = time;
  if (px < LEFT || time > state.to) {
    tip.hidden = true;
    state.cursor = null;
  } else if (py > memoryTop()) {
    showTip(describeMemory(time), px, py);
  } else if (py >= TOP && py < y(data.ranks)) {
    const rank = state.rank = Math.floor((py - TOP) / state.row);
    const step = upperBound(ends, time, data.first[rank], data.first[rank + 1]);
    if (step < data.first[rank + 1] && starts[step] <= time) state.step = step;
    else state.finish = data.finish.findIndex((f) => f[0] === rank && f[3] <= time && time < f[4]);
    if (state.step >= 0) showTip(describeStep(state.step), px, py);
    else if (state.finish >= 0) showTip(describeFinish(data.finish[state.finish]), px, py);
    else showTip(describeIdle(rank, time), px, py);
  } else {
    tip.hidden = true;
  }
  redraw();
}

// ---- pointer, wheel and keys ----

const pointers = new Map();

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  const span = state.to - state.from;
  if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
    moveTo(state.from + ((event.deltaX || event.deltaY) / plotWidth()) * span);
  } else {
    const lines = event.deltaMode === 1 ? 30 : 1;
    zoom(Math.exp((-event.deltaY * lines * (event.ctrlKey ? 6 : 1)) / 500), timeAt(event.offsetX));
  }
}, { passive: false });

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event.offsetX);
});

canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (before === undefined) {
    pointAt(event.offsetX, event.offsetY);
    return;
  }
  const other = [...pointers].find(([id]) => id !== event.pointerId);
  pointers.set(event.pointerId, event.offsetX);
  if (other) {
    const [old, now] = [Math.abs(before - other[1]), Math.abs(event.offsetX - other[1])];
    if (old > 0 && now > 0) zoom(now / old, timeAt((event.offsetX + other[1]) / 2));
  } else {
    moveTo(state.from - ((event.offsetX - before) / plotWidth()) * (state.to - state.from));
  }
});

for (const name of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
}
canvas.addEventListener("pointerleave", () => {
  tip.hidden = true;
  state.cursor = null;
  state.step = state.finish = -1;
  redraw();
});

// The step before or after the selected one, or the first of the rank that is in view.
function stepBy(by) {
  const [low, high] = [data.first[state.rank], data.first[state.rank + 1]];
  const known = state.step >= low && state.step < high;
  const step = known ? state.step + by : visible(state.rank)[0];
  if (step < low || step >= high) return;
  select(step);
}

function select(step) {
  state.step = step;
  state.finish = -1;
  state.cursor = starts[step];
  const span = state.to - state.from;
  if (starts[step] < state.from || ends[step] > state.to) moveTo((starts[step] + ends[step] - span) / 2);
  showTip(describeStep(step), Math.max(LEFT, x(starts[step])), y(rankOf(step) + 1));
  redraw();
}

function selectRank(rank) {
  state.rank = Math.max(0, Math.min(data.ranks - 1, rank));
  const time = state.step >= 0 ? starts[state.step] : state.from;
  const [low, high] = [data.first[state.rank], data.first[state.rank + 1]];
  if (low < high) select(Math.min(high - 1, upperBound(ends, time, low, high)));
  redraw();
}

const KEYS = {
  "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), _: () => zoom(1 / 1.5),
  ArrowLeft: () => moveTo(state.from - (state.to - state.from) / 8),
  ArrowRight: () => moveTo(state.from + (state.to - state.from) / 8),
  ArrowUp: () => selectRank(state.rank - 1), ArrowDown: () => selectRank(state.rank + 1),
  ",": () => stepBy(-1), ".": () => stepBy(1),
  0: () => moveTo(0, data.makespan), Home: () => moveTo(0, data.makespan),
  Escape: () => { tip.hidden = true; state.step = state.finish = -1; state.cursor = null; redraw(); },
};
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});

document.getElementById("in").onclick = () => zoom(1.5);
document.getElementById("out").onclick = () => zoom(1 / 1.5);
document.getElementById("reset").onclick = () => moveTo(0, data.makespan);
for (const name of ["critical", "messages", "phases"]) {
  const box = document.getElementById(name);
  if (!box) continue;
  box.checked = state[name];
  box.onchange = () => { state[name] = box.checked; resize(); };
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
new ResizeObserver(resize).observe(canvas.parentElement);
readColours();
resize();
