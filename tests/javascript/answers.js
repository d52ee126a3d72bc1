// Prompts (token ids) in, the answers of a shipped folder's base out.

import { text } from "node:stream/consumers";

import { openGraphs, openShipped } from "../../examples/javascript/node/environment.js";
import { readAdapter } from "../../examples/javascript/training/adapter.js";
import { answer } from "../../examples/javascript/training/answer.js";

const [folder] = process.argv.slice(2);
const { shipped, read } = await openShipped(folder);
const graphs = await openGraphs(folder, shipped);
const parameters = readAdapter(graphs.Tensor, shipped, await read(shipped.adapter.file));
const answers = [];
for (const prompt of JSON.parse(await text(process.stdin))) {
  const ids = [];
  for await (const id of answer(graphs, shipped, parameters, prompt, 24)) ids.push(id);
  answers.push(ids);
}
console.log(JSON.stringify(answers));
