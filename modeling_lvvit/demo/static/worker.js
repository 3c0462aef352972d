// Loads a model and runs it on images, away from the page, which stays responsive.

import * as ort from "./runtime/ort.wasm.min.mjs";
import { imagePixels } from "./pixels.js";
import { bestClasses, patchCells, segmentCells } from "./predictions.js";

ort.env.wasm.wasmPaths = new URL("runtime/", self.location.href).href;
ort.env.logLevel = "error";

let session = null;
let model = null;

/** The bytes of a file of the folder, with news of how many have come. */
async function fileBytes(path, size, onProgress) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`the server answers ${response.status} for ${path}`);
  const bytes = new Uint8Array(size);
  let loaded = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (loaded + part.value.length <= size) bytes.set(part.value, loaded);
    loaded += part.value.length;
    onProgress(Math.min(1, loaded / size));
  }
  if (loaded !== size) throw new Error(`${path} has ${loaded} bytes, expected ${size}; copy the folder again`);
  return bytes;
}

async function load(wanted, onProgress) {
  await session?.release();
  session = null;
  const bytes = await fileBytes(wanted.file, wanted.bytes, onProgress);
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  model = wanted;
}

async function predict(blob) {
  const { values, height, width } = await imagePixels(blob);
  const input = new ort.Tensor("float32", values, [1, 3, height, width]);
  const start = performance.now();
  const outputs = await session.run({ pixel_values: input });
  const milliseconds = performance.now() - start;
  const { data, dims } = outputs.logits;
  if (dims.length === 4) {
    return { milliseconds, best: null, cells: segmentCells(data, dims.slice(1), height, width) };
  }
  const best = bestClasses(data, model.is_multi_label);
  const cells = model.grid
    ? patchCells(outputs.patch_logits.data, model.grid, dims[1], model.is_multi_label, Array.from(outputs.crop_box.data))
    : null;
  return { milliseconds, best, cells };
}

/** What to say after the name of an image whose prediction failed. */
function reason(error) {
  if (error.name === "InvalidStateError" || error.name === "EncodingError") {
    return "cannot be read as an image: it is damaged, or of a kind that this browser does not know.";
  }
  const text = error.message ?? String(error);
  if (error instanceof RangeError || text.includes("bad_alloc")) return "is too large for the memory of this browser. Make it smaller first.";
  return `is refused: ${text}`;
}

async function answer({ id, load: wanted, blob }) {
  try {
    if (wanted) await load(wanted, (share) => self.postMessage({ id, progress: share }));
    self.postMessage({ id, result: blob ? await predict(blob) : null });
  } catch (error) {
    self.postMessage({ id, error: blob ? reason(error) : (error.message ?? String(error)) });
  }
}

let last = Promise.resolve();
self.onmessage = ({ data }) => {
  last = last.then(() => answer(data)); // one at a time
};
self.postMessage({ isReady: true });
