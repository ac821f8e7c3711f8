// The modules at the left.

const rows = new Map();
const shownModules = [...graphs.before.modules.keys()];
function setFold(path, fold) {
  if (fold) folded.add(path); else folded.delete(path);
  showFolds();
  arrange();
}
function unfoldAround(node) {
  for (const [path] of node.calls) for (const one of ancestors(path)) folded.delete(one);
  showFolds();
  arrange();
}
function showFolds() {
  for (const [path, row] of rows) {
    const button = row.querySelector(":scope > summary > .fold");
    if (button) { button.setAttribute("aria-pressed", folded.has(path)); button.textContent = folded.has(path) ? "▸▸" : "▾▾"; }
  }
}

function buildTree() {
  const children = new Map();
  for (const path of shownModules) {
    if (!path) continue;
    const parent = path.includes(".") ? path.slice(0, path.lastIndexOf(".")) : "";
    children.set(parent, [...(children.get(parent) ?? []), path]);
  }
  const touchedBy = new Map();
  for (const [layer, list] of remarksOfLayer) {
    for (const { number, kind } of list) {
      if (kind !== "applied") continue;
      for (const path of ["", ...(layer ? ancestors(layer) : [])]) touchedBy.set(path, (touchedBy.get(path) ?? new Set()).add(number));
    }
  }
  const build = (path) => {
    const kind = graphs.before.modules.get(path).classes[0];
    const label = [
      make("button", { class: "open", "data-path": path, onclick: (event) => { event.preventDefault(); chooseModule(path); } }, path ? path.slice(path.lastIndexOf(".") + 1) : kind),
      path ? make("span", { class: "kind" }, kind) : null,
      make("span", { class: "chips" }, ...[...(touchedBy.get(path) ?? [])].sort().map(chip)),
    ];
    const below = children.get(path) ?? [];
    if (!below.length) {
      const leaf = make("div", { class: "leaf", title: path }, ...label);
      rows.set(path, leaf);
      return leaf;
    }
    const fold = path ? make("button", { class: "fold", title: `fold ${path} in the pictures`, "aria-pressed": "false", onclick: (event) => { event.preventDefault(); setFold(path, !folded.has(path)); } }, "▾▾") : null;
    const branch = make("details", { title: path }, make("summary", {}, ...label, fold), ...below.map(build));
    branch.open = path === "" || (path.split(".").length < 2 && shownModules.length < 200);
    rows.set(path, branch);
    return branch;
  };
  byId("tree").append(build(""));
  return children;
}
