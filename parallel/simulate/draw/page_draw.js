// Draws the view: the second half of `page.js`, which comes before it in the page.

function draw() {
  ctx.clearRect(0, 0, state.width, height());
  ctx.font = "11px system-ui, sans-serif";
  drawAxes();
  ctx.save();
  ctx.beginPath();
  ctx.rect(LEFT, 0, plotWidth(), y(data.ranks));
  ctx.clip();
  ctx.font = "10px system-ui, sans-serif";
  drawRows();
  for (const part of data.finish) drawFinish(part);
  if (state.messages) drawMessages();
  if (state.critical) drawCritical();
  drawSelected();
  ctx.restore();
  drawMemory();
  drawCursor();
}

function drawAxes() {
  ctx.fillStyle = paint.ink;
  ctx.textBaseline = "middle";
  ctx.textAlign = "right";
  const every = Math.ceil(12 / state.row);
  for (let rank = 0; rank < data.ranks; rank++) {
    if (rank === state.rank) ctx.font = "bold 11px system-ui, sans-serif";
    if (rank === state.rank || (rank % every === 0 && Math.abs(rank - state.rank) >= every)) {
      ctx.fillText(`rank ${rank}`, LEFT - 8, y(rank) + state.row / 2);
    }
    ctx.font = "11px system-ui, sans-serif";
  }
  ctx.textAlign = "center";
  ctx.strokeStyle = paint.grid;
  ctx.lineWidth = 1;
  const step = niceStep((state.to - state.from) / Math.max(2, plotWidth() / 90));
  for (let n = Math.ceil(state.from / step); n * step <= state.to; n++) {
    const at = Math.round(x(n * step)) + 0.5;
    ctx.fillText(shown(n * step), at, 10);
    ctx.beginPath(); ctx.moveTo(at, TOP - 5); ctx.lineTo(at, memoryTop() + MEMORY); ctx.stroke();
  }
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least) || 10 * power;
}

function visible(rank) {
  const [low, high] = [data.first[rank], data.first[rank + 1]];
  return [upperBound(ends, state.from, low, high), upperBound(starts, state.to, low, high)];
}

function drawRows() {
  const rows = Array.from({ length: data.ranks }, (_, rank) => visible(rank));
  const count = rows.reduce((sum, [low, high]) => sum + high - low, 0);
  // Bars of less than some four pixels are stacked, not drawn.
  const stacked = count > 0.25 * plotWidth() * data.ranks;
  legend.classList.toggle("stacked", stacked);
  if (stacked) rows.forEach((_, rank) => drawStacks(rank));
  else rows.forEach(([low, high], rank) => drawRow(rank, low, high));
}

function drawRow(rank, low, high) {
  const lanes = state.phases ? 0.4 : 1;
  const top = y(rank) + state.row * 0.1, tall = state.row * 0.8 * lanes;
  let last = -1;
  for (let step = low; step < high; step++) {
    const left = x(starts[step]), wide = x(ends[step]) - left;
    if (wide < 1 && Math.floor(left) === last) continue;
    last = Math.floor(left);
    const lane = second[step] < 0 ? tall : tall / 2;
    drawBox(step, first[step], left, top, wide, lane);
    if (second[step] >= 0) drawBox(step, second[step], left, top + lane, wide, lane);
    if (state.phases) drawPhases(step, top + tall, state.row * 0.8 * 0.3, wide);
  }
}

function drawBox(step, action, left, top, wide, tall) {
  const op = opOf(action), shade = shadeOf(action);
  bar(paint.ops[op][shade], paint.hatches[op] && paint.hatches[op][shade], left, top, wide, tall);
  const micro = DIGITS(data.microbatches), full = `${DIGITS(data.stages)}W${micro}`;
  if (formOf(narrowest, full)) label(nameOf(action), full, left, top, wide, tall);
  else if (formOf(narrow[classOf(step)], micro)) label(String(microbatchOf(action)), micro, left, top, wide, tall);
}

// ---- labels ----
// All steps have one form of label at a time; a class of bars has it if its widest label fits, or
// none of them has one.

const DIGITS = (count) => "8".repeat(String(count - 1).length);
const lengths = new Map();

