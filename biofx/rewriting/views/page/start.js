// Buttons, and how the page begins.

const colors = passes.length ? [] : ["gray"];
for (let number = 0; number < data.colors; number += 1) {
  const probe = make("span", { class: `p${number}` });
  document.body.append(probe);
  colors[number] = getComputedStyle(probe).backgroundColor;
  probe.remove();
}

passes.forEach((entry, number) => {
  const card = make("button", { class: "card", "aria-pressed": "true", title: entry.text, onclick: () => {
    if (off.has(number)) off.delete(number); else off.add(number);
    card.setAttribute("aria-pressed", String(!off.has(number)));
    for (const side of SIDES) {
      for (const [node, box] of panes[side].boxes) box.classList.toggle("off", (touches.get(node) ?? []).length > 0 && touches.get(node).every(([pass]) => off.has(pass)));
    }
  } }, chip(number), make("strong", {}, entry.name), make("span", { class: "soft" }, milliseconds(entry.seconds)),
  make("small", {}, `${entry.applied} applied, ${entry.missed} left alone, ${percent(entry.coverage.fraction)} of parameters`));
  byId("passes").append(card);
});

const children = buildTree();
const depths = Math.max(0, ...shownModules.map((path) => (path && children.has(path) ? path.split(".").length : 0)));
const choice = byId("fold");
choice.append(make("option", { value: "0" }, "nothing"));
for (let depth = 1; depth <= depths; depth += 1) choice.append(make("option", { value: String(depth) }, `at depth ${depth}`));
function foldTo(depth) {
  folded.clear();
  if (depth > 0) for (const path of shownModules) if (path && children.has(path) && path.split(".").length === depth) folded.add(path);
  showFolds();
  arrange();
  start();
}
choice.addEventListener("change", () => foldTo(Number(choice.value)));

for (const button of byId("sides").children) {
  button.addEventListener("click", () => {
    for (const other of byId("sides").children) other.setAttribute("aria-pressed", String(other === button));
    for (const side of SIDES) byId(side).hidden = !["both", side].includes(button.dataset.side);
    look();
  });
  button.setAttribute("aria-pressed", String(button.dataset.side === "both"));
}
byId("smaller").addEventListener("click", () => zoom(1 / 1.3));
byId("larger").addEventListener("click", () => zoom(1.3));
byId("fit").addEventListener("click", fit);
window.addEventListener("resize", look);

// a large graph starts folded, as far in as still leaves few enough boxes to take in
const MOST_BOXES = 300;
let depth = 0;
if (names.length > MOST_BOXES) {
  const boxes = (at) => {
    const seen = new Set();
    for (const node of graphs.after.nodes.values()) {
      const call = around(node, (path) => children.has(path) && path.split(".").length === at);
      seen.add(call ? keyOf(call) : node.number);
    }
    return seen.size;
  };
  for (let at = depths; at >= 1 && !depth; at -= 1) if (boxes(at) <= MOST_BOXES) depth = at;
  if (!depth && depths) depth = 1;
}
choice.value = String(depth);
foldTo(depth);
overview();

window.biofx = {
  select: (pattern, side) => {
    const picked = select(pattern, side);
    return { nodes: [...picked.nodes].map((number) => names[number]), paths: [...picked.paths] };
  },
  choose: (name) => choose(names.indexOf(name), true),
};
