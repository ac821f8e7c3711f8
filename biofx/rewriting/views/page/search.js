// The search field.

const field = byId("search");
const found = byId("found");
let hits = [];
let hit = -1;

function search() {
  const text = field.value.trim();
  const results = {};
  found.classList.remove("wrong");
  try {
    for (const side of SIDES) results[side] = select(text, side);
  } catch (error) {
    for (const side of SIDES) results[side] = select("", side);
    found.classList.add("wrong");
    found.textContent = `this page cannot read that: ${error.message}`;
    return mark(results, text);
  }
  const matched = SIDES.some((side) => results[side].nodes.size || results[side].paths.size);
  let note = "";
  if (!matched && text && !/^(re|type):/.test(text)) {
    const lower = text.toLowerCase();
    for (const side of SIDES) results[side] = where(graphs[side], (name) => name.toLowerCase().includes(lower));
    note = " by part of the name; as a selector it matches nothing";
  }
  const counts = SIDES.map((side) => results[side].nodes.size);
  found.textContent = text ? `${counts[0]} nodes before, ${counts[1]} after${note}` : "";
  mark(results, text);
}

function mark(results, text) {
  hits = [...new Set([...results.before.nodes, ...results.after.nodes])].sort((a, b) => places[a][1] - places[b][1]);
  hit = -1;
  for (const side of SIDES) {
    const pane = panes[side];
    pane.view.classList.toggle("searching", Boolean(text));
    for (const [number, box] of pane.boxes) box.classList.toggle("hit", results[side].nodes.has(number));
    for (const group of pane.groups.values()) group.box.classList.toggle("hit", group.nodes.some((node) => results[side].nodes.has(node.number)));
  }
  const paths = new Set([...results.before.paths, ...results.after.paths]);
  for (const [path, row] of rows) {
    row.classList.toggle("hit", Boolean(text) && paths.has(path));
    row.classList.toggle("dim", Boolean(text) && !paths.has(path));
  }
}

let waiting = 0;
field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 60); });
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    clearTimeout(waiting);
    const text = field.value.trim();
    if (text !== field.dataset.last) { search(); field.dataset.last = text; }
    if (!hits.length) return;
    const next = (hit + (event.shiftKey ? hits.length - 1 : 1) + hits.length) % hits.length;
    choose(hits[next], true);
    hit = next;
  }
  if (event.key === "Escape") { field.value = ""; search(); field.blur(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== field) { event.preventDefault(); field.focus(); }
});
