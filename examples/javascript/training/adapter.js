/**
 * LoRA parameters in safetensors, as PEFT keeps them: the length of a JSON header, the header, and the bytes.
 */

/** @import { TensorClass, Tensors } from "./graphs.js" */
/** @import { Shipped } from "./shipped.js" */

/**
 * Read the parameters of a shipped folder.
 *
 * @param {TensorClass} Tensor
 * @param {Shipped} shipped
 * @param {Uint8Array} bytes An `adapter_model.safetensors`: the shipped folder's own, or one that was trained from it.
 * @returns {Tensors} Under the graphs' names.
 * @throws {Error} Naming a parameter that is missing or of another type or shape.
 */
export function readAdapter(Tensor, shipped, bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const begin = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, begin)));
  /** @type {Tensors} */
  const parameters = {};
  for (const [name, shape] of shapes(shipped)) {
    const entry = header[shipped.adapter.prefix + name];
    if (entry?.dtype !== "F32" || String(entry.shape) !== String(shape)) {
      throw new Error(`the adapter does not fit: ${name} is ${JSON.stringify(entry)}, expected F32 [${shape}]`);
    }
    const [start, end] = entry.data_offsets;
    // A copy, because a float must lie at a multiple of 4.
    const values = new Float32Array(new Uint8Array(bytes.subarray(begin + start, begin + end)).buffer);
    parameters[name] = new Tensor("float32", values, shape);
  }
  return parameters;
}

/**
 * The bytes of `adapter_model.safetensors`. With the shipped folder's `adapter_config.json` beside it, PEFT and edgetune
 * read it.
 *
 * @param {Shipped} shipped
 * @param {Tensors} parameters
 * @returns {Uint8Array<ArrayBuffer>}
 */
export function writeAdapter(shipped, parameters) {
  /** @type {Record<string, any>} */
  const header = { __metadata__: { format: "pt" } };
  let length = 0;
  const names = shapes(shipped).map(([name]) => name);
  for (const name of names) {
    const { dims, size } = parameters[name];
    header[shipped.adapter.prefix + name] = { dtype: "F32", shape: dims, data_offsets: [length, length + 4 * size] };
    length += 4 * size;
  }
  const text = JSON.stringify(header);
  const head = new TextEncoder().encode(text + " ".repeat((8 - (text.length % 8)) % 8));
  const bytes = new Uint8Array(8 + head.length + length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(head.length), true);
  bytes.set(head, 8);
  let place = 8 + head.length;
  for (const name of names) {
    const values = /** @type {Float32Array} */ (parameters[name].data);
    bytes.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), place);
    place += values.byteLength;
  }
  return bytes;
}

/**
 * Names and shapes of all parameters, in the graphs' order.
 *
 * @param {Shipped} shipped
 * @returns {[string, number[]][]}
 */
function shapes({ lora }) {
  return lora.slots.flatMap((slot) => {
    const rank = lora.rank_pattern?.[slot.name.split(".").at(-1) ?? ""] ?? lora.rank;
    return [
      [`${slot.name}.lora_A.weight`, [rank, slot.in_features]],
      [`${slot.name}.lora_B.weight`, [slot.out_features, rank]],
    ];
  });
}
