// Makes the tables sortable, leads from them to the timeline, and starts: the end of the page's script.

// Shows phases of a name (and layer) strongly and all others faintly.
function mark(phase, layer = null) {
  [state.phase, state.layer] = [phase, layer];
  for (const button of legend.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.textContent === phase));
  }
  redraw();
}

const legend = document.getElementById("legend");

function addLegend(text, colour, isPhase) {
  const item = document.createElement("li"), swatch = document.createElement("span");
  swatch.className = "swatch";
  if (colour === "hatch") swatch.classList.add("is-hatched");
  else swatch.style.background = `var(--${colour})`;
  const words = document.createElement(isPhase ? "button" : "span");
  words.textContent = text;
  if (isPhase) {
    words.setAttribute("aria-pressed", "false");
    words.onclick = () => mark(state.phase === text ? null : text);
  }
  item.append(swatch, words);
  legend.append(item);
}

for (const [name, colour] of strong) addLegend(name, colour, true);
const drawn = new Set(lanes.filter((lane) => lane.group === "compute")
  .flatMap((lane) => [...new Set(lane.label)].map((label) => directionOf(phaseOf(label)))));
const DIRECTIONS = { F: "computes forward", B: "computes backward", W: "computes weight gradients",
  other: "computes something else", none: "belongs to no phase" };
for (const [direction, text] of Object.entries(DIRECTIONS)) {
  if (drawn.has(direction)) addLegend(text, direction, false);
}
const waits = lanes.some((lane) => lane.group === "communication" &&
  [...new Set(lane.kernel)].some((kernel) => data.kernels[kernel][ROLE] === "wait"));
if (waits) addLegend("only waits", "hatch", false);
if (lanes.some((lane) => lane.group === "copy")) addLegend("copies", "copy", false);
if (lanes.some((lane) => lane.group === "exposed")) addLegend("exposed communication", "exposed", false);

// ---- tables ----

function sortBy(table, header) {
  const column = [...header.parentElement.children].indexOf(header);
  const up = header.getAttribute("aria-sort") === "descending"
    || (header.classList.contains("word") && header.getAttribute("aria-sort") !== "ascending");
  const key = (row) => {
    const { value } = row.children[column].dataset;
    return value === undefined ? row.children[column].textContent : Number(value);
  };
  const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true }));
  rows.sort((a, b) => (up ? 1 : -1) * compare(a[0], b[0]));
  table.tBodies[0].append(...rows.map(([, row]) => row));
  for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  if (table.tBodies[0].rows.length < 2) continue;
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.onclick = () => sortBy(table, header);
  }
}

const chosen = document.getElementById("chosen");
if (chosen) {
  chosen.onchange = () => {
    for (const row of document.querySelectorAll("tr[data-of]")) {
      row.hidden = chosen.value !== "" && row.dataset.of !== chosen.value;
    }
  };
}

for (const button of document.querySelectorAll("button.go")) {
  button.onclick = () => goTo(button.dataset);
}

// `phase` is "" for what belongs to none, and undefined for what is no phase.
function goTo({ rank, from, to, phase, layer, exposed }) {
  const shownRank = data.ranks[Number(rank)];
  if (!shownRank) return;
  const [start, end] = [shownRank.start + Number(from), shownRank.start + Number(to)];
  state.pinned = false;
  mark(phase === undefined ? null : phase, layer === undefined ? null : Number(layer));
  show(start, end);
  const lane = exposedOf[Number(rank)][0];
  if (exposed && lane) selectBar(lane, barAt(lane, (start + end) / 2));
  else select(null, -1);
  canvas.scrollIntoView({ block: "nearest" });
  canvas.focus({ preventScroll: true });
}

// ---- start ----

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
matchMedia("print").addEventListener("change", () => { readColours(); draw(); });
new ResizeObserver(resize).observe(canvas.parentElement);
readColours();
resize();
