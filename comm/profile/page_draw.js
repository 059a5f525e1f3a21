// Draws the view: `page.js` comes before it in the page, `page_tables.js` after it.

function draw() {
  ctx.clearRect(0, 0, state.width, state.height);
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  drawAxes();
  ctx.save();
  ctx.beginPath();
  ctx.rect(state.left, 0, plotWidth(), state.height);
  ctx.clip();
  data.ranks.forEach((_, rank) => drawGlow(rank));
  for (const lane of lanes) drawLane(lane);
  drawSelected();
  ctx.restore();
  document.getElementById("where").textContent =
    `${shown(state.from)} to ${shown(state.to)}: ${shown(state.to - state.from)}`;
}

function shown(ns) {
  const [size, unit] = Math.abs(ns) < 1e3 ? [1, "ns"] : Math.abs(ns) < 1e6 ? [1e3, "µs"] : [1e6, "ms"];
  return `${+(ns / size).toFixed(3)} ${unit}`;
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n >= least) || 10 * power;
}

function drawAxes() {
  const step = niceStep((state.to - state.from) / Math.max(2, plotWidth() / 100));
  ctx.strokeStyle = paint.grid;
  ctx.fillStyle = paint.ink;
  ctx.lineWidth = 1;
  ctx.textAlign = "center";
  for (let n = Math.ceil(state.from / step); n * step <= state.to; n++) {
    const at = Math.round(x(n * step)) + 0.5;
    if (at > state.left + 12 && at < state.width - 28) ctx.fillText(shown(n * step), at, 9);
    ctx.beginPath(); ctx.moveTo(at, TOP - 5); ctx.lineTo(at, state.height); ctx.stroke();
  }
  ctx.textAlign = "right";
  let rank = -1, group = "";
  for (const lane of lanes) {
    const fresh = lane.rank !== rank;
    if ((fresh || lane.group !== group) && (fresh || data.ranks.length < FEW)) {
      ctx.fillStyle = lane.group === "exposed" ? paint.exposed : paint.faint;
      ctx.fillText(ROWS[lane.group], state.left - 6, lane.top + lane.tall / 2);
    }
    if (fresh && data.ranks.length > 1) {
      ctx.fillStyle = paint.ink;
      ctx.textAlign = "left";
      ctx.fillText(data.ranks[lane.rank].name, 0, lane.top - (data.ranks.length < FEW ? 5 : -4));
      ctx.textAlign = "right";
    }
    [rank, group] = [lane.rank, lane.group];
  }
}

// Behind all rows of a rank, where its communication is exposed.
function drawGlow(rank) {
  const own = lanes.filter((lane) => lane.rank === rank);
  if (!own.length) return;
  const top = own[0].top - 2, tall = own[own.length - 1].top + own[own.length - 1].tall + 2 - top;
  ctx.fillStyle = paint.glow;
  for (const lane of exposedOf[rank]) {
    for (let [bar, high] = visible(lane); bar < high; bar++) {
      const left = x(lane.start[bar]), wide = x(lane.end[bar]) - left;
      if (wide >= 0.5) ctx.fillRect(left, top, wide, tall);
    }
  }
}

function visible(lane) {
  return [upperBound(lane.end, state.from), upperBound(lane.start, state.to)];
}

// Bars of less than a pixel darken theirs by the share of it that they cover.
function drawLane(lane) {
  const least = (state.to - state.from) / plotWidth();
  let column = -1, covered = 0, longest = 0, label = 0;
  const flush = () => {
    if (covered > 0) {
      ctx.globalAlpha = strength(label) * Math.min(1, 0.25 + covered / least);
      ctx.fillStyle = paint[colourName(lane, label)];
      ctx.fillRect(column, lane.top, 1, lane.tall);
    }
    [covered, longest] = [0, 0];
  };
  let run = null;
  for (let [bar, high] = visible(lane); bar < high; bar++) {
    const left = x(lane.start[bar]), time = lane.end[bar] - lane.start[bar], wide = time / least;
    if (Math.floor(left) !== column) {
      flush();
      column = Math.floor(left);
    }
    if (wide < 1) {
      covered += time;
      if (time >= longest) [longest, label] = [time, lane.label[bar]];
    } else {
      drawBar(lane, bar, left, wide);
    }
    const waits = waitsIn(lane, bar);
    if (run && run.label === lane.label[bar] && left - run.to < 8) {
      run.waits ||= waits;
      run.to = left + wide;
      run.bar = -1;
    } else {
      writeOn(lane, run);
      run = { label: lane.label[bar], from: left, to: left + wide, bar, waits };
    }
  }
  flush();
  writeOn(lane, run);
  ctx.globalAlpha = 1;
}

function waitsIn(lane, bar) {
  return lane.group === "communication" && data.kernels[lane.kernel[bar]][ROLE] === "wait";
}

// How strongly something of a phase is drawn, where one phase is looked at.
function strength(label) {
  if (state.phase === null) return 1;
  const layer = state.layer === null || state.layer === layerOf(label);
  return phaseOf(label) === state.phase && layer ? 1 : 0.16;
}

function drawBar(lane, bar, left, wide) {
  ctx.globalAlpha = strength(lane.label[bar]);
  ctx.fillStyle = paint[colourName(lane, lane.label[bar])];
  ctx.fillRect(left, lane.top, wide > 4 ? wide - 0.7 : wide, lane.tall);
  if (waitsIn(lane, bar)) {
    ctx.fillStyle = paint.hatch;
    ctx.fillRect(left, lane.top, wide, lane.tall);
  }
}

// The phase on neighbours that have it in common; on a single bar also what ran.
function writeOn(lane, run) {
  if (!run || lane.tall < 11) return;
  const from = Math.max(run.from, state.left) + 3, to = Math.min(run.to, state.left + plotWidth()) - 3;
  const single = run.bar >= 0 && !lane.count[run.bar] && lane.group !== "exposed";
  const kernel = single ? data.kernels[lane.kernel[run.bar]][BARE] : "";
  const phase = phaseOf(run.label) ? labelText(run.label) : "";
  const forms = [[phase, kernel].filter(Boolean).join(": "), phase || kernel, phaseOf(run.label)];
  const text = to - from < 24 ? "" : forms.find((form) => form && ctx.measureText(form).width <= to - from);
  if (!text) return;
  ctx.globalAlpha = 1;
  ctx.textAlign = "center";
  const middle = (from + to) / 2, below = lane.top + lane.tall / 2, faint = strength(run.label) < 1;
  if (run.waits && !faint) { // A hatch behind letters makes them hard to read.
    const wide = ctx.measureText(text).width + 4;
    ctx.fillStyle = paint[colourName(lane, run.label)];
    ctx.fillRect(middle - wide / 2, below - 7, wide, 14);
  }
  ctx.fillStyle = faint ? paint.faint : inkOn(paint[colourName(lane, run.label)]);
  ctx.fillText(text, middle, below + 0.5);
}

function drawSelected() {
  const { lane, bar } = state;
  if (!lane) return;
  const left = x(lane.start[bar]);
  ctx.strokeStyle = paint.ink;
  ctx.lineWidth = 2;
  ctx.strokeRect(left, lane.top, Math.max(2, x(lane.end[bar]) - left), lane.tall);
}

// Black or white, whichever can be read on a colour "#rrggbb".
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.3 * red + 0.59 * green + 0.11 * blue > 125 ? "#101216" : "#ffffff";
}
