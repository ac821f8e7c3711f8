// Moving about in the pictures, and the map of where the changes are.

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
  const { width } = size();
  const scale = Math.min(1, Math.max(0.6, (width - 30) / (columns * sizes.column)));
  const fits = columns * sizes.column * scale <= width - 30;
  const first = places.length ? places[0][0] * sizes.column * scale : 0; // else begin where the data does
  camera = { x: fits ? 15 : Math.min(15, width / 4 - first), y: 40, scale };
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

/** Return where a node is shown, or the folded module that stands for it. */
function spotShown(number) {
  const call = foldOf(graphs.after.nodes.get(number) ?? graphs.before.nodes.get(number));
  return call ? groupSpots.get(keyOf(call)) : places[number];
}

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
