// Draws what ran on each rank and lets one look around in it. `page_data.py` says what is in the data.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("timeline");
const tip = document.getElementById("tip");
const ctx = canvas.getContext("2d");
const TOP = 22, BETWEEN = 16, RIGHT = 10, FEW = 17; // FEW ranks have the name of each row
const ROWS = { compute: "compute", communication: "comm.", exposed: "exposed", copy: "copies" };
const STRONG = 8; // colours --c0 to --c7

// ---- the data, spread out: all lanes, from above downwards ----

const lanes = [];
data.ranks.forEach((rank, number) => {
  for (const group of Object.keys(ROWS)) {
    (rank.rows[group] || []).forEach((lane, depth) => {
      const count = lane.gap.length;
      const start = new Float64Array(count), end = new Float64Array(count);
      for (let bar = 0, now = 0; bar < count; bar++) {
        start[bar] = now + lane.gap[bar];
        now = end[bar] = start[bar] + lane.time[bar];
      }
      lanes.push({ rank: number, group, depth, start, end, kernel: lane.kernel, label: lane.label,
        count: lane.count, top: 0, tall: 0 });
    });
  }
});
const lanesOf = (rank, group) => lanes.filter((lane) => lane.rank === rank && lane.group === group);
const exposedOf = data.ranks.map((_, rank) => lanesOf(rank, "exposed"));
const NAME = 0, BARE = 1, GROUP = 2, ROLE = 3, LIBRARY = 4, BLOCKS = 5, LANE = 6; // places in a kernel
const phaseOf = (label) => data.labels[label][0];
const layerOf = (label) => data.labels[label][1];

function labelText(label) {
  const layer = layerOf(label);
  return (phaseOf(label) || "no phase") + (layer === null ? "" : ` layer ${layer}`);
}

// The first place from `low` to `high` whose value is more than `value`; they ascend.
function upperBound(values, value, low = 0, high = values.length) {
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Communication is told apart by phase, computation by direction: its phases are written on it.
const communicating = [...new Set(lanes.filter((lane) => lane.group === "communication")
  .flatMap((lane) => [...new Set(lane.label)].map(phaseOf)))].filter(Boolean);
const strong = new Map(communicating.map((name, number) => [name, `c${number % STRONG}`]));
const directionOf = (name) => (/\((F|B|W)\)/.exec(name) || [0, name ? "other" : "none"])[1];

function colourName(lane, label) {
  if (lane.group === "exposed" || lane.group === "copy") return lane.group;
  const name = phaseOf(label);
  return lane.group === "communication" ? strong.get(name) || "none" : directionOf(name);
}

// ---- the view ----

const state = { from: 0, to: data.end, width: 800, height: 100, left: 96,
  lane: null, bar: -1, pinned: false, phase: null, layer: null };
let paint = {};
let waiting = false;

const plotWidth = () => Math.max(50, state.width - state.left - RIGHT);
const x = (time) => state.left + ((time - state.from) / (state.to - state.from)) * plotWidth();
const timeAt = (px) => state.from + ((px - state.left) / plotWidth()) * (state.to - state.from);

function zoom(factor, at = (state.from + state.to) / 2) {
  const span = Math.min(data.end, Math.max(50, (state.to - state.from) / factor));
  const share = (at - state.from) / (state.to - state.from);
  moveTo(at - share * span, span);
}

function moveTo(from, span = state.to - state.from) {
  state.from = Math.max(0, Math.min(data.end - span, from));
  state.to = state.from + span;
  redraw();
}

function show(start, end) {
  const margin = Math.max(200, 0.15 * (end - start));
  const span = Math.min(data.end, end - start + 2 * margin);
  moveTo(start - margin, span);
}

function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; draw(); });
}

