// The page: takes an image, asks the worker, and shows what it answers. Names of classes and files are put in as text alone.

import { closeCamera, openCamera, photo } from "./camera.js";
import { classesOfCell, coveringClasses, frame, paint, place } from "./overlay.js";

const MAX_MEGAPIXELS = 50;
const HINT = "Point at a cell, tap it, or use the arrow keys to see its classes.";
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const percent = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const part = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map(); // number of a question -> what to do with its answer

let models = [];
let model = null; // that is loaded
let file = null; // the image that is shown, with its name
let result = null; // of that image
let classes = []; // of its cells
let pinned = null; // a class that is shown alone
let cell = null; // that is pointed at
let turn = 0; // counts what the user asked for, so that late answers to former questions are dropped

// The worker

let isWorkerReady;
const workerReady = new Promise((resolve, reject) => {
  isWorkerReady = resolve;
  worker.onerror = (event) => {
    event.preventDefault();
    reject(new Error("a file of worker.js, pixels.js, predictions.js or runtime/ is missing or damaged; copy the folder again"));
  };
});

worker.onmessage = ({ data }) => {
  if (data.isReady) return isWorkerReady();
  const { resolve, reject, onProgress } = waiting.get(data.id);
  if ("progress" in data) return onProgress(data.progress);
  waiting.delete(data.id);
  if ("error" in data) reject(new Error(data.error));
  else resolve(data.result);
};

async function ask(question, onProgress) {
  await workerReady;
  return new Promise((resolve, reject) => {
    const id = waiting.size ? Math.max(...waiting.keys()) + 1 : 0;
    waiting.set(id, { resolve, reject, onProgress });
    worker.postMessage({ id, ...question });
  });
}

// Messages

function say(text, isError = false) {
  part("message").textContent = text;
  part("message").className = isError ? "message" : "quiet";
}

function nameOf(index) {
  return model.classes[index] ?? `class ${index}`;
}

function plural(count, word) {
  return `${whole.format(count)} ${word}${count === 1 ? "" : "es"}`;
}

// Models

async function chooseModel(wanted) {
  const mine = (turn += 1);
  forget();
  model = null;
  part("facts").textContent = "";
  say(`Loading ${wanted.name} …`);
  const bar = part("progress");
  bar.hidden = false;
  bar.value = 0;
  try {
    await ask({ load: wanted }, (share) => {
      if (mine === turn) bar.value = share;
    });
  } catch (error) {
    if (mine === turn) say(`The model ${wanted.name} cannot be loaded: ${error.message}.`, true);
    return;
  } finally {
    if (mine === turn) bar.hidden = true;
  }
  if (mine !== turn) return;
  model = wanted;
  const megabytes = (model.bytes / 1e6).toFixed(model.bytes < 1e7 ? 1 : 0);
  part("facts").textContent = `${model.name}: ${plural(model.classes.length, "class")}, ${model.dtype}, ${megabytes} MB`;
  if (file) await look(mine);
  else say("Ready.");
}

async function start() {
  part("not-started").remove();
  document.querySelector("main").hidden = false;
  try {
    const response = await fetch("models.json");
    if (!response.ok) throw new Error(`the server answers ${response.status}`);
    models = await response.json();
  } catch (error) {
    say(`The list of models, models.json, cannot be read: ${error.message}.`, true);
    return;
  }
  part("model").append(...models.map(({ name }, index) => new Option(name, index)));
  part("model-choice").hidden = models.length < 2;
  part("model").onchange = () => chooseModel(models[part("model").value]);
  await chooseModel(models[0]);
}

// Images

/** Shows an image and what the model says of it. */
async function show(blob, name) {
  const mine = (turn += 1);
  leaveCamera();
  forget();
  file = null;
  part("picture").hidden = true;
  part("empty").hidden = false;
  const image = part("image");
  URL.revokeObjectURL(image.src);
  try {
    await new Promise((resolve, reject) => {
      Object.assign(image, { onload: resolve, onerror: reject, src: URL.createObjectURL(blob) });
    });
  } catch {
    if (mine === turn) say(`${name} cannot be read as an image: it is none, damaged, or of a kind that this browser does not know.`, true);
    return;
  }
  if (mine !== turn) return;
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width * height > 1e6 * MAX_MEGAPIXELS) {
    say(`${name} has ${width} x ${height} pixels, more than ${MAX_MEGAPIXELS} million. Make it smaller first.`, true);
    return;
  }
  image.alt = `The image ${name}`;
  part("picture").style.setProperty("--ratio", width / height);
  part("picture").hidden = false;
  part("empty").hidden = true;
  file = { blob, name, width, height };
  if (model) await look(mine);
}

/** Asks the model about the image that is shown. */
async function look(mine) {
  const { blob, name, width, height } = file;
  say(`Looking at ${name} …`);
  part("stage").classList.add("busy");
  try {
    const answer = await ask({ blob });
    if (mine !== turn) return;
    result = answer;
    say(`${name}, ${width} x ${height} pixels: ${whole.format(answer.milliseconds)} ms`);
    showClasses();
    showCells();
  } catch (error) {
    if (mine === turn) {
      part("picture").hidden = true;
      part("empty").hidden = false;
      file = null;
      say(`${name} ${error.message}`, true);
    }
  } finally {
    if (mine === turn) part("stage").classList.remove("busy");
  }
}

/** Takes away what was said of an image. */
function forget() {
  result = pinned = cell = null;
  classes = [];
  for (const id of ["classes", "legend", "cells", "seen", "cursor", "overlay-choice"]) part(id).hidden = true;
  for (const id of ["readout", "cells-note"]) part(id).textContent = "";
  part("picture").classList.remove("painted");
  part("stage").classList.remove("busy");
}

