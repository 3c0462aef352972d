// What transformers.js says of images by the model of a folder, without a network.

/**
 * @param {object} library Module of transformers.js.
 * @param {string} models Path or address of the folder that has the model's.
 * @param {{name: string, task: string, images: string[], dtype: (string|undefined)}} job Name of the model's folder; paths or addresses of images.
 * @returns {Promise<{answers: object[], warnings: string[]}>} Of a classifier the probability of each class name for each image, of a
 *   segmentation model the number of the class at each pixel, and what was warned of.
 */
export async function predictions(library, models, { name, task, images, dtype }) {
  const { pipeline, env } = library;
  const warnings = [];
  console.warn = console.error = (...words) => warnings.push(words.join(" "));
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: models });
  const run = await pipeline(task, name, dtype ? { dtype } : {});
  const answers = [];
  for (const image of images) {
    const answer = await run(image, { top_k: null });
    answers.push(task === "image-segmentation" ? classMap(answer, run.model.config.label2id) : shares(answer));
  }
  return { answers, warnings };
}

function shares(answer) {
  return Object.fromEntries(answer.map(({ label, score }) => [label, score]));
}

function classMap(answer, label2id) {
  const { width, height } = answer[0].mask;
  const classes = new Array(width * height).fill(-1);
  for (const { label, mask } of answer) {
    mask.data.forEach((value, index) => value && (classes[index] = label2id[label]));
  }
  return { width, height, classes };
}
