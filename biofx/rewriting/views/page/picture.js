// The two pictures: which modules are folded, and where everything then stands.

const panes = {};
for (const side of SIDES) {
  const svg = byId(side).querySelector("svg");
  const view = svg.querySelector(".view");
  const boxes = new Map([...view.querySelectorAll(".node")].map((box) => [Number(box.dataset.i), box]));
  const edges = [...view.querySelectorAll(".edge")].map((path) => ({
    path, u: Number(path.dataset.u), v: Number(path.dataset.v), drawn: path.getAttribute("d"),
  }));
  panes[side] = { svg, view, boxes, edges, groups: new Map() };
}

const folded = new Set();
let rowOf = (row) => row; // from a row of the layout to the row it is shown in
let shownRows = 0;
let groupSpots = new Map(); // where each folded module stands
let camera = { x: 20, y: 40, scale: 1 };

const keyOf = ([path, index]) => `${path}#${index}`;
/** Return the outermost module around a node that passes a test, and which call of it, or undefined. */
function around(node, test) {
  for (const [path, index] of node.calls) {
    for (const one of ancestors(path)) if (test(one)) return [one, one === path ? index : 0];
  }
  return undefined;
}
const foldOf = (node) => around(node, (path) => folded.has(path));

function arrange() {
  const groups = { before: new Map(), after: new Map() };
  const members = new Map();
  const occupied = new Set();
  for (const side of SIDES) {
    for (const node of graphs[side].nodes.values()) {
      const call = foldOf(node);
      if (!call) { occupied.add(places[node.number][1]); continue; }
      const key = keyOf(call);
      if (!groups[side].has(key)) groups[side].set(key, { call, nodes: [] });
      groups[side].get(key).nodes.push(node);
      if (!members.has(key)) members.set(key, new Set());
      members.get(key).add(node.number);
    }
  }
  const spots = (groupSpots = new Map()); // the same on both sides
  for (const [key, numbers] of members) {
    // weights that a pass brought in stand above their use, so the nodes of old say where a module is
    const old = [...numbers].filter((number) => graphs.before.nodes.has(number));
    const own = (old.length ? old : [...numbers]).map((number) => places[number]);
    const middle = own.map(([x]) => x).sort((a, b) => a - b)[own.length >> 1];
    spots.set(key, [middle, Math.min(...own.map(([, row]) => row))]);
    occupied.add(spots.get(key)[1]);
  }
  const rows = [...occupied].sort((a, b) => a - b);
  shownRows = rows.length;
  const order = new Map(rows.map((row, index) => [row, index]));
  const sorted = new Float64Array(rows);
  rowOf = (row) => {
    if (order.has(row)) return order.get(row);
    let low = 0;
    let high = sorted.length;
    while (low < high) { const middle = (low + high) >> 1; if (sorted[middle] < row) low = middle + 1; else high = middle; }
    return low - 0.5;
  };
  separate(spots, members);
  for (const side of SIDES) draw(side, groups[side], spots);
  drawMap();
  choose(chosen, false);
  search();
}

/** Move groups aside from nodes and other groups of their row. */
function separate(spots, members) {
  if (!spots.size) return;
  const taken = new Map();
  const hidden = new Set([...members.values()].flatMap((numbers) => [...numbers]));
  names.forEach((_, number) => {
    if (hidden.has(number)) return;
    const [x, row] = places[number];
    taken.set(row, [...(taken.get(row) ?? []), x]);
  });
  for (const spot of spots.values()) {
    const others = taken.get(spot[1]) ?? [];
    const free = (x) => others.every((other) => Math.abs(other - x) >= 1);
    const tried = others.flatMap((x) => [x - 1, x + 1]).filter((x) => x >= 0 && free(x));
    if (!free(spot[0])) spot[0] = tried.reduce((best, x) => (Math.abs(x - spot[0]) < Math.abs(best - spot[0]) ? x : best), Math.max(...others) + 1);
    taken.set(spot[1], [...others, spot[0]]);
  }
}

