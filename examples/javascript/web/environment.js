/**
 * How a browser opens a shipped folder: files are fetched from the page's own server, verified, and given to
 * `onnxruntime-web`.
 */

import { InferenceSession, Tensor, env } from "onnxruntime-web/wasm";

import { fileOf, graphFile, readShipped, verified } from "../training/shipped.js";

/** @import { Graphs } from "../training/graphs.js" */
/** @import { Shipped } from "../training/shipped.js" */

/**
 * Up to so many bytes of weights, int4 is turned into float when a graph is opened, which takes eight times the memory
 * and makes answers three times as fast and steps twice; beyond, in every run.
 */
const UNPACKED_WEIGHTS = 64e6;

// ONNX Runtime's module lies beside this script; see build.js.
env.wasm.wasmPaths = new URL("./", self.location.href).href;

/** @typedef {(path: string, received: number, size: number) => void} OnFile Hears how much of a file is there. */

/**
 * Fetch `target.json` and every file that training needs.
 *
 * @param {string} base Where the shipped folder lies, with a slash at the end.
 * @param {OnFile} onFile
 * @returns {Promise<{shipped: Shipped, read: (path: string) => Promise<Uint8Array>}>}
 */
export async function fetchShipped(base, onFile) {
  const shipped = await readShipped(new Uint8Array(await (await get(`${base}target.json`)).arrayBuffer()));
  return {
    shipped,
    async read(path) {
      const { size, sha256 } = fileOf(shipped, path);
      // The hash in the address lets offline.js keep the file as long as it is this one.
      const response = await get(`${base}${path}?sha256=${sha256}`);
      const bytes = await receive(response, size, (received) => onFile(path, received, size));
      return verified(shipped, path, bytes);
    },
  };
}

/**
 * Open the three graphs. Their weights are handed over by name, because a browser has no folder to look into.
 *
 * @param {Shipped} shipped
 * @param {(path: string) => Promise<Uint8Array>} read
 * @returns {Promise<Graphs>}
 */
export async function openGraphs(shipped, read) {
  /** @type {{path: string, data: Uint8Array}[]} */
  const weights = [];
  for (const path of shipped.weights) weights.push({ path: nameOf(path), data: await read(path) });
  const size = weights.reduce((sum, { data }) => sum + data.length, 0);
  const open = async (/** @type {string} */ role) =>
    InferenceSession.create(await read(graphFile(shipped, role)), {
      executionProviders: ["wasm"],
      externalData: role === "adamw" ? [] : weights,
      // Without quantisation to keep, ONNX Runtime folds the constants.
      extra: { session: { disable_quant_qdq: size <= UNPACKED_WEIGHTS ? "1" : "0" } },
    });
  return { Tensor, step: await open("step"), loss: await open("loss"), adamw: await open("adamw") };
}

/** Threads that ONNX Runtime uses; 1 where the server does not isolate the page. */
export function threads() {
  return env.wasm.numThreads || 1;
}

/** @param {string} path */
function nameOf(path) {
  return path.slice(path.lastIndexOf("/") + 1);
}

/** @param {string} url */
async function get(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return response;
}

/**
 * @param {Response} response
 * @param {number} size Bytes that must come.
 * @param {(received: number) => void} onProgress
 */
async function receive(response, size, onProgress) {
  const bytes = new Uint8Array(size);
  let received = 0;
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (received + part.value.length > size) throw new Error(`${response.url} is longer than ${size} bytes`);
    bytes.set(part.value, received);
    received += part.value.length;
    onProgress(received);
  }
  return bytes.subarray(0, received);
}
