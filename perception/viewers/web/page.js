// The page: it reads the frames, fills the panel, and joins camera, painter and picking. Text from data is only ever set as text.

const data = JSON.parse(document.getElementById("frames").textContent);
const canvas = document.getElementById("picture");
const [LOWEST_CLICK, RING_STEP, RINGS] = [4, 20, 5]; // pixels that a click may move; meters between the rings; number of rings
const AXIS_COLORS = [[230, 80, 80], [90, 200, 90], [90, 140, 250]];
const hidden = new Set(); // names of layers that the reader has switched off
let frame; // the frame that is shown
let selected = null; // { layer, index } of the box that was picked
let turning = false;

const element = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");

function complain(text) {
  element("trouble").textContent = text;
  element("trouble").hidden = false;
}

const camera = new OrbitCamera(data.view.target, data.view.distance);
const painter = new Painter(canvas, complain);

// ---- reading

function bytesOf(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

// Whole numbers of two bytes, low byte first, as every processor that runs a browser today has them.
function stepsOf(text) {
  return new Uint16Array(bytesOf(text).buffer);
}

// ---- what the painter gets

function putPoints({ xyz, intensity, count, origin, steps }) {
  const shades = intensity === null ? new Uint8Array(count) : bytesOf(intensity);
  painter.put("points", {
    program: "points",
    mode: "POINTS",
    first: { values: stepsOf(xyz), width: 3, shares: false },
    second: { values: shades, width: 1, shares: true },
    uniforms: { origin, steps, scale: data.scale.flat().map((v) => v / 255), heights: data.heights },
  });
}

function putCells({ centers, colors, origin, steps, size }) {
  painter.put("cells", {
    program: "cells",
    mode: "POINTS",
    first: { values: stepsOf(centers), width: 3, shares: false },
    second: { values: bytesOf(colors), width: 3, shares: true },
    uniforms: { origin, steps, meters: 0.5 * Math.min(...size) }, // smaller than the cell, so that boxes can be seen between them
  });
}

// `vertices` are points in meters, `colors` one color of 0..255 for each of them.
function putFlat(name, mode, vertices, colors, alpha = 1) {
  painter.put(name, {
    program: "lines",
    mode,
    first: { values: new Float32Array(vertices.flat()), width: 3, shares: false },
    second: { values: new Uint8Array(colors.flat()), width: 3, shares: true },
    uniforms: { alpha },
  });
}

function putBoxes(layer) {
  const [vertices, colors] = [[], []];
  visibleBoxes(layer).forEach(({ box, index }) => {
    const outline = outlineOf(box);
    const shade = layer.ignored[index] ? 0.45 : 1;
    BOX_EDGES.flat().forEach((corner) => {
      vertices.push(outline[corner]);
      colors.push(data.layers[layer.name].color.map((v) => v * shade));
    });
  });
  putFlat(layer.name, "LINES", vertices, colors);
}

// The selected box: its sides are filled, and its edges are white.
function putSelection() {
  painter.remove("selection");
  painter.remove("selected edges");
  if (selected === null) return;
  const layer = frame.layers.find(({ name }) => name === selected.layer);
  const outline = outlineOf(layer.boxes[selected.index]);
  const edges = BOX_EDGES.flat().map((corner) => outline[corner]);
  putFlat("selected edges", "LINES", edges, edges.map(() => [255, 255, 255]));
  const sides = BOX_TRIANGLES.map((corner) => outline[corner]);
  putFlat("selection", "TRIANGLES", sides, sides.map(() => data.layers[layer.name].color), 0.3);
}

// Rings on the ground around the sensor, and its axes: x red, y green, z blue.
function putGround() {
  const [vertices, colors, z] = [[], [], data.ground];
  for (let ring = 1; ring <= RINGS; ring += 1) {
    for (let i = 0; i < 96; i += 1) {
      for (const angle of [i, i + 1].map((k) => (k / 48) * Math.PI)) {
        vertices.push([ring * RING_STEP * Math.cos(angle), ring * RING_STEP * Math.sin(angle), z]);
        colors.push([48, 56, 68]);
      }
    }
  }
  AXIS_COLORS.forEach((color, axis) => {
    vertices.push([0, 0, 0], [0, 1, 2].map((k) => (k === axis ? 2 : 0)));
    colors.push(color, color);
  });
  putFlat("ground", "LINES", vertices, colors);
}

// ---- boxes that are drawn now

function visibleBoxes(layer) {
  const lowest = Number(element("score").value);
  return layer.boxes
    .map((box, index) => ({ box, index, layer: layer.name }))
    .filter(({ index }) => layer.scores[index] === null || layer.scores[index] >= lowest);
}

function pick(x, y) {
  const ray = camera.ray(x, y, canvas.clientWidth, canvas.clientHeight);
  const shown = frame.layers.filter(({ name }) => !hidden.has(name)).flatMap(visibleBoxes);
  const found = firstBoxOnRay(ray, shown.map(({ box }) => box));
  select(found < 0 ? null : { layer: shown[found].layer, index: shown[found].index });
}

function select(choice) {
  selected = choice;
  const list = element("facts");
  list.replaceChildren();
  element("nothing").hidden = choice !== null;
  if (choice !== null) {
    const layer = frame.layers.find(({ name }) => name === choice.layer);
    const [x, y, z, length, width, height, yaw] = layer.boxes[choice.index];
    const score = layer.scores[choice.index];
    const meters = (...values) => `${values.map((v) => v.toFixed(2)).join(" × ")} m`;
    const facts = [
      ["layer", data.layers[layer.name].title],
      ["class", layer.classes[choice.index] + (layer.ignored[choice.index] ? " (ignored)" : "")],
      ["score", score === null ? "none" : score.toFixed(2)],
      ["length, width, height", meters(length, width, height)],
      ["center x, y, z", `${[x, y, z].map((v) => v.toFixed(2)).join(", ")} m`],
      ["yaw", `${((yaw * 180) / Math.PI).toFixed(1)}°`],
      ["distance", `${Math.hypot(x, y).toFixed(1)} m`],
    ];
    for (const [name, value] of facts) {
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      [dt.textContent, dd.textContent] = [name, value];
      list.append(dt, dd);
    }
  }
  if (painter.ready) putSelection();
  requestDraw();
}

// ---- frames

function showFrame(index) {
  frame = data.frames[index];
  element("frame").value = String(index);
  element("frame-id").textContent = `${index + 1} of ${data.frames.length}: ${frame.id}`;
  if (painter.ready) {
    painter.clear();
    putGround();
    if (frame.points !== null) putPoints(frame.points);
    if (frame.cells !== null) putCells(frame.cells);
    frame.layers.forEach(putBoxes);
  }
  for (const [name, count] of countsOf(frame)) {
    const place = element(`count-${name}`);
    if (place !== null) place.textContent = count;
  }
  select(null);
}

// Texts for the panel: how many points, cells and boxes of each layer the frame has.
function countsOf({ points, cells, layers }) {
  const boxes = Object.keys(data.layers).map((name) => {
    const layer = layers.find((each) => each.name === name);
    return [name, layer === undefined ? "not known" : number(layer.boxes.length)];
  });
  const ofPoints = points === null ? "none" : points.count < points.of ? `${number(points.count)} of ${number(points.of)}` : number(points.count);
  return [["points", ofPoints], ["cells", cells === null ? "none" : number(cells.count)], ...boxes];
}

// ---- drawing

const [SLOW, QUICK, LEAST_SHARE, PAUSE] = [50, 35, 0.1, 250]; // milliseconds of a picture, share of the points, milliseconds without a move
let share = 1; // of the points that are drawn while the camera moves
let movedAt = -Infinity; // when the camera moved last
let drawnAt = null; // when the last picture of a movement was drawn
let waiting = false;
let rateAt = -Infinity; // when the rate was written last
const times = []; // milliseconds at which the last pictures were drawn

function requestDraw() {
  if (waiting || !painter.ready) return;
  waiting = true;
  requestAnimationFrame(drawNow);
}

// While the camera moves, pictures follow each other without a pause, and the time between two of them says how many points this machine
// can draw. Soon after it stops, all points are drawn.
function drawNow(now) {
  waiting = false;
  if (turning) turnOn(now);
  const moving = now - movedAt < PAUSE;
  const looks = { size: Number(element("size").value) * (window.devicePixelRatio || 1), byIntensity: element("color").value === "intensity" ? 1 : 0 };
  painter.draw(camera, (name) => !hidden.has(selectionLayer(name)), looks, moving ? share : 1);
  const spent = drawnAt === null ? null : now - drawnAt;
  drawnAt = moving ? now : null;
  if (!moving) return;
  if (spent > SLOW) share = Math.max(LEAST_SHARE, share * 0.7);
  else if (spent !== null && spent < QUICK) share = Math.min(1, share * 1.1);
  requestDraw();
}

function cameraMoved() {
  movedAt = performance.now();
  requestDraw();
}

// One step of the turn, and how many pictures there were in each of the last two seconds. The text changes twice a second only: a change lays
// out the panel anew, and where a processor draws, that takes longer than the picture.
function turnOn(now) {
  movedAt = now;
  camera.orbit(4, 0);
  times.push(now);
  while (now - times[0] > 2000) times.shift();
  if (times.length < 3 || now - rateAt < 500) return;
  rateAt = now;
  const rate = (1000 * (times.length - 1)) / (now - times[0]);
  element("rate").textContent = `${rate.toFixed(0)} pictures a second, with ${(100 * share).toFixed(0)} % of the points`;
}

// The selected box disappears with its layer.
function selectionLayer(name) {
  return name.startsWith("select") && selected !== null ? selected.layer : name;
}

// ---- the panel

function addSwitch(name, title, color, on = true) {
  if (!on) hidden.add(name);
  const [label, box, swatch, count] = ["label", "input", "span", "span"].map((tag) => document.createElement(tag));
  box.type = "checkbox";
  box.id = `switch-${name}`;
  box.checked = on;
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(name);
    else hidden.add(name);
    requestDraw();
  });
  swatch.className = "swatch";
  swatch.style.background = `rgb(${color.join(",")})`;
  count.className = "count";
  count.id = `count-${name}`;
  label.append(box, swatch, document.createTextNode(title), count);
  element("switches").append(label);
}