function draw(side, groups, spots) {
  const pane = panes[side];
  for (const group of pane.groups.values()) group.box.remove();
  pane.groups = new Map();
  for (const [key, group] of groups) {
    const [x, row] = spots.get(key);
    const box = groupBox(group, x * sizes.column, rowOf(row) * sizes.row);
    pane.groups.set(key, { ...group, box });
    pane.view.append(box);
  }
  const spotOf = new Map();
  for (const node of graphs[side].nodes.values()) {
    const box = pane.boxes.get(node.number);
    const call = foldOf(node);
    box.classList.toggle("hidden", Boolean(call));
    const [x, row] = call ? spots.get(keyOf(call)) : places[node.number];
    spotOf.set(node.number, { key: call ? keyOf(call) : null, x, row });
    if (!call) box.setAttribute("transform", `translate(${(x * sizes.column).toFixed(1)} ${(rowOf(row) * sizes.row).toFixed(1)})`);
  }
  const seen = new Set();
  for (const edge of pane.edges) {
    const from = spotOf.get(edge.u);
    const to = spotOf.get(edge.v);
    const ends = `${from.key ?? edge.u} ${to.key ?? edge.v}`;
    const hide = (from.key !== null && from.key === to.key) || (folded.size > 0 && seen.has(ends));
    seen.add(ends);
    edge.path.classList.toggle("hidden", hide);
    if (hide) continue;
    if (!folded.size) { edge.path.setAttribute("d", edge.drawn); continue; }
    const between = from.key === null && to.key === null ? routes.get(`${edge.u} ${edge.v}`) ?? [] : [];
    edge.path.setAttribute("d", curve([[from.x, from.row], ...between, [to.x, to.row]]));
  }
}

function curve(points) {
  const at = points.map(([x, row]) => [x * sizes.column + sizes.width / 2, rowOf(row) * sizes.row + sizes.height / 2]);
  at[0][1] += sizes.height / 2;
  at[at.length - 1][1] -= sizes.height / 2;
  let out = `M${at[0][0].toFixed(1)} ${at[0][1].toFixed(1)}`;
  for (let i = 1; i < at.length; i += 1) {
    const bend = (at[i][1] - at[i - 1][1]) / 2;
    out += `C${at[i - 1][0].toFixed(1)} ${(at[i - 1][1] + bend).toFixed(1)} ${at[i][0].toFixed(1)} ${(at[i][1] - bend).toFixed(1)} ${at[i][0].toFixed(1)} ${at[i][1].toFixed(1)}`;
  }
  return out;
}

function groupBox({ call, nodes }, x, y) {
  const [path, index] = call;
  const numbers = [...new Set(nodes.flatMap((node) => (touches.get(node.number) ?? []).map(([number]) => number)))].sort();
  const changed = nodes.filter((node) => (touches.get(node.number) ?? []).some(([, kind]) => kind !== "missed")).length;
  const box = makeSvg("g", { class: `group${numbers.length ? ` t${numbers[numbers.length - 1] % data.colors}` : ""}`, transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` });
  box.append(makeSvg("rect", { class: "box", width: sizes.width, height: sizes.height, rx: 5 }));
  numbers.forEach((number, place) => box.append(makeSvg("rect", { class: `bar p${number % data.colors}`, x: 4 + place * 7, y: 5, width: 5, height: sizes.height - 10 })));
  const left = 8 + numbers.length * 7;
  const shown = index ? `${path}#${index}` : path;
  box.append(makeSvg("text", { class: "name", x: left, y: 16 }, shown.length > 20 ? `…${shown.slice(-19)}` : shown));
  box.append(makeSvg("text", { class: "what", x: left, y: 30 }, `${nodes.length} nodes, ${changed} touched`));
  box.append(makeSvg("text", { class: "mark", x: sizes.width - 6, y: 16 }, "▸"));
  box.append(makeSvg("title", {}, `${shown}: double click to unfold`));
  box.addEventListener("click", () => { if (!dragged) chooseModule(path); });
  box.addEventListener("dblclick", () => setFold(path, false));
  return box;
}
