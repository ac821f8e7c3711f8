// What the report holds, and how elements are made of it.

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
