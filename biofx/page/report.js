"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { names, places, passes, sizes, classes } = data;
  const SIDES = ["before", "after"];
  const byId = (id) => document.getElementById(id);

  // Everything from the model is put in as text, never as markup.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "onclick") element.addEventListener("click", value);
      else if (value !== undefined && value !== null) element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  function makeSvg(tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  const chip = (number) => make("span", { class: `chip p${number % data.colors}` });

  // ---- what there is

  const touches = new Map(data.touches);
  const routes = new Map(data.routes.map(([u, v, points]) => [`${u} ${v}`, points]));
  const graphs = {};
  for (const side of SIDES) {
    const nodes = new Map();
    for (const [number, line, inputs, calls] of data.graphs[side].nodes) {
      nodes.set(number, { number, name: names[number], line, inputs, calls, users: [] });
    }
    for (const node of nodes.values()) for (const source of node.inputs) nodes.get(source).users.push(node.number);
    const modules = new Map(
      data.graphs[side].modules.map(([path, kind, count]) => [path, { path, classes: classes[kind], count }]),
    );
    graphs[side] = { nodes, modules, byName: new Map([...nodes.values()].map((node) => [node.name, node])) };
  }
  const remarksOfNode = new Map();
  const remarksOfLayer = new Map();
  passes.forEach((entry, number) => {
    for (const [kind, node, layer, message, details] of entry.remarks) {
      const remark = { number, kind, node, layer, message, details };
      if (node !== null) remarksOfNode.set(node, [...(remarksOfNode.get(node) ?? []), remark]);
      remarksOfLayer.set(layer, [...(remarksOfLayer.get(layer) ?? []), remark]);
    }
  });

  // ---- selectors, as biofx.select reads them

  const SYNTAX = /[\^$\\.*+?()[\]{}|/]/;

  /** Return Python's regular expression as this browser's; throws where that cannot be done faithfully. */
  function translateRegex(source) {
    let flags = "u";
    let out = "";
    let inClass = false;
    const leading = /^\(\?([a-zA-Z]+)\)/.exec(source);
    if (leading) {
      for (const flag of leading[1]) {
        if (!"ismu".includes(flag)) throw new SyntaxError(`flag (?${flag}) is not supported here`);
        if (!flags.includes(flag)) flags += flag;
      }
      source = source.slice(leading[0].length);
    }
    const word = "\\p{L}\\p{N}_";
    for (let i = 0; i < source.length; i += 1) {
      const c = source[i];
      if (c === "\\") {
        const next = source[(i += 1)] ?? "";
        const inside = { w: word, d: "\\p{Nd}" };
        if (next in inside) out += inClass ? inside[next] : `[${inside[next]}]`;
        else if (next === "W" && !inClass) out += `[^${word}]`;
        else if (next === "D") out += "\\P{Nd}";
        else if (next === "A") out += "^";
        else if (next === "Z") out += "$";
        else if (/[a-zA-Z0-9]/.test(next) && !/[bBsSnrtfvux0-9]/.test(next)) {
          throw new SyntaxError(`\\${next} is not supported here`);
        } else if (/[a-zA-Z0-9]/.test(next) || SYNTAX.test(next) || (inClass && next === "-")) out += `\\${next}`;
        else out += next;
      } else if (inClass) {
        if (c === "[") out += "\\[";
        else {
          if (c === "]") inClass = false;
          out += c;
        }
      } else if (c === "[") {
        inClass = true;
        out += c;
        if (source[i + 1] === "^") out += source[(i += 1)];
        if (source[i + 1] === "]") { out += "\\]"; i += 1; }
      } else if (c === "(" && source.startsWith("(?P<", i)) { out += "(?<"; i += 3; }
      else if (c === "(" && source.startsWith("(?P=", i)) {
        const end = source.indexOf(")", i);
        out += `\\k<${source.slice(i + 4, end)}>`;
        i = end;
      } else if (c === "{" && !/^\{\d*,?\d*\}/.test(source.slice(i))) out += "\\{";
      else if (c === "{" && /^\{,?\}/.test(source.slice(i))) out += "\\{";
      else if (c === "{") {
        const end = source.indexOf("}", i);
        out += source.slice(i, end + 1).replace("{,", "{0,");
        i = end;
      } else if (c === "}" || c === "]") out += `\\${c}`;
      else out += c;
    }
    return new RegExp(`^(?:${out})$`, flags);
  }

  /** Return what Python's fnmatch.translate means by a glob. */
  function translateGlob(glob) {
    const characters = [...glob];
    let out = "";
    for (let i = 0; i < characters.length; i += 1) {
      const c = characters[i];
      if (c === "*") out += ".*";
      else if (c === "?") out += ".";
      else if (c === "[") {
        let end = i + 1;
        if (characters[end] === "!") end += 1;
        if (characters[end] === "]") end += 1;
        while (end < characters.length && characters[end] !== "]") end += 1;
        if (end >= characters.length) out += "\\[";
        else {
          out += classOf(characters.slice(i + 1, end));
          i = end;
        }
      } else out += SYNTAX.test(c) ? `\\${c}` : c;
    }
    return new RegExp(`^(?:${out})$`, "su");
  }

  function classOf(inner) {
    const negated = inner[0] === "!";
    const characters = negated ? inner.slice(1) : inner;
    const ranges = [];
    for (let i = 0; i < characters.length; i += 1) {
      if (characters[i + 1] === "-" && i + 2 < characters.length) {
        if (characters[i].codePointAt(0) <= characters[i + 2].codePointAt(0)) ranges.push([characters[i], characters[i + 2]]);
        i += 2;
      } else ranges.push([characters[i], characters[i]]);
    }
    const code = (c) => `\\u{${c.codePointAt(0).toString(16)}}`;
    const body = ranges.map(([low, high]) => (low === high ? code(low) : `${code(low)}-${code(high)}`)).join("");
    if (body) return `[${negated ? "^" : ""}${body}]`;
    return negated ? "." : "(?!)";
  }

  function ancestors(path) {
    const parts = path.split(".");
    return parts.map((_, end) => parts.slice(0, end + 1).join("."));
  }

  function within(graph, paths) {
    const everything = paths.has("");
    const below = [...graph.modules.keys()].filter((path) => ancestors(path).some((one) => paths.has(one)));
    const all = new Set([...paths, ...below]);
    const nodes = [...graph.nodes.values()].filter((node) => everything || node.calls.some(([path]) => all.has(path)));
    return { paths: all, nodes: new Set(nodes.map((node) => node.number)) };
  }

  function where(graph, fits) {
    const found = within(graph, new Set([...graph.modules.keys()].filter((path) => path && fits(path))));
    for (const node of graph.nodes.values()) if (fits(node.name)) found.nodes.add(node.number);
    return found;
  }

  /** Return the module paths and node numbers that a selector picks in one of the graphs. */
  function select(pattern, side) {
    const graph = graphs[side];
    const nothing = { paths: new Set(), nodes: new Set() };
    if (!pattern) return nothing;
    if (pattern.startsWith("type:")) {
      const wanted = [...graph.modules.values()].filter((module) => module.classes.includes(pattern.slice(5)));
      return within(graph, new Set(wanted.map((module) => module.path)));
    }
    if (pattern.startsWith("re:")) {
      const regex = translateRegex(pattern.slice(3));
      return where(graph, (text) => regex.test(text));
    }
    if (graph.modules.has(pattern)) return within(graph, new Set([pattern]));
    const named = graph.byName.get(pattern);
    if (named) return { paths: new Set(), nodes: new Set([named.number]) };
    const call = /^(.*)#(\d+)$/su.exec(pattern);
    if (call && graph.modules.has(call[1])) {
      const inside = [...graph.nodes.values()].filter((node) =>
        node.calls.some(([path, index]) => path === call[1] && index === Number(call[2])),
      );
      return { paths: new Set(), nodes: new Set(inside.map((node) => node.number)) };
    }
    if (/[*?[]/.test(pattern)) {
      const regex = translateGlob(pattern);
      return where(graph, (text) => regex.test(text));
    }
    return nothing;
  }

  // ---- the two pictures

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
    const spots = new Map(); // where each group stands, the same on both sides
    for (const [key, numbers] of members) {
      // weights that a pass brought in stand above their use, so the nodes of old say where a module is
      const old = [...numbers].filter((number) => graphs.before.nodes.has(number));
      const own = (old.length ? old : [...numbers]).map((number) => places[number]);
      spots.set(key, [own.reduce((sum, [x]) => sum + x, 0) / own.length, Math.min(...own.map(([, row]) => row))]);
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

  // ---- moving about

  function look() {
    for (const side of SIDES) {
      panes[side].view.setAttribute("transform", `translate(${camera.x} ${camera.y}) scale(${camera.scale})`);
      panes[side].svg.classList.toggle("tiny", camera.scale < 0.28);
    }
    drawMap();
  }

  function size() {
    const visible = SIDES.map((side) => panes[side].svg.getBoundingClientRect()).find((box) => box.width > 0);
    return visible ?? { width: 600, height: 600, left: 0, top: 0 };
  }

  function zoom(factor, x = size().width / 2, y = size().height / 2) {
    const scale = Math.min(3, Math.max(0.02, camera.scale * factor));
    camera = { x: x - ((x - camera.x) * scale) / camera.scale, y: y - ((y - camera.y) * scale) / camera.scale, scale };
    look();
  }

  function fit() {
    const { width, height } = size();
    const columns = Math.max(...places.map(([x]) => x), 0) + 1;
    const scale = Math.min(1.2, (width - 30) / (columns * sizes.column), (height - 60) / (shownRows * sizes.row));
    camera = { x: Math.max(15, (width - columns * sizes.column * scale) / 2), y: 40, scale: Math.max(0.02, scale) };
    look();
  }

  function start() {
    const columns = Math.max(...places.map(([x]) => x), 0) + 1;
    const scale = Math.min(1, Math.max(0.6, (size().width - 30) / (columns * sizes.column)));
    camera = { x: 15, y: 40, scale };
    look();
  }

  function center(number) {
    const { width, height } = size();
    const spot = spotShown(number);
    if (camera.scale < 0.4) camera.scale = 0.8;
    camera.x = width / 2 - (spot[0] * sizes.column + sizes.width / 2) * camera.scale;
    camera.y = height / 2 - (rowOf(spot[1]) * sizes.row + sizes.height / 2) * camera.scale;
    look();
  }

  const spotShown = (number) => places[number];

  let dragged = false;
  for (const side of SIDES) {
    const { svg, view } = panes[side];
    let from = null;
    svg.addEventListener("pointerdown", (event) => { from = { x: event.clientX, y: event.clientY, camera }; dragged = false; });
    svg.addEventListener("pointermove", (event) => {
      if (!from || !event.buttons) return;
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      if (!dragged && Math.hypot(dx, dy) < 4) return;
      if (!dragged) svg.setPointerCapture(event.pointerId);
      dragged = true;
      camera = { ...from.camera, x: from.camera.x + dx, y: from.camera.y + dy };
      look();
    });
    svg.addEventListener("pointerup", () => { from = null; });
    svg.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = svg.getBoundingClientRect();
      if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
      else { camera = { ...camera, x: camera.x - event.deltaX, y: camera.y - event.deltaY }; look(); }
    }, { passive: false });
    view.addEventListener("click", (event) => {
      const box = event.target.closest(".node");
      if (box && !dragged) choose(Number(box.dataset.i), false);
    });
  }

  const map = byId("map");
  function drawMap() {
    const height = (map.height = Math.max(1, Math.round(map.getBoundingClientRect().height)));
    const paint = map.getContext("2d");
    const rows = Math.max(1, shownRows);
    const css = getComputedStyle(document.body);
    paint.clearRect(0, 0, 14, height);
    for (const [number, list] of touches) {
      const last = list.filter(([, kind]) => kind !== "missed").at(-1);
      if (!last) continue;
      paint.fillStyle = colors[last[0] % data.colors];
      paint.fillRect(3, (rowOf(places[number][1]) / rows) * height, 8, Math.max(1.5, height / rows - 1));
    }
    const scale = (camera.scale * sizes.row * rows) / height;
    paint.strokeStyle = css.color;
    paint.strokeRect(0.5, -camera.y / scale, 13, size().height / scale);
  }
  map.addEventListener("click", (event) => {
    const share = (event.clientY - map.getBoundingClientRect().top) / map.getBoundingClientRect().height;
    camera = { ...camera, y: size().height / 2 - share * shownRows * sizes.row * camera.scale };
    look();
  });

  // ---- details

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

  // ---- search

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

  // ---- modules

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

  // ---- set up

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
})();