function lengthOf(text) {
  if (!lengths.has(text)) lengths.set(text, ctx.measureText(text).width + 2);
  return lengths.get(text);
}

// The first of `forms`, each the widest label of its kind, that fits into a bar of `time`.
function formOf(time, ...forms) {
  const wide = (time / (state.to - state.from)) * plotWidth();
  return forms.find((form) => lengthOf(form) <= wide);
}

function classOf(step) {
  return second[step] < 0 ? opOf(first[step]) : OPS.length;
}

// Per class of steps, a time that nine of ten have; the same of phases and of what follows a row.
const narrow = Array.from({ length: OPS.length + 1 }, () => []);
for (let step = 0; step < numSteps; step++) {
  if (ends[step] > starts[step]) narrow[classOf(step)].push(ends[step] - starts[step]);
}
narrow.forEach((times, of) => { narrow[of] = tenth(times); });
const narrowest = Math.min(...narrow.filter((time) => time > 0));
const narrowPhases = data.phases && data.phases.names.map((_, name) => tenth(
  Object.values(data.phases.shapes).flat().filter((p) => p[0] === name).map((p) => p[4] - p[3])));
const narrowFinish = FINISH.map((_, kind) => tenth(
  data.finish.filter((f) => f[1] === kind).map((f) => f[4] - f[3])));

function tenth(times) {
  return Float64Array.from(times).sort()[Math.floor(times.length / 10)];
}

function bar(colour, pattern, left, top, wide, tall) {
  ctx.fillStyle = colour;
  ctx.fillRect(left, top, Math.max(wide, 0.5), tall);
  if (pattern && wide >= 2.5 && tall >= 5) {
    ctx.fillStyle = pattern;
    ctx.fillRect(left, top, wide, tall);
  }
  if (wide >= 2.5) {
    ctx.strokeStyle = paint.edge;
    ctx.lineWidth = 0.5;
    ctx.strokeRect(left, top, wide, tall);
  }
}

// `widest` is the widest label of the form that `text` has.
function label(text, widest, left, top, wide, tall) {
  // Of a bar that begins or ends outside, in the middle of what is seen.
  const [from, to] = [Math.max(left, LEFT), Math.min(left + wide, LEFT + plotWidth())];
  if (tall < 10 || lengthOf(widest) > to - from) return;
  ctx.fillStyle = data.on_bar;
  ctx.fillText(text, (from + to) / 2, top + tall / 2 + 0.5);
}

function drawPhases(step, top, tall, wide) {
  const { layers, shapes, names } = data.phases;
  const shape = shapes[shapeOf(step, layers)];
  if (wide < 8) return;
  for (const [name, layer, lane, start, end] of shape) {
    const from = starts[step] + start;
    if (starts[step] + end < state.from || from > state.to) continue;
    const left = x(from), across = x(starts[step] + end) - left;
    const isWeight = names[name].endsWith("(W)"), isForward = names[name].endsWith("(F)");
    const op = isForward ? 0 : isWeight ? 3 : second[step] < 0 && opOf(first[step]) === 2 ? 2 : 1;
    bar(paint.ops[op][lane ? paint.ops[op].length - 1 : 0], null, left, top + lane * tall, across, tall);
    const full = `${names[name]} layer ${DIGITS(Math.max(...layers))}`;
    const form = formOf(narrowPhases[name], full, names[name]);
    const text = form === full ? `${names[name]} layer ${layer}` : names[name];
    if (form) label(text, form, left, top + lane * tall, across, tall);
  }
}

function shapeOf(step, layers) {
  const count = layers[stageOf(first[step])];
  if (second[step] >= 0) return `pair ${count} ${layers[stageOf(second[step])]}`;
  return opOf(first[step]) === 0 ? `F ${count} 0` : `${OPS[opOf(first[step])]} 0 ${count}`;
}

// Columns that stack the shares of their time: F from above, the others from below. A mix of their
// colours would be the colour of none. Columns stay where they are in time when the view moves.
const COLUMN = 8; // pixels, or up to twice as much
const STACK = [3, 2, 1]; // of OPS

