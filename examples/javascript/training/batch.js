/**
 * What the training graphs take: docs/native.md, "The training step".
 */

/** @import { Tensors, TensorClass } from "./graphs.js" */
/** @import { Example } from "./encoder.js" */
/** @import { Rope, Shipped } from "./shipped.js" */

/** Label of a position where nothing is trained. */
export const IGNORED = -100;
/** Added to the attention scores of positions that must not be looked at. */
const MASKED = -10000;

/**
 * Lay rows out, one below the other, padded on the right to the longest.
 *
 * @param {TensorClass} Tensor
 * @param {Example[]} examples B rows, at least one.
 * @param {Shipped} shipped
 * @returns {Tensors} `input_ids`, `labels` (B, T); `attn_bias` (B, 1, T, T); `rope_cos`, `rope_sin` (B, T, R).
 */
export function makeBatch(Tensor, examples, shipped) {
  const batch = examples.length;
  const lengths = examples.map((example) => example.inputIds.length);
  const positions = Math.max(...lengths);
  const inputIds = new BigInt64Array(batch * positions).fill(BigInt(shipped.tokenizer.pad_token_id));
  const labels = new BigInt64Array(batch * positions).fill(BigInt(IGNORED));
  examples.forEach((example, row) => {
    inputIds.set(example.inputIds.map(BigInt), row * positions);
    // The label of a position is the token that shall follow it.
    labels.set(example.labels.slice(1).map(BigInt), row * positions);
  });
  const bias = attentionBias(positions, shipped.architecture.sliding_window);
  const { cos, sin } = ropeTables(shipped.architecture.rope, positions);
  const rotated = [batch, positions, shipped.architecture.rope.dim];
  return {
    input_ids: new Tensor("int64", inputIds, [batch, positions]),
    labels: new Tensor("int64", labels, [batch, positions]),
    attn_bias: new Tensor("float32", repeat(bias, batch), [batch, 1, positions, positions]),
    rope_cos: new Tensor("float32", repeat(cos, batch), rotated),
    rope_sin: new Tensor("float32", repeat(sin, batch), rotated),
  };
}

/**
 * Where a position may look: at itself and back. Padding stands on the right, so nothing that counts sees it.
 *
 * @param {number} positions
 * @param {number | null} slidingWindow Positions that a token looks back on, itself included.
 * @returns {Float32Array} (T, T): row t holds 0 where t may look, −10000 elsewhere.
 */
function attentionBias(positions, slidingWindow) {
  const bias = new Float32Array(positions * positions).fill(MASKED);
  for (let query = 0; query < positions; query++) {
    const first = slidingWindow === null ? 0 : Math.max(0, query - slidingWindow + 1);
    bias.fill(0, query * positions + first, query * positions + query + 1);
  }
  return bias;
}

/**
 * Rotary position embedding. Rounded to float32 after every operation, as Python does it.
 *
 * @param {Rope} rope
 * @param {number} positions As many as the longest row has tokens: it decides which factors longrope takes.
 * @returns {{cos: Float32Array, sin: Float32Array}} (T, R) each; both halves of R hold the same angles.
 */
function ropeTables(rope, positions) {
  const factors = positions > rope.original_max_position_embeddings ? rope.long_factor : rope.short_factor;
  const half = rope.dim / 2;
  const cos = new Float32Array(positions * rope.dim);
  const sin = new Float32Array(positions * rope.dim);
  const scale = Math.fround(rope.attention_factor);
  for (let index = 0; index < half; index++) {
    const power = Math.fround(rope.theta ** Math.fround((2 * index) / rope.dim));
    const frequency = Math.fround(1 / Math.fround(Math.fround(factors?.[index] ?? 1) * power));
    for (let position = 0; position < positions; position++) {
      const angle = Math.fround(position * frequency);
      for (const place of [position * rope.dim + index, position * rope.dim + half + index]) {
        cos[place] = Math.fround(Math.cos(angle)) * scale;
        sin[place] = Math.fround(Math.sin(angle)) * scale;
      }
    }
  }
  return { cos, sin };
}

/**
 * @param {Float32Array} values
 * @param {number} times
 */
function repeat(values, times) {
  const repeated = new Float32Array(values.length * times);
  for (let time = 0; time < times; time++) repeated.set(values, time * values.length);
  return repeated;
}
