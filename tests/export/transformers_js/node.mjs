// node node.mjs MODULE MODELS JOB: prints what `predictions` gives, as JSON.

import { pathToFileURL } from "node:url";
import { predictions } from "./predictions.mjs";

const [, , module, models, job] = process.argv;
const library = await import(pathToFileURL(module));
process.stdout.write(JSON.stringify(await predictions(library, models, JSON.parse(job))));
