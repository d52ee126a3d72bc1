/**
 * How a graph is run, in Node and in the browser alike: `onnxruntime-node` and `onnxruntime-web` share these types.
 */

/** @typedef {import("onnxruntime-common").Tensor} Tensor */
/** @typedef {import("onnxruntime-common").TensorConstructor} TensorClass */
/** @typedef {import("onnxruntime-common").InferenceSession} Session */
/** @typedef {Record<string, Tensor>} Tensors Tensors by the graphs' names. */

/**
 * The environment's ONNX Runtime, with the three graphs of a shipped folder open.
 *
 * @typedef {object} Graphs
 * @property {TensorClass} Tensor
 * @property {Session} step Loss and gradients.
 * @property {Session} loss Loss and the most probable tokens.
 * @property {Session} adamw The optimizer.
 */

/**
 * A number as the graphs take it.
 *
 * @param {TensorClass} Tensor
 * @param {number} value
 */
export function scalar(Tensor, value) {
  return new Tensor("float32", Float32Array.of(value), [1]);
}

/**
 * The number in a float tensor of one element.
 *
 * @param {Tensor} tensor
 */
export function numberOf(tensor) {
  return /** @type {Float32Array} */ (tensor.data)[0];
}
