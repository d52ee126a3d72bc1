// {examples, shipped} in, the tensors of their batch out.

import { text } from "node:stream/consumers";

import { makeBatch } from "../../examples/javascript/training/batch.js";

class Tensor {
  constructor(type, data, dims) {
    Object.assign(this, { type, data: Array.from(data, Number), dims });
  }
}

const { examples, shipped } = JSON.parse(await text(process.stdin));
console.log(JSON.stringify(makeBatch(Tensor, examples, shipped)));