function resize() {
  const ratio = window.devicePixelRatio || 1;
  state.width = Math.max(300, canvas.parentElement.clientWidth);
  state.left = state.width < 700 ? 66 : 108;
  const full = Math.max(9, Math.min(38, Math.floor(210 / data.ranks.length)));
  const strip = data.ranks.length < FEW ? 12 : 6;
  let y = TOP, last = 0;
  for (const lane of lanes) {
    if (lane.rank !== last) y += BETWEEN;
    last = lane.rank;
    lane.top = y;
    const several = lanesOf(lane.rank, lane.group).length > 1;
    lane.tall = lane.group === "exposed" || lane.group === "copy" ? strip
      : several && lane.depth > 0 ? Math.max(8, full * 0.6) : full;
    y += lane.tall + 1;
  }
  state.height = y + 6;
  canvas.style.height = `${state.height}px`;
  canvas.width = Math.round(state.width * ratio);
  canvas.height = Math.round(state.height * ratio);
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw(); // At once: the new size has emptied the canvas, and this frame may be shown.
}

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "ink", "faint", "grid", "exposed", "glow", "copy", "none", "wait", "F", "B",
    "W", "other", ...Array.from({ length: STRONG }, (_, number) => `c${number}`)];
  paint = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const pen = tile.getContext("2d");
  pen.strokeStyle = paint.wait;
  pen.lineWidth = 2;
  for (const [x0, y0, x1, y1] of [[-1, 7, 7, -1], [-1, 1, 1, -1], [5, 7, 7, 5]]) {
    pen.beginPath(); pen.moveTo(x0, y0); pen.lineTo(x1, y1); pen.stroke();
  }
  paint.hatch = ctx.createPattern(tile, "repeat");
  redraw();
}

// ---- what is under the pointer, in words ----

// How long which labels ran in these lanes from `start` to `end`, the most first.
function during(found, start, end) {
  const times = new Map();
  for (const lane of found) {
    for (let bar = upperBound(lane.end, start); bar < lane.end.length && lane.start[bar] < end; bar++) {
      const text = labelText(lane.label[bar]);
      const time = Math.min(end, lane.end[bar]) - Math.max(start, lane.start[bar]);
      times.set(text, (times.get(text) || 0) + time);
    }
  }
  return [...times].sort((a, b) => b[1] - a[1]);
}

function listed(times) {
  const rest = times.length > 3 ? `, ${times.length - 3} others` : "";
  return times.slice(0, 3).map(([text, time]) => `${text} ${shown(time)}`).join(", ") + rest;
}

function describe(lane, bar) {
  const [start, end, rank] = [lane.start[bar], lane.end[bar], lane.rank];
  const beside = (group) => during(lanesOf(rank, group), start, end);
  const lines = [labelText(lane.label[bar])];
  const when = `${data.ranks[rank].name}: ${shown(end - start)}, from ${shown(start)} to ${shown(end)}`;
  if (lane.group === "exposed") {
    lines[0] = `exposed: ${lines[0]}`;
    const many = lane.count[bar];
    return [...lines, when, many ? `${many} stretches drawn as one`
      : `computed next: ${labelText(lane.kernel[bar])}`, `communicates: ${listed(beside("communication"))}`];
  }
  const kernel = data.kernels[lane.kernel[bar]];
  lines.push(kernel[NAME], when);
  if (lane.count[bar]) lines.push(`${lane.count[bar]} drawn as one; the name is of the longest`);
  const kind = [kernel[LIBRARY], kernel[ROLE]].filter(Boolean).join(" ");
  const blocks = kernel[BLOCKS] === null ? "" : `${kernel[BLOCKS]} blocks`;
  lines.push([kind, blocks, kernel[LANE]].filter(Boolean).join(", "));
  if (kernel[GROUP] === "unknown") lines.push("no rule knows it: it counts as computation");
  if (lane.group === "communication") {
    const computes = beside("compute");
    lines.push(`computes beside: ${computes.length ? listed(computes) : "nothing"}`);
    const bare = beside("exposed").reduce((sum, [, time]) => sum + time, 0);
    if (bare > 0) lines.push(`exposed for ${shown(bare)}`);
  } else if (lane.group === "compute") {
    const moves = beside("communication");
    if (moves.length) lines.push(`communicates beside: ${listed(moves)}`);
  }
  return lines.filter(Boolean);
}

function showTip(lines, px, py) {
  tip.replaceChildren(...lines.map((line, index) => {
    const element = document.createElement(index ? "div" : "strong");
    element.textContent = line;
    element.className = line.startsWith("exposed") ? "is-exposed" : "kernel";
    return element;
  }));
  tip.hidden = false;
  const beside = px + 16 + tip.offsetWidth > state.width ? px - tip.offsetWidth - 12 : px + 16;
  tip.style.left = `${Math.max(0, Math.min(beside, state.width - tip.offsetWidth))}px`;
  tip.style.top = `${py + 16}px`;
}

function select(lane, bar, px, py) {
  [state.lane, state.bar] = [lane, bar];
  if (lane) showTip(describe(lane, bar), px, py);
  else tip.hidden = true;
  redraw();
}

