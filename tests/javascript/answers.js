// Prompts (token ids) in, the answers of a target's base out.

import { text } from "node:stream/consumers";

import { openGraphs, openTarget } from "../../examples/javascript/node/environment.js";
import { readAdapter } from "../../examples/javascript/training/adapter.js";
import { answer } from "../../examples/javascript/training/answer.js";

const [folder] = process.argv.slice(2);
const { target, read } = await openTarget(folder);
const graphs = await openGraphs(folder, target);
const parameters = readAdapter(graphs.Tensor, target, await read(target.adapter.file));
const answers = [];
for (const prompt of JSON.parse(await text(process.stdin))) {
  const ids = [];
  for await (const id of answer(graphs, target, parameters, prompt, 24)) ids.push(id);
  answers.push(ids);
}
console.log(JSON.stringify(answers));
