/**
 * What was learnt stays in the browser's own file system for this page (origin private file system).
 */

/** @import { Target } from "../training/target.js" */

/**
 * An adapter belongs to one target.
 *
 * @param {Target} target
 */
function nameFor(target) {
  return `${target.manifest_sha256}.safetensors`;
}

/**
 * @param {Target} target
 * @returns {Promise<Uint8Array | null>} Null: nothing is kept.
 */
export async function readKept(target) {
  try {
    const folder = await navigator.storage.getDirectory();
    const file = await (await folder.getFileHandle(nameFor(target))).getFile();
    return new Uint8Array(await file.arrayBuffer());
  } catch {
    return null; // there is no such file, or private browsing has no storage
  }
}

/**
 * The old file stays whole until the new one is.
 *
 * @param {Target} target
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @returns {Promise<boolean>} False: this browser, or this window of it, keeps nothing.
 */
export async function keep(target, bytes) {
  try {
    const folder = await navigator.storage.getDirectory();
    const stream = await (await folder.getFileHandle(nameFor(target), { create: true })).createWritable();
    await stream.write(bytes);
    await stream.close();
    return true;
  } catch {
    return false;
  }
}

/** @param {Target} target */
export async function forget(target) {
  const folder = await navigator.storage?.getDirectory().catch(() => null);
  await folder?.removeEntry(nameFor(target)).catch(() => {});
}