// The bar of a lane at a time, or one that is at most two pixels away.
function barAt(lane, time) {
  const near = (2 * (state.to - state.from)) / plotWidth();
  const bar = upperBound(lane.end, time);
  if (bar < lane.end.length && lane.start[bar] <= time) return bar;
  if (bar < lane.end.length && lane.start[bar] - time <= near) return bar;
  return bar > 0 && time - lane.end[bar - 1] <= near ? bar - 1 : -1;
}

function pointAt(px, py) {
  const lane = px < state.left ? null : lanes.find((l) => py >= l.top && py <= l.top + l.tall);
  const bar = lane ? barAt(lane, timeAt(px)) : -1;
  if (bar >= 0) select(lane, bar, px, py);
  else select(null, -1);
}

// ---- pointer, wheel and keys ----

const pointers = new Map();
let pressed = null;

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
  pressed = event.offsetX;
});

canvas.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId);
  if (before === undefined) {
    if (!state.pinned) pointAt(event.offsetX, event.offsetY);
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

canvas.addEventListener("pointerup", (event) => {
  pointers.delete(event.pointerId);
  if (Math.abs(event.offsetX - pressed) > 3) return;
  pointAt(event.offsetX, event.offsetY);
  state.pinned = state.lane !== null;
});
canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
canvas.addEventListener("pointerleave", () => { if (!state.pinned) select(null, -1); });
canvas.addEventListener("dblclick", () => {
  if (state.lane) show(state.lane.start[state.bar], state.lane.end[state.bar]);
});

function selectBar(lane, bar) {
  const [start, end] = [lane.start[bar], lane.end[bar]], span = state.to - state.from;
  if (start < state.from || end > state.to) moveTo((start + end - span) / 2);
  state.pinned = true;
  select(lane, bar, Math.max(state.left, x(start)), lane.top + lane.tall);
}

function stepBy(by) {
  const lane = state.lane || lanes[0];
  if (!lane) return;
  const bar = state.lane ? state.bar + by : visible(lane)[0];
  if (bar >= 0 && bar < lane.end.length) selectBar(lane, bar);
}

function stepRow(by) {
  const at = state.lane ? lanes.indexOf(state.lane) + by : 0;
  const time = state.lane ? state.lane.start[state.bar] : state.from;
  if (at < 0 || at >= lanes.length) return;
  selectBar(lanes[at], Math.min(lanes[at].end.length - 1, upperBound(lanes[at].end, time)));
}

// The exposed stretch after or before what is selected, or else the first or last in view.
function stepExposed(by) {
  const rank = state.lane ? state.lane.rank : 0;
  const lane = exposedOf[rank][0];
  if (!lane) return;
  const time = state.lane ? state.lane.start[state.bar] : by > 0 ? state.from - 1 : state.to;
  const next = upperBound(lane.start, time) + (by > 0 ? 0 : -1);
  const bar = state.lane === lane ? state.bar + by : next;
  if (bar < 0 || bar >= lane.end.length) return;
  const [start, end] = [lane.start[bar], lane.end[bar]];
  if (end - start < 0.01 * (state.to - state.from)) show(start - 5 * (end - start), end + 5 * (end - start));
  selectBar(lane, bar);
}

function showAll() {
  [state.phase, state.layer, state.pinned] = [null, null, false];
  mark(null);
  select(null, -1);
  moveTo(0, data.end);
}

const KEYS = {
  "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), _: () => zoom(1 / 1.5),
  ArrowLeft: () => moveTo(state.from - (state.to - state.from) / 8),
  ArrowRight: () => moveTo(state.from + (state.to - state.from) / 8),
  ArrowUp: () => stepRow(-1), ArrowDown: () => stepRow(1),
  ",": () => stepBy(-1), ".": () => stepBy(1), n: () => stepExposed(1), p: () => stepExposed(-1),
  0: showAll, Home: showAll,
  Enter: () => { if (state.lane) show(state.lane.start[state.bar], state.lane.end[state.bar]); },
  Escape: () => { state.pinned = false; state.phase = state.layer = null; mark(null); select(null, -1); },
};
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.getElementById("in").onclick = () => zoom(1.5);
document.getElementById("out").onclick = () => zoom(1 / 1.5);
document.getElementById("reset").onclick = showAll;
document.getElementById("next").onclick = () => stepExposed(1);
document.getElementById("previous").onclick = () => stepExposed(-1);
