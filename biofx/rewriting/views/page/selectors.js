// Selectors, as biofx.select reads them.

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