function fillPanel() {
  const withPoints = data.frames.some(({ points }) => points !== null);
  if (withPoints) addSwitch("points", "points", data.scale[3]);
  // Cells would hide the points and boxes inside them, so they are shown at first only where there is no point.
  if (data.frames.some(({ cells }) => cells !== null)) addSwitch("cells", "occupied cells (colors: features)", [190, 190, 190], !withPoints);
  for (const [name, { title, color }] of Object.entries(data.layers)) addSwitch(name, title, color);
  element("frames-row").hidden = data.frames.length < 2;
  element("frame").max = String(data.frames.length - 1);
  const scored = data.frames.some(({ layers }) => layers.some(({ scores }) => scores.some((score) => score !== null)));
  element("score-row").hidden = !scored;
  element("color-row").hidden = !data.frames.some(({ points }) => points !== null && points.intensity !== null);
  element("rounding").textContent = data.rounding;
  element("source").textContent = data.source;
}

function listen() {
  let pressed = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pressed = { x: event.offsetX, y: event.offsetY, moved: 0, pans: event.button !== 0 || event.shiftKey };
  });
  canvas.addEventListener("pointermove", (event) => {
    if (pressed === null) return;
    const [dx, dy] = [event.offsetX - pressed.x, event.offsetY - pressed.y];
    Object.assign(pressed, { x: event.offsetX, y: event.offsetY, moved: pressed.moved + Math.abs(dx) + Math.abs(dy) });
    if (pressed.pans) camera.pan(dx, dy, canvas.clientHeight);
    else camera.orbit(dx, dy);
    cameraMoved();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (pressed !== null && pressed.moved < LOWEST_CLICK && !pressed.pans) pick(event.offsetX, event.offsetY);
    pressed = null;
  });
  canvas.addEventListener("pointercancel", () => (pressed = null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault()); // the right button moves the picture
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    camera.zoom(Math.exp(Math.sign(event.deltaY) * 0.12));
    cameraMoved();
  }, { passive: false });
  canvas.addEventListener("dblclick", () => {
    if (selected !== null) camera.lookAt(frame.layers.find(({ name }) => name === selected.layer).boxes[selected.index].slice(0, 3));
    requestDraw();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = data.frames.indexOf(frame) + (step || 0);
    if (step && next >= 0 && next < data.frames.length) showFrame(next);
    if (event.key === "Escape") select(null);
  });
  element("frame").addEventListener("input", (event) => showFrame(Number(event.target.value)));
  element("score").addEventListener("input", (event) => {
    element("score-text").textContent = Number(event.target.value).toFixed(2);
    if (painter.ready) frame.layers.forEach(putBoxes);
    select(null);
  });
  for (const id of ["size", "color"]) element(id).addEventListener("input", requestDraw);
  element("behind").addEventListener("click", () => (camera.fromBehind(), requestDraw()));
  element("above").addEventListener("click", () => (camera.fromAbove(), requestDraw()));
  element("turn").addEventListener("click", () => {
    turning = !turning;
    times.length = 0;
    element("turn").setAttribute("aria-pressed", String(turning));
    if (!turning) element("rate").textContent = "";
    requestDraw();
  });
  new ResizeObserver(requestDraw).observe(canvas);
}

// For tests, and for the browser's console.
window.viewer = {
  camera,
  showFrame,
  selected: () => selected,
  screenOf: (point) => camera.screenOf(point, canvas.clientWidth, canvas.clientHeight),
};

fillPanel();
listen();
showFrame(0);
