/**
 * The training loop: a step is one run of `step.onnx` and one of `adamw.onnx`. The values in between are ours.
 */

import { makeBatch } from "./batch.js";
import { numberOf, scalar } from "./graphs.js";

/** @import { Graphs, Tensors } from "./graphs.js" */
/** @import { Example } from "./encoder.js" */
/** @import { Shipped } from "./shipped.js" */

/** The two moments that AdamW keeps of every parameter. */
const MOMENTS = ["exp_avg", "exp_avg_sq"];

/**
 * @typedef {object} Optimizer
 * @property {number} weightDecay Decoupled, as AdamW has it.
 * @property {number} maxGradNorm Gradients are scaled down to this global 2-norm; 0 for no clipping.
 */

/** Learns one step after the other. */
export class Trainer {
  /** @type {Tensors} */
  #moments = {};
  #step = 0;

  /**
   * @param {Graphs} graphs
   * @param {Shipped} shipped
   * @param {Tensors} parameters First values of every LoRA parameter.
   * @param {Optimizer} optimizer
   */
  constructor(graphs, shipped, parameters, optimizer) {
    this.graphs = graphs;
    this.shipped = shipped;
    /** Values after the last step. */
    this.parameters = parameters;
    this.optimizer = optimizer;
    for (const [name, value] of Object.entries(parameters)) {
      for (const moment of MOMENTS) {
        this.#moments[`${name}.${moment}`] = new graphs.Tensor("float32", new Float32Array(value.size), value.dims);
      }
    }
  }

  /**
   * One optimizer step.
   *
   * @param {Example[]} examples The rows of its batch.
   * @param {number} learningRate
   * @returns {Promise<{loss: number, gradNorm: number}>} Loss before the update; global norm before clipping.
   * @throws {Error} Loss or norm is not finite. The step was not applied: the parameters are those before it.
   */
  async step(examples, learningRate) {
    const { Tensor, step, adamw } = this.graphs;
    const batch = makeBatch(Tensor, examples, this.shipped);
    const { loss, ...gradients } = await step.run({ ...batch, ...this.parameters, loss_scale: scalar(Tensor, 1) });
    const updated = await adamw.run({
      ...this.parameters,
      ...this.#moments,
      ...gradients,
      learning_rate: scalar(Tensor, learningRate),
      weight_decay: scalar(Tensor, this.optimizer.weightDecay),
      max_grad_norm: scalar(Tensor, this.optimizer.maxGradNorm),
      step: scalar(Tensor, this.#step + 1),
    });
    const result = { loss: numberOf(loss), gradNorm: numberOf(updated.grad_norm) };
    if (!Number.isFinite(result.loss) || !Number.isFinite(result.gradNorm)) {
      throw new Error(
        `step ${this.#step + 1}: loss ${result.loss}, gradient norm ${result.gradNorm}; the step was not applied, ` +
          "try a lower learning rate",
      );
    }
    this.parameters = next(this.parameters, updated);
    this.#moments = next(this.#moments, updated);
    this.#step += 1;
    return result;
  }
}

/**
 * @param {Tensors} state
 * @param {Readonly<Tensors>} updated
 * @returns {Tensors}
 */
function next(state, updated) {
  return Object.fromEntries(Object.keys(state).map((name) => [name, updated[`${name}.next`]]));
}
