/**
 * Everything that computes, apart from the page, so that the page never stalls.
 */

import { readAdapter, writeAdapter } from "../training/adapter.js";
import { answer } from "../training/answer.js";
import { IGNORED } from "../training/batch.js";
import { openEncoder } from "../training/encoder.js";
import { batches, learningRate } from "../training/schedule.js";
import { configFile } from "../training/shipped.js";
import { Trainer } from "../training/trainer.js";
import { answerCalls } from "./channel.js";
import { fetchShipped, openGraphs, threads } from "./environment.js";
import { forget, keep, readKept } from "./kept.js";

/** @import { Encoder } from "../training/encoder.js" */
/** @import { Graphs, Tensors } from "../training/graphs.js" */
/** @import { Row } from "../training/rows.js" */
/** @import { Shipped } from "../training/shipped.js" */
/** @import { Progress } from "./channel.js" */

/**
 * @typedef {object} Settings
 * @property {number} steps
 * @property {number} batchSize
 * @property {number} learningRate
 * @property {string} schedule
 * @property {boolean} shuffle
 */

const MAX_NEW_TOKENS = 64;
const SEED = 0;
/** How often the question is asked while training goes on. */
const ANSWERS_ON_THE_WAY = 6;

/** @type {Shipped} */
let shipped;
/** @type {(path: string) => Promise<Uint8Array>} */
let read;
/** @type {Graphs} */
let graphs;
/** @type {Encoder} */
let encoder;
/** The parameters that change nothing, and those that were learnt. @type {{base: Tensors, learnt: Tensors}} */
let parameters;
let isStopped = false;

/** @param {Progress} progress */
async function open(progress) {
  ({ shipped, read } = await fetchShipped(new URL("./target/", self.location.href).href, (path, received, size) =>
    progress({ path, received, size }),
  ));
  progress({ files: [...shipped.weights, ...shipped.graphs.map((graph) => graph.file)] });
  encoder = await openEncoder(shipped, read);
  const first = await read(shipped.adapter.file);
  graphs = await openGraphs(shipped, read);
  const base = readAdapter(graphs.Tensor, shipped, first);
  const kept = await readKept(shipped);
  parameters = { base, learnt: kept ? readAdapter(graphs.Tensor, shipped, kept) : base };
  return {
    name: shipped.base.name,
    weights: shipped.base.weights,
    bytes: shipped.files.reduce((sum, file) => sum + file.size, 0),
    trainable: Object.values(base).reduce((sum, tensor) => sum + tensor.size, 0),
    learningRate: shipped.optimizer.learning_rate,
    hasLearnt: kept !== null,
    threads: threads(),
  };
}

/**
 * The tokens of rows, and which of them are trained.
 *
 * @param {{rows: Row[]}} request
 */
function tokens({ rows }) {
  return rows.map((row) => {
    try {
      const { inputIds, labels } = encoder.encode(row);
      const pieces = inputIds.map((id, index) => ({
        text: encoder.tokenizer.shown(id),
        isTrained: index > 0 && labels[index] !== IGNORED,
      }));
      return { pieces };
    } catch (error) {
      return { error: error instanceof Error ? error.message : String(error) };
    }
  });
}

/**
 * @param {{question: string, isBase: boolean}} request
 * @param {Progress} progress Hears the answer as it grows.
 * @returns {Promise<string>}
 */
function ask({ question, isBase }, progress) {
  return answerTo(question, isBase ? parameters.base : parameters.learnt, progress);
}

/**
 * @param {string} question
 * @param {Tensors} values
 * @param {Progress} progress
 */
async function answerTo(question, values, progress) {
  const prompt = encoder.encodePrompt([{ role: "user", content: question }]);
  /** @type {number[]} */
  const ids = [];
  for await (const id of answer(graphs, shipped, values, prompt, MAX_NEW_TOKENS)) {
    ids.push(id);
    progress(encoder.tokenizer.decode(ids));
  }
  return encoder.tokenizer.decode(ids);
}

/**
 * @param {{rows: Row[], question: string, settings: Settings}} request
 * @param {Progress} progress Hears the loss of every step, and now and then what the answer is by then.
 * @returns {Promise<boolean>} Whether what was learnt is kept.
 */
async function train({ rows, question, settings }, progress) {
  const { steps, batchSize } = settings;
  const examples = encoder.encodeAll(rows);
  const trainer = new Trainer(graphs, shipped, parameters.learnt, {
    weightDecay: shipped.optimizer.weight_decay,
    maxGradNorm: shipped.optimizer.max_grad_norm,
  });
  const drawn = batches(examples, batchSize, settings.shuffle ? SEED : null);
  const every = Math.max(1, Math.ceil(steps / ANSWERS_ON_THE_WAY));
  try {
    for (let step = 1; step <= steps && !isStopped; step++) {
      const rate = learningRate(settings.schedule, settings.learningRate, step - 1, steps);
      const { loss, gradNorm } = await trainer.step(drawn.next().value, rate);
      parameters.learnt = trainer.parameters;
      progress({ step, loss, gradNorm });
      await new Promise((resolve) => setTimeout(resolve)); // lets a call of stop come through
      if (step % every === 0 && step < steps && !isStopped) {
        progress({ step, answer: await answerTo(question, parameters.learnt, () => {}) });
      }
    }
  } finally {
    isStopped = false; // a call of stop holds for one training, even when it comes before the first step
  }
  return keep(shipped, writeAdapter(shipped, parameters.learnt));
}

answerCalls({
  open: (_, progress) => open(progress),
  tokens,
  ask,
  train,
  stop() {
    isStopped = true;
  },
  async forget() {
    parameters.learnt = parameters.base;
    await forget(shipped);
  },
  async adapter() {
    return { weights: writeAdapter(shipped, parameters.learnt), config: await read(configFile(shipped)) };
  },
});
