/**
 * How Node opens a shipped folder: the files lie on the disk, and `onnxruntime-node` opens graphs by their path.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import { InferenceSession, Tensor } from "onnxruntime-node";

import { graphFile, readShipped, verified } from "../training/shipped.js";

/** @import { Graphs } from "../training/graphs.js" */
/** @import { Shipped } from "../training/shipped.js" */

/**
 * Read `target.json` and verify every file: ONNX Runtime opens the graphs by itself, and the weights beside them.
 *
 * @param {string} folder
 * @returns {Promise<{shipped: Shipped, read: (path: string) => Promise<Uint8Array>}>}
 */
export async function openShipped(folder) {
  const shipped = await readShipped(await readFile(join(folder, "target.json")));
  const read = async (/** @type {string} */ path) => verified(shipped, path, await readFile(join(folder, path)));
  for (const { path } of shipped.files) await read(path);
  return { shipped, read };
}

/**
 * @param {string} folder
 * @param {Shipped} shipped
 * @returns {Promise<Graphs>}
 */
export async function openGraphs(folder, shipped) {
  const open = (/** @type {string} */ role) => InferenceSession.create(join(folder, graphFile(shipped, role)));
  return { Tensor, step: await open("step"), loss: await open("loss"), adamw: await open("adamw") };
}
