/**
 * What was learnt stays in the browser's own file system for this page (origin private file system).
 */

/** @import { Shipped } from "../training/shipped.js" */

/**
 * An adapter belongs to one shipped folder.
 *
 * @param {Shipped} shipped
 */
function nameFor(shipped) {
  return `${shipped.manifest_sha256}.safetensors`;
}

/**
 * @param {Shipped} shipped
 * @returns {Promise<Uint8Array | null>} Null: nothing is kept.
 */
export async function readKept(shipped) {
  try {
    const folder = await navigator.storage.getDirectory();
    const file = await (await folder.getFileHandle(nameFor(shipped))).getFile();
    return new Uint8Array(await file.arrayBuffer());
  } catch {
    return null; // there is no such file, or private browsing has no storage
  }
}

/**
 * The old file stays whole until the new one is.
 *
 * @param {Shipped} shipped
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @returns {Promise<boolean>} False: this browser, or this window of it, keeps nothing.
 */
export async function keep(shipped, bytes) {
  try {
    const folder = await navigator.storage.getDirectory();
    const stream = await (await folder.getFileHandle(nameFor(shipped), { create: true })).createWritable();
    await stream.write(bytes);
    await stream.close();
    return true;
  } catch {
    return false;
  }
}

/** @param {Shipped} shipped */
export async function forget(shipped) {
  const folder = await navigator.storage?.getDirectory().catch(() => null);
  await folder?.removeEntry(nameFor(shipped)).catch(() => {});
}