function drawStacks(rank) {
  const least = (COLUMN / plotWidth()) * (state.to - state.from);
  const width = data.makespan / 2 ** Math.floor(Math.log2(data.makespan / least));
  const from = Math.floor(state.from / width), columns = Math.ceil(state.to / width) - from;
  const share = new Float64Array(OPS.length * columns);
  const add = (op, start, end, weight) => {
    start = Math.max(0, start / width - from);
    end = Math.min(columns, end / width - from);
    for (let column = Math.floor(start); column < end; column++) {
      share[OPS.length * column + op] += weight * (Math.min(end, column + 1) - Math.max(start, column));
    }
  };
  // Also of what is outside of the view, in the columns at its ends.
  const low = upperBound(ends, from * width, data.first[rank], data.first[rank + 1]);
  for (let step = low; step < data.first[rank + 1] && starts[step] < (from + columns) * width; step++) {
    const weight = second[step] < 0 ? 1 : 0.5;
    add(opOf(first[step]), starts[step], ends[step], weight);
    if (second[step] >= 0) add(opOf(second[step]), starts[step], ends[step], weight);
  }
  const ratio = canvas.width / state.width, snap = (at) => Math.round(at * ratio) / ratio;
  const top = snap(y(rank) + state.row * 0.1), tall = snap(state.row * 0.8 * (state.phases ? 0.4 : 1));
  for (let column = 0; column < columns; column++) {
    const left = snap(x((from + column) * width));
    const wide = snap(x((from + column + 1) * width)) - left;
    let sum = 0, floor = top + tall;
    for (const op of STACK) {
      sum += share[OPS.length * column + op];
      const upto = snap(top + tall * (1 - sum));
      ctx.fillStyle = paint.ops[op][0];
      ctx.fillRect(left, upto, wide, floor - upto);
      floor = upto;
    }
    ctx.fillStyle = paint.ops[0][0];
    ctx.fillRect(left, top, wide, floor - snap(top + tall * (1 - sum - share[OPS.length * column])));
  }
}

function drawFinish([rank, kind, stage, start, end]) {
  if (end < state.from || start > state.to) return;
  const left = x(start), wide = x(end) - left;
  bar(paint.finish[kind], null, left, y(rank) + state.row * 0.1, wide, state.row * 0.8);
  const number = DIGITS(data.stages), full = `${FINISH[kind]} ${number}`;
  const form = formOf(narrowFinish[kind], full, number);
  const text = form === full ? `${FINISH[kind]} ${stage}` : String(stage);
  if (form) label(text, form, left, y(rank), wide, state.row);
}

function messageLine(m) {
  const to = data.messages.target[m];
  return [x(ends[source[m]]), y(rankOf(source[m]) + 0.5), x(arrives[m]), y(rankOf(to) + 0.5)];
}

function drawMessages() {
  const seen = [];
  for (let m = 0; m < messages && seen.length <= MOST_ARROWS; m++) {
    if (arrives[m] >= state.from && ends[source[m]] <= state.to) seen.push(m);
  }
  if (seen.length > MOST_ARROWS) {
    note("messages: zoom in until there are fewer than 4000");
    return;
  }
  ctx.strokeStyle = ctx.fillStyle = paint.ink;
  ctx.lineWidth = 1;
  for (const m of seen) arrow(...messageLine(m));
}

function note(text) {
  ctx.fillStyle = paint.paper;
  ctx.fillRect(LEFT, TOP, plotWidth(), 18);
  ctx.fillStyle = paint.ink;
  ctx.fillText(text, LEFT + plotWidth() / 2, TOP + 9);
}

function arrow(x0, y0, x1, y1) {
  const angle = Math.atan2(y1 - y0, x1 - x0);
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
  ctx.beginPath();
  ctx.moveTo(x1, y1);
  for (const turn of [-0.4, 0.4]) {
    ctx.lineTo(x1 - 6 * Math.cos(angle + turn), y1 - 6 * Math.sin(angle + turn));
  }
  ctx.fill();
}

function drawCritical() {
  ctx.strokeStyle = ctx.fillStyle = paint.critical;
  ctx.lineWidth = 2.5;
  for (const [rank, start, end] of data.critical.rows) {
    if (end < state.from || start > state.to) continue;
    ctx.strokeRect(x(start), y(rank) + state.row * 0.1, x(end) - x(start), state.row * 0.8);
  }
  for (const [from, to, start, end] of data.critical.messages) {
    if (end >= state.from && start <= state.to) arrow(x(start), y(from + 0.5), x(end), y(to + 0.5));
  }
}

