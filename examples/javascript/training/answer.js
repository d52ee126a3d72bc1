/**
 * Answers, without another graph: `loss.onnx` gives the most probable token after every position.
 */

import { IGNORED, makeBatch } from "./batch.js";

/** @import { Graphs, Tensors } from "./graphs.js" */
/** @import { Shipped } from "./shipped.js" */

/**
 * Answer greedily, a token at a time. Every token computes the whole text again: fit for short answers.
 *
 * @param {Graphs} graphs
 * @param {Shipped} shipped
 * @param {Tensors} parameters LoRA parameters.
 * @param {number[]} promptIds
 * @param {number} maxNewTokens
 * @returns {AsyncGenerator<number, void>} Token ids.
 */
export async function* answer(graphs, shipped, parameters, promptIds, maxNewTokens) {
  const inputIds = [...promptIds];
  for (let count = 0; count < maxNewTokens; count++) {
    const labels = inputIds.map(() => IGNORED); // the loss is of no interest here
    const batch = makeBatch(graphs.Tensor, [{ inputIds, labels }], shipped);
    const { predictions } = await graphs.loss.run({ ...batch, ...parameters }, ["predictions"]);
    const token = Number(/** @type {BigInt64Array} */ (predictions.data)[inputIds.length - 1]);
    if (shipped.tokenizer.stop_token_ids.includes(token)) return;
    yield token;
    inputIds.push(token);
  }
}
