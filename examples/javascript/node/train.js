/**
 * Train a target folder in Node, with `onnxruntime-node`:
 *
 *     node node/train.js TARGET --data rows.jsonl --output adapter --steps 100
 */

import { copyFile, mkdir, readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";

import { InferenceSession, Tensor } from "onnxruntime-node";

import { readAdapter, writeAdapter } from "../training/adapter.js";
import { answer } from "../training/answer.js";
import { openEncoder } from "../training/encoder.js";
import { parseRows } from "../training/rows.js";
import { batches, learningRate } from "../training/schedule.js";
import { graphFile, readTarget, verified } from "../training/target.js";
import { Trainer } from "../training/trainer.js";

/** @import { Graphs, Tensors } from "../training/graphs.js" */
/** @import { Target } from "../training/target.js" */

const USAGE = `usage: node node/train.js TARGET --data rows.jsonl --output adapter [options]
  --steps N             optimizer steps (default 100)
  --batch-size N        rows of a step (default 4)
  --learning-rate X     default: the target's
  --schedule NAME       constant, linear or cosine (default cosine)
  --weight-decay X      default: the target's
  --seed N              order of the rows (default 0)
  --no-shuffle          keep the order of the file
  --init-adapter FILE   adapter_model.safetensors to start from (default: the target's)
  --prompt TEXT         ask before and after`;

const MAX_NEW_TOKENS = 64;

/** @param {string} folder */
async function openTarget(folder) {
  const target = await readTarget(await readFile(join(folder, "target.json")));
  // ONNX Runtime opens the graphs by their path, and the weights beside them: so all is verified first.
  for (const { path } of target.files) await verified(target, path, await readFile(join(folder, path)));
  return target;
}

/**
 * @param {string} folder
 * @param {Target} target
 * @returns {Promise<Graphs>}
 */
async function openGraphs(folder, target) {
  const open = (/** @type {string} */ role) => InferenceSession.create(join(folder, graphFile(target, role)));
  return { Tensor, step: await open("step"), loss: await open("loss"), adamw: await open("adamw") };
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

  const target = await openTarget(folder);
  const encoder = await openEncoder(target, (path) => readFile(join(folder, path)));
  const examples = parseRows(await readFile(values.data, "utf-8")).map((row) => encoder.encode(row));
  const graphs = await openGraphs(folder, target);
  const first = values["init-adapter"] ?? join(folder, target.adapter.file);
  const parameters = readAdapter(Tensor, target, await readFile(first));
  const trainer = new Trainer(graphs, target, parameters, {
    weightDecay: Number(values["weight-decay"] ?? target.optimizer.weight_decay),
    maxGradNorm: target.optimizer.max_grad_norm,
  });

  /** @param {Tensors} parameters */
  async function say(parameters) {
    if (values.prompt === undefined) return;
    const prompt = encoder.encodePrompt([{ role: "user", content: values.prompt }]);
    const tokens = [];
    for await (const token of answer(graphs, target, parameters, prompt, MAX_NEW_TOKENS)) tokens.push(token);
    console.log(`answer: ${encoder.tokenizer.decode(tokens)}`);
  }

  await say(parameters);
  const steps = Number(values.steps);
  const peak = Number(values["learning-rate"] ?? target.optimizer.learning_rate);
  const drawn = batches(examples, Number(values["batch-size"]), values["no-shuffle"] ? null : Number(values.seed));
  for (let step = 0; step < steps; step++) {
    const rate = learningRate(values.schedule, peak, step, steps);
    const { loss, gradNorm } = await trainer.step(drawn.next().value, rate);
    console.log(`step ${step + 1}: loss ${loss.toFixed(6)}, gradient norm ${gradNorm.toFixed(6)}`);
  }
  await say(trainer.parameters);

  await mkdir(values.output);
  await writeFile(join(values.output, "adapter_model.safetensors"), writeAdapter(target, trainer.parameters));
  const config = "adapter_config.json";
  await copyFile(join(folder, dirname(target.adapter.file), config), join(values.output, config));
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