function drawSelected() {
  const part = data.finish[state.finish];
  if (state.step < 0 && !part) return;
  const [rank, start, end] = part ? [part[0], part[3], part[4]]
    : [rankOf(state.step), starts[state.step], ends[state.step]];
  ctx.strokeStyle = ctx.fillStyle = paint.ink;
  ctx.lineWidth = 2;
  ctx.strokeRect(x(start), y(rank) + state.row * 0.1, Math.max(1, x(end) - x(start)), state.row * 0.8);
  if (!part && idleBefore(state.step) > 0 && lastMessage[state.step] >= 0) {
    arrow(...messageLine(lastMessage[state.step]));
  }
}

// ---- memory ----

function levelAt(held, time) {
  return held.levels[Math.max(0, upperBound(held.times, time, 0, held.times.length) - 1)];
}

// The most and the least that `held` has in each pixel of the view, over what `most` and `least` say.
function extremes(held, most, least) {
  const columns = most.length, scale = columns / (state.to - state.from);
  let at = Math.max(0, upperBound(held.times, state.from, 0, held.times.length) - 1);
  for (; at < held.times.length && held.times[at] <= state.to; at++) {
    const next = at + 1 < held.times.length ? held.times[at + 1] : data.makespan;
    const from = Math.max(0, Math.floor((held.times[at] - state.from) * scale));
    const to = Math.min(columns - 1, Math.floor((next - state.from) * scale));
    const total = held.base + held.levels[at];
    for (let column = from; column <= to; column++) {
      if (total > most[column]) most[column] = total;
      if (total < least[column]) least[column] = total;
    }
  }
}

function drawMemory() {
  const top = memoryTop(), floor = top + MEMORY, scale = (MEMORY - 14) / highest;
  const columns = Math.floor(plotWidth());
  const held = memory[state.rank];
  let level = 0;
  held.fixed.forEach((size, index) => {
    ctx.fillStyle = paint.fixed[index];
    ctx.fillRect(LEFT, floor - (level + size) * scale, columns, size * scale);
    level += size;
  });
  const most = new Float64Array(columns).fill(-1), least = new Float64Array(columns).fill(Infinity);
  extremes(held, most, least);
  ctx.fillStyle = paint.activations;
  for (let column = 0; column < columns; column++) {
    ctx.fillRect(LEFT + column, floor - most[column] * scale, 1, (most[column] - held.base) * scale);
  }
  for (const other of memory) extremes(other, most, least);
  ctx.strokeStyle = paint.ink;
  ctx.lineWidth = 1;
  for (const [values, dashes] of [[most, [4, 3]], [least, [1, 3]]]) {
    ctx.setLineDash(dashes);
    ctx.beginPath();
    values.forEach((value, column) => ctx.lineTo(LEFT + column, floor - value * scale));
    ctx.stroke();
  }
  ctx.setLineDash([]);
  ctx.strokeStyle = paint.faint;
  ctx.strokeRect(LEFT, floor, columns, 0);
  ctx.fillStyle = paint.ink;
  ctx.textAlign = "right";
  ctx.fillText(`${+highest.toPrecision(4)}`, LEFT - 8, floor - highest * scale);
  ctx.fillText("0", LEFT - 8, floor);
  ctx.textAlign = "left";
  const unit = data.memory_unit ? ` (${data.memory_unit})` : "";
  ctx.fillText(`memory of rank ${state.rank}${unit}; dashed: the most of any rank, dotted: the least`,
    LEFT, top - 10);
  ctx.textAlign = "center";
}

function drawCursor() {
  if (state.cursor === null || state.cursor < state.from || state.cursor > state.to) return;
  ctx.strokeStyle = paint.faint;
  ctx.lineWidth = 1;
  const at = Math.round(x(state.cursor)) + 0.5;
  ctx.beginPath(); ctx.moveTo(at, TOP); ctx.lineTo(at, memoryTop() + MEMORY); ctx.stroke();
}
