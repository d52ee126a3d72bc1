// {tokenizer, template, special, rows, prompts, texts} in; what the encoder makes of each out.

import { text } from "node:stream/consumers";

import { Template } from "../../examples/javascript/node_modules/@huggingface/jinja/dist/index.js";
import { Encoder } from "../../examples/javascript/training/encoder.js";
import { TokenPlaces } from "../../examples/javascript/training/tokens.js";

const { tokenizer, template, shipped, rows, prompts } = JSON.parse(await text(process.stdin));
const encoder = new Encoder(shipped, new TokenPlaces(tokenizer), new Template(template));

function attempt(make) {
  try {
    return make();
  } catch (error) {
    return { error: error.message };
  }
}

const examples = rows.map((row) => attempt(() => encoder.encode(row)));
const decoded = examples.map((example) => example.error ?? encoder.tokenizer.decode(example.inputIds));
const asked = prompts.map((prompt) => attempt(() => encoder.encodePrompt(prompt)));
console.log(JSON.stringify({ examples, decoded, asked }));
