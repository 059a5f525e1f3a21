// Draws the view: the second half of `page.js`, which comes before it in the page.

function draw() {
  ctx.clearRect(0, 0, state.width, height());
  ctx.font = "11px system-ui, sans-serif";
  drawAxes();
  ctx.save();
  ctx.beginPath();
  ctx.rect(LEFT, 0, plotWidth(), y(data.ranks));
  ctx.clip();
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
  // Bars of less than some four pixels are averaged, not drawn.
  const dense = count > 0.25 * plotWidth() * data.ranks;
  if (dense) drawDense(rows);
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
    if (second[step] < 0) drawBox(first[step], left, top, wide, tall);
    else {
      drawBox(first[step], left, top, wide, tall / 2);
      drawBox(second[step], left, top + tall / 2, wide, tall / 2);
    }
    if (state.phases) drawPhases(step, top + tall, state.row * 0.8 * 0.3, wide);
  }
}

function drawBox(action, left, top, wide, tall) {
  bar(paint.ops[opOf(action)][shadeOf(action)], paint.hatches[opOf(action)], left, top, wide, tall);
  const text = [nameOf(action), String(microbatchOf(action))].find((t) => wide > 6.4 * t.length + 3);
  if (text && tall >= 10) label(text, left, top, wide, tall);
}

function bar(colour, pattern, left, top, wide, tall) {
  ctx.fillStyle = colour;
  ctx.fillRect(left, top, Math.max(wide, 0.5), tall);
  if (pattern && wide >= 5 && tall >= 6) {
    ctx.fillStyle = pattern;
    ctx.fillRect(left, top, wide, tall);
  }
  if (wide >= 4) {
    ctx.strokeStyle = paint.edge;
    ctx.lineWidth = 0.5;
    ctx.strokeRect(left, top, wide, tall);
  }
}

function label(text, left, top, wide, tall) {
  ctx.fillStyle = data.on_bar;
  // Of a bar that begins or ends outside, in the middle of what is seen.
  const [from, to] = [Math.max(left, LEFT), Math.min(left + wide, state.width)];
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
    const text = [`${names[name]} layer ${layer}`, names[name]].find((t) => across > 6.2 * t.length + 4);
    if (text && tall >= 10) label(text, left, top + lane * tall, across, tall);
  }
}

function shapeOf(step, layers) {
  const count = layers[stageOf(first[step])];
  if (second[step] >= 0) return `pair ${count} ${layers[stageOf(second[step])]}`;
  return opOf(first[step]) === 0 ? `F ${count} 0` : `${OPS[opOf(first[step])]} 0 ${count}`;
}

// One line of pixels a lane, in which a pixel has what runs then in their shares of its time.
function drawDense(rows) {
  const wide = canvas.width - Math.round((LEFT + 10) * canvas.width / state.width);
  const image = ctx.createImageData(wide, 2 * data.ranks);
  const scale = wide / (state.to - state.from);
  const colours = paint.ops.map((row) => row.map((text) => text.match(/\d+/g).map(Number)));
  const mix = new Float32Array(4 * wide);
  rows.forEach(([low, high], rank) => {
    for (const lane of [0, 1]) {
      mix.fill(0);
      for (let step = low; step < high; step++) {
        const action = lane && second[step] >= 0 ? second[step] : first[step];
        spread(mix, wide, (starts[step] - state.from) * scale, (ends[step] - state.from) * scale,
          colours[opOf(action)][shadeOf(action)]);
      }
      const offset = 4 * wide * (2 * rank + lane);
      for (let at = 0; at < 4 * wide; at += 4) {
        const share = mix[at + 3];
        for (let c = 0; c < 3; c++) image.data[offset + at + c] = share ? mix[at + c] / share : 0;
        image.data[offset + at + 3] = 255 * share;
      }
    }
  });
  const sheet = document.createElement("canvas");
  sheet.width = wide;
  sheet.height = 2 * data.ranks;
  sheet.getContext("2d").putImageData(image, 0, 0);
  ctx.imageSmoothingEnabled = false;
  const tall = state.row * 0.8 * (state.phases ? 0.4 : 1);
  for (let rank = 0; rank < data.ranks; rank++) {
    ctx.drawImage(sheet, 0, 2 * rank, wide, 2, LEFT, y(rank) + state.row * 0.1, plotWidth(), tall);
  }
}

function spread(mix, wide, from, to, colour) {
  from = Math.max(0, from);
  to = Math.min(wide, to);
  for (let column = Math.floor(from); column < to; column++) {
    const share = Math.min(to, column + 1) - Math.max(from, column);
    for (let c = 0; c < 3; c++) mix[4 * column + c] += share * colour[c];
    mix[4 * column + 3] += share;
  }
}

function drawFinish([rank, kind, stage, start, end]) {
  if (end < state.from || start > state.to) return;
  const left = x(start), wide = x(end) - left;
  bar(paint.finish[kind], null, left, y(rank) + state.row * 0.1, wide, state.row * 0.8);
  const text = [`${FINISH[kind]} ${stage}`, `${stage}`].find((t) => wide > 6 * t.length + 4);
  if (text && state.row >= 12) label(text, left, y(rank), wide, state.row);
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