// Results

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function showClasses() {
  part("classes").hidden = !result.best;
  if (!result.best) return;
  const rows = result.best.map(({ index, share }) => {
    const bar = element("div", { className: "bar" });
    bar.style.setProperty("--share", share);
    const name = element("span", { className: "name", textContent: nameOf(index) });
    const number = element("span", { className: "number", textContent: percent.format(share) });
    return element("li", { className: model.is_multi_label && share < 0.5 ? "unlikely" : "" }, name, number, bar);
  });
  part("best").replaceChildren(...rows);
  part("classes-note").textContent = model.is_multi_label
    ? "An image may have several classes: each has a probability of its own."
    : "";
}

function showCells() {
  const { cells } = result;
  if (!cells) {
    part("cells-note").textContent = "This model has no trained patch head: it says what is in an image, not where.";
    return;
  }
  classes = coveringClasses(cells, model.classes.length, !result.best);
  const title = result.best ? "Patch predictions" : "What is where";
  part("legend-title").textContent = part("overlay-name").textContent = title;
  part("legend-note").textContent = result.best ? "share of the cells" : "share of the image";
  part("cells").setAttribute("aria-label", `${title}; the arrow keys go from cell to cell`);
  part("overlay-choice").hidden = false;
  place(part("seen"), cells.box);
  const named = classes.filter(({ isNamed }) => isNamed);
  part("names").replaceChildren(...named.map(legendEntry));
  const strongest = cells.shares.reduce((a, b) => Math.max(a, b), 0);
  const others = classes.length - named.length;
  part("cells-note").textContent = [
    classes.length ? "" : `No cell stands out: at most ${percent.format(strongest)}.`,
    others ? `In light gray: ${plural(others, "further class")}.` : "",
  ].join("");
  showOverlay();
}

function legendEntry({ index, color, share }) {
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = color;
  const name = element("span", { className: "name", textContent: nameOf(index) });
  const number = element("span", { className: "number", textContent: percent.format(share) });
  const button = element("button", { type: "button", title: "Show this class alone" }, swatch, name, number);
  button.setAttribute("aria-pressed", "false");
  button.onclick = () => {
    pinned = pinned === index ? null : index;
    for (const other of part("names").querySelectorAll("button")) {
      other.setAttribute("aria-pressed", String(other === button && pinned === index));
    }
    repaint(pinned);
  };
  button.onpointerenter = () => repaint(index);
  button.onpointerleave = () => repaint(pinned);
  return element("li", {}, button);
}

function repaint(only) {
  paint(part("cells"), result.cells, classes, only, !result.best);
}

/** Shows or hides the cells, as the switch says. */
function showOverlay() {
  const isShown = part("overlay").checked && Boolean(result?.cells);
  for (const id of ["cells", "seen"]) part(id).hidden = !isShown;
  part("legend").hidden = !isShown || !classes.length;
  part("picture").classList.toggle("painted", isShown && classes.length > 0);
  leaveCell();
  if (isShown) repaint(pinned);
  else part("readout").textContent = "";
}

function pointAt(at) {
  cell = at;
  frame(part("cursor"), result.cells, cell);
  const found = classesOfCell(result.cells, cell);
  part("readout").textContent = found.map(({ index, share }) => `${nameOf(index)} ${percent.format(share)}`).join(" · ");
}

function leaveCell() {
  cell = null;
  part("cursor").hidden = true;
  part("readout").textContent = HINT;
}

part("overlay").onchange = showOverlay;
part("cells").onpointermove = part("cells").onpointerdown = (event) => {
  const { rows, columns } = result.cells;
  const { left, top, width, height } = part("cells").getBoundingClientRect();
  const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - left) / width) * columns)));
  const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - top) / height) * rows)));
  pointAt(row * columns + column);
};
part("cells").onpointerleave = (event) => {
  if (event.pointerType === "mouse") leaveCell();
};
part("cells").onblur = leaveCell;
part("cells").onkeydown = (event) => {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  const { rows, columns } = result.cells;
  const [row, column] = cell === null ? [rows >> 1, columns >> 1] : [Math.floor(cell / columns) + step[0], (cell % columns) + step[1]];
  if (row >= 0 && row < rows && column >= 0 && column < columns) pointAt(row * columns + column);
};

// Where images come from

function showFirst(files, missing) {
  if (files.length) show(files[0], files[0].name || "The image");
  else say(missing, true);
}

part("choose").onclick = () => part("file").click();
part("file").onchange = () => {
  if (part("file").files.length) showFirst(part("file").files);
  part("file").value = ""; // so that the same file can be chosen again
};
document.ondragover = (event) => {
  event.preventDefault();
  part("stage").classList.add("over");
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) part("stage").classList.remove("over");
};
document.ondrop = (event) => {
  event.preventDefault();
  part("stage").classList.remove("over");
  showFirst(event.dataTransfer.files, "That is no file. Save the image first, then drop its file.");
};
document.onpaste = (event) => showFirst(event.clipboardData.files, "There is no image on the clipboard.");

function showCameraButtons(isOpen) {
  for (const id of ["video", "capture", "cancel"]) part(id).hidden = !isOpen;
  for (const id of ["choose", "camera"]) part(id).hidden = isOpen;
  part("empty").hidden = isOpen || Boolean(file);
  part("picture").hidden = isOpen || !file;
}

function leaveCamera() {
  closeCamera(part("video"));
  showCameraButtons(false);
}

part("camera").onclick = async () => {
  try {
    await openCamera(part("video"));
    showCameraButtons(true);
    part("capture").focus();
  } catch (error) {
    say(error.message, true);
  }
};
part("cancel").onclick = leaveCamera;
part("capture").onclick = async () => show(await photo(part("video")), "The photo");

start();
