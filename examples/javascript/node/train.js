/**
 * Train a shipped folder in Node. Run it without arguments to see its options.
 */

import { mkdtemp, readFile, rename, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { readAdapter, writeAdapter } from "../training/adapter.js";
import { answer } from "../training/answer.js";
import { openEncoder } from "../training/encoder.js";
import { parseRows } from "../training/rows.js";
import { batches, learningRate } from "../training/schedule.js";
import { configFile } from "../training/shipped.js";
import { Trainer } from "../training/trainer.js";
import { openGraphs, openShipped } from "./environment.js";

const USAGE = `usage: node node/train.js FOLDER --data rows.jsonl --output adapter [options]
  --steps N             optimizer steps (default 100)
  --batch-size N        rows of a step (default 4)
  --learning-rate X     default: the shipped folder's
  --schedule NAME       constant, linear or cosine (default cosine)
  --weight-decay X      default: the shipped folder's
  --seed N              order of the rows (default 0)
  --no-shuffle          keep the order of the file
  --init-adapter FILE   adapter_model.safetensors to start from (default: the shipped folder's)
  --prompt TEXT         ask before and after`;
const MAX_NEW_TOKENS = 64;

/**
 * @param {string} name
 * @param {string | number} text
 * @param {number} least
 */
function number(name, text, least) {
  const value = Number(text);
  if (!(value >= least && value < Infinity))
    throw new Error(`--${name} is ${text}, expected a number from ${least} on`);
  return value;
}

async function main() {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: {
      data: { type: "string" },
      output: { type: "string" },
      steps: { type: "string", default: "100" },
      "batch-size": { type: "string", default: "4" },
      "learning-rate": { type: "string" },
      schedule: { type: "string", default: "cosine" },
      "weight-decay": { type: "string" },
      seed: { type: "string", default: "0" },
      "no-shuffle": { type: "boolean", default: false },
      "init-adapter": { type: "string" },
      prompt: { type: "string" },
    },
  });
  const [folder] = positionals;
  if (positionals.length !== 1 || !values.data || !values.output) throw new Error(USAGE);

  if (await stat(values.output).catch(() => null))
    throw new Error(`${values.output} is already there; choose another name`);

  const { shipped, read } = await openShipped(folder);
  const encoder = await openEncoder(shipped, read);
  const examples = encoder.encodeAll(parseRows(await readFile(values.data, "utf-8")));
  const steps = number("steps", values.steps, 1);
  const peak = number("learning-rate", values["learning-rate"] ?? shipped.optimizer.learning_rate, 0);
  const seed = values["no-shuffle"] ? null : number("seed", values.seed, 0);
  const drawn = batches(examples, number("batch-size", values["batch-size"], 1), seed);

  const graphs = await openGraphs(folder, shipped);
  const first = await (values["init-adapter"] ? readFile(values["init-adapter"]) : read(shipped.adapter.file));
  const trainer = new Trainer(graphs, shipped, readAdapter(graphs.Tensor, shipped, first), {
    weightDecay: number("weight-decay", values["weight-decay"] ?? shipped.optimizer.weight_decay, 0),
    maxGradNorm: shipped.optimizer.max_grad_norm,
  });

  async function say() {
    if (values.prompt === undefined) return;
    const prompt = encoder.encodePrompt([{ role: "user", content: values.prompt }]);
    const tokens = [];
    for await (const token of answer(graphs, shipped, trainer.parameters, prompt, MAX_NEW_TOKENS)) tokens.push(token);
    console.log(`answer: ${encoder.tokenizer.decode(tokens)}`);
  }

  await say();
  for (let step = 0; step < steps; step++) {
    const rate = learningRate(values.schedule, peak, step, steps);
    const { loss, gradNorm } = await trainer.step(drawn.next().value, rate);
    console.log(`step ${step + 1}: loss ${loss.toFixed(6)}, gradient norm ${gradNorm.toFixed(6)}`);
  }
  await say();

  const partial = await mkdtemp(`${values.output}.`); // nobody shall find half an adapter
  await writeFile(join(partial, "adapter_model.safetensors"), writeAdapter(shipped, trainer.parameters));
  await writeFile(join(partial, "adapter_config.json"), await read(configFile(shipped)));
  await rename(partial, values.output);
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
