// The panel at the right: a node's remarks, a module's, or the overview.

let chosen = null;
const details = byId("details");
const off = new Set();
const linkTo = (number) => make("a", { href: "#", onclick: (event) => { event.preventDefault(); choose(number, true); } }, names[number]);
const moduleLink = (path) => make("a", { href: "#", onclick: (event) => { event.preventDefault(); chooseModule(path); } }, path || "(model)");
const KINDS = { created: "created by", replaced: "replaced by", rewired: "rewired by", erased: "erased by", applied: "rewritten by", missed: "left alone by" };

function remarkBox(remark, heading) {
  const numbersBehind = Object.entries(remark.details).map(([key, value]) => `${key} = ${value}`).join(", ");
  return make("div", { class: `remark ${remark.kind}` },
    make("div", {}, chip(remark.number), " ", make("strong", {}, heading ?? `${remark.kind === "applied" ? "✓" : "·"} ${passes[remark.number].name}`)),
    make("div", { class: "message" }, remark.message),
    numbersBehind ? make("small", {}, numbersBehind) : null);
}

function choose(number, move) {
  chosen = number;
  for (const side of SIDES) {
    for (const box of panes[side].view.querySelectorAll(".chosen")) box.classList.remove("chosen");
    for (const edge of panes[side].edges) edge.path.classList.toggle("near", number !== null && (edge.u === number || edge.v === number));
    panes[side].boxes.get(number)?.classList.add("chosen");
  }
  if (number === null) return;
  const [before, after] = SIDES.map((side) => graphs[side].nodes.get(number));
  const call = foldOf(after ?? before);
  if (call && move) { unfoldAround(after ?? before); return choose(number, move); }
  if (move) center(number);
  const parts = [make("h2", {}, names[number])];
  const same = before && after && before.line === after.line;
  if (before) parts.push(make("div", { class: same ? "line" : "line minus" }, before.line));
  if (after && !same) parts.push(make("div", { class: "line plus" }, after.line));
  const calls = (after ?? before).calls;
  parts.push(make("h3", {}, "in"), make("div", { class: "links" }, moduleLink(""), ...calls.map(([path]) => moduleLink(path))));
  const own = remarksOfNode.get(number) ?? [];
  const list = touches.get(number) ?? [];
  if (list.length) parts.push(make("h3", {}, "what happened"));
  for (const [pass, kind, because] of list) {
    const said = own.filter((remark) => remark.number === pass);
    const heading = `${KINDS[kind]} ${passes[pass].name}`;
    for (const remark of said) parts.push(remarkBox(remark, heading));
    if (said.length) continue;
    const cause = because === null ? [] : (remarksOfNode.get(because) ?? []).filter((remark) => remark.number === pass && remark.kind === "applied");
    for (const remark of cause) parts.push(remarkBox(remark, heading), make("div", { class: "soft" }, "because of ", linkTo(because)));
    if (!cause.length) parts.push(make("div", { class: "remark" }, chip(pass), ` ${heading}`));
  }
  if (!list.length) parts.push(make("p", { class: "soft" }, "No pass changed or considered this node."));
  for (const [title, key] of [["takes", "inputs"], ["is used by", "users"]]) {
    const linked = [...new Set([...(before?.[key] ?? []), ...(after?.[key] ?? [])])];
    if (linked.length) parts.push(make("h3", {}, title), make("div", { class: "links" }, ...linked.map(linkTo)));
  }
  show(parts);
}

function chooseModule(path) {
  choose(null, false);
  const inside = within(graphs.after, new Set([path]));
  const first = [...inside.nodes].sort((a, b) => places[a][1] - places[b][1])[0];
  if (first !== undefined) center(first);
  const module = graphs.before.modules.get(path) ?? graphs.after.modules.get(path);
  const parts = [make("h2", {}, path || "(model)"), make("p", { class: "soft" }, `${module.classes[0]}, ${inside.nodes.size} nodes after`)];
  const layers = [...remarksOfLayer.keys()].filter((layer) => path === "" || layer === path || layer.startsWith(`${path}.`));
  if (!layers.length) parts.push(make("p", { class: "soft" }, "No pass considered anything in here."));
  let room = 200;
  for (const layer of layers) {
    parts.push(make("h3", {}, layer || "(model)"));
    for (const remark of remarksOfLayer.get(layer)) if ((room -= 1) >= 0) parts.push(remarkBox(remark));
  }
  if (room < 0) parts.push(make("p", { class: "soft" }, `and ${-room} more`));
  show(parts);
}

function show(parts) {
  details.replaceChildren(make("button", { id: "overview", onclick: () => { choose(null, false); overview(); } }, "‹ overview"), ...parts);
  details.scrollTop = 0;
}

const milliseconds = (seconds) => `${(seconds * 1e3).toFixed(1)} ms`;
const percent = (fraction) => `${(100 * fraction).toFixed(1)} %`;

function overview() {
  const longest = Math.max(...passes.map((entry) => entry.seconds), 1e-9);
  const parts = [make("h2", {}, "coverage")];
  if (!passes.length) parts.push(make("p", { class: "soft" }, "No pass ran: every mechanism is off."));
  if (data.whole !== null) parts.push(make("p", { class: "soft" }, data.whole));
  for (const reach of data.mechanisms) parts.push(make("p", { class: "soft" }, reach));
  const meter = (share, number) => {
    const bar = make("div", { class: `p${number % data.colors}` });
    bar.style.width = `${100 * share}%`;
    return make("div", { class: "meter" }, bar);
  };
  passes.forEach((entry, number) => {
    const c = entry.coverage;
    parts.push(make("div", {}, chip(number), " ", make("strong", {}, entry.name)),
      make("div", { class: "soft" }, `${c.layers} of ${c.candidate_layers} layers, ${percent(c.fraction)} of ${c.all_parameters.toLocaleString("en")} parameters`),
      meter(c.fraction, number));
  });
  parts.push(make("h2", {}, "time"));
  passes.forEach((entry, number) => parts.push(make("div", { class: "soft" }, `${entry.name}: ${milliseconds(entry.seconds)}`), meter(entry.seconds / longest, number)));
  if (data.kept.length) {
    const body = data.kept.map(([path, reason]) => make("tr", {}, make("td", {}, path || "the model"), make("td", {}, reason)));
    parts.push(make("h2", {}, "stays in Python, and why"), make("table", { id: "kept" }, ...body));
  }
  const reasons = passes.flatMap((entry, number) => entry.coverage.reasons.map(([message, count]) => ({ number, message, count })));
  if (reasons.length) {
    parts.push(make("h2", {}, "left alone, and why"));
    const body = reasons.map(({ number, message, count }) => make("tr", {}, make("td", {}, chip(number)), make("td", { class: "number" }, `${count} ×`), make("td", {}, message)));
    parts.push(make("table", {}, ...body));
  }
  parts.push(make("h2", {}, "signs"), make("p", { class: "soft" }, "+ created   ⇄ replaced   ~ rewired   − erased   ✓ rewritten around   · left alone. Bars at the left of a box: the passes that touched it, faint where they left it alone."));
  parts.push(make("p", { class: "soft" }, "Click a node for its remarks, a module for those inside. Drag or scroll to move, Ctrl + wheel to zoom, / to search, Enter for the next hit."));
  details.replaceChildren(...parts);
}
