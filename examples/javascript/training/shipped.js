/**
 * What `edgetune ship` wrote: `target.json`, and the files that it lists. Nothing is used before its hash is right.
 */

/** @typedef {{dim: number, theta: number, attention_factor: number, short_factor: number[] | null,
 *   long_factor: number[] | null, original_max_position_embeddings: number}} Rope */
/** @typedef {{rank: number, alpha: number, rank_pattern?: Record<string, number>, target_modules: string[],
 *   slots: {name: string, in_features: number, out_features: number}[]}} Lora */
/** @typedef {{path: string, size: number, sha256: string}} File */

/**
 * The part of `target.json` that a training loop needs; artifacts/FORMAT.md has the whole.
 *
 * @typedef {object} Shipped
 * @property {string} format
 * @property {number} format_version
 * @property {string} target
 * @property {{name: string, sha256: string, weights: string}} base
 * @property {{rope: Rope, sliding_window: number | null}} architecture
 * @property {{file: string, chat_template: string | null, bos_token: string | null, eos_token: string,
 *   eos_token_id: number,
 *   stop_token_ids: number[], pad_token_id: number}} tokenizer
 * @property {Lora} lora
 * @property {number} max_length
 * @property {{role: string, file: string}[]} graphs
 * @property {string[]} weights
 * @property {{learning_rate: number, weight_decay: number, max_grad_norm: number}} optimizer
 * @property {{file: string, prefix: string}} adapter
 * @property {File[]} files
 * @property {string} manifest_sha256
 */

const FORMAT = "edgetune-target";
const FORMAT_VERSION = 1;

/**
 * Read `target.json`.
 *
 * @param {Uint8Array} bytes
 * @returns {Promise<Shipped>}
 * @throws {Error} It is something else, or was changed.
 */
export async function readShipped(bytes) {
  const text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  const shipped = /** @type {Shipped} */ (JSON.parse(text));
  if (shipped.format !== FORMAT || shipped.format_version !== FORMAT_VERSION) {
    throw new Error(
      `target.json is of format ${shipped.format} ${shipped.format_version}, expected ${FORMAT} ${FORMAT_VERSION}`,
    );
  }
  // The seal is the hash of the file's own bytes without the seal's.
  const unsealed = text.replace(`"manifest_sha256": "${shipped.manifest_sha256}"`, '"manifest_sha256": ""');
  if ((await sha256(new TextEncoder().encode(unsealed))) !== shipped.manifest_sha256) {
    throw new Error("target.json was changed; copy the shipped folder again");
  }
  const astray = shipped.files.filter(({ path }) => path.split(/[\\/]/).some((part) => ["", ".", ".."].includes(part)));
  if (astray.length) throw new Error(`target.json lists ${astray[0].path}, which is outside of its folder`);
  return shipped;
}

/**
 * A file's bytes, if they are those that `target.json` lists.
 *
 * @param {Shipped} shipped
 * @param {string} path
 * @param {Uint8Array} bytes
 * @returns {Promise<Uint8Array>}
 * @throws {Error} They are others.
 */
export async function verified(shipped, path, bytes) {
  const file = fileOf(shipped, path);
  if (bytes.length !== file.size || (await sha256(bytes)) !== file.sha256) {
    throw new Error(`${path} is not what target.json says (${bytes.length} of ${file.size} bytes); copy it again`);
  }
  return bytes;
}

/**
 * @param {Shipped} shipped
 * @param {string} path
 * @returns {File}
 */
export function fileOf(shipped, path) {
  const file = shipped.files.find((candidate) => candidate.path === path);
  if (!file) throw new Error(`target.json does not list ${path}`);
  return file;
}

/**
 * @param {Shipped} shipped
 * @param {string} role `step`, `loss` or `adamw`.
 * @returns {string}
 */
export function graphFile(shipped, role) {
  const graph = shipped.graphs.find((candidate) => candidate.role === role);
  if (!graph) throw new Error(`target.json has no graph ${role}`);
  return graph.file;
}

/**
 * PEFT's description of the adapter, beside it. It holds for what is trained from the adapter, too.
 *
 * @param {Shipped} shipped
 */
export function configFile(shipped) {
  return shipped.adapter.file.replace(/[^/]*$/, "adapter_config.json");
}

/**
 * @param {Uint8Array} bytes
 * @returns {Promise<string>} In hex.
 */
async function sha256(bytes) {
  const digest = await crypto.subtle.digest("SHA-256", /** @type {Uint8Array<ArrayBuffer>} */ (bytes));
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
