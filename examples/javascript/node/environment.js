/**
 * How Node opens a target: files lie in a folder, and `onnxruntime-node` opens graphs by their path.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import { InferenceSession, Tensor } from "onnxruntime-node";

import { graphFile, readTarget, verified } from "../training/target.js";

/** @import { Graphs } from "../training/graphs.js" */
/** @import { Target } from "../training/target.js" */

/**
 * Read `target.json` and verify every file: ONNX Runtime opens the graphs by itself, and the weights beside them.
 *
 * @param {string} folder
 * @returns {Promise<{target: Target, read: (path: string) => Promise<Uint8Array>}>}
 */
export async function openTarget(folder) {
  const target = await readTarget(await readFile(join(folder, "target.json")));
  const read = async (/** @type {string} */ path) => verified(target, path, await readFile(join(folder, path)));
  for (const { path } of target.files) await read(path);
  return { target, read };
}

/**
 * @param {string} folder
 * @param {Target} target
 * @returns {Promise<Graphs>}
 */
export async function openGraphs(folder, target) {
  const open = (/** @type {string} */ role) => InferenceSession.create(join(folder, graphFile(target, role)));
  return { Tensor, step: await open("step"), loss: await open("loss"), adamw: await open("adamw") };
}
