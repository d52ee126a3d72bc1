/**
 * Rows to token ids and labels, as edgetune/data/encode.py does it on a device with Python.
 */

import { Template } from "@huggingface/jinja";

import { IGNORED } from "./batch.js";
import { TokenPlaces } from "./tokens.js";

/** @import { Message, Row } from "./rows.js" */
/** @import { Target } from "./target.js" */
/** @import { Token } from "./tokens.js" */

/** @typedef {{inputIds: number[], labels: number[]}} Example A label is the token itself, or −100: not trained. */

/**
 * The encoder of a target.
 *
 * @param {Target} target
 * @param {(path: string) => Promise<Uint8Array>} read Gives a file of the target, verified.
 */
export async function openEncoder(target, read) {
  const { file, chat_template } = target.tokenizer;
  const text = async (/** @type {string} */ path) => new TextDecoder().decode(await read(path));
  const template = chat_template === null ? null : new Template(await text(chat_template));
  return new Encoder(target, new TokenPlaces(JSON.parse(await text(file))), template);
}

/** Turns rows into token ids and labels. */
export class Encoder {
  #template;
  #variables;
  #eosTokenId;
  #maxLength;

  /**
   * @param {Target} target
   * @param {TokenPlaces} tokenizer
   * @param {Template | null} template The model's chat template.
   */
  constructor({ tokenizer: { bos_token, eos_token, eos_token_id }, max_length }, tokenizer, template) {
    this.tokenizer = tokenizer;
    this.#template = template;
    this.#variables = { eos_token, ...(bos_token === null ? {} : { bos_token }) };
    this.#eosTokenId = eos_token_id;
    this.#maxLength = max_length;
  }

  /**
   * All rows of a training.
   *
   * @param {Row[]} rows
   * @returns {Example[]}
   * @throws {Error} Naming every row that cannot be trained on, and why.
   */
  encodeAll(rows) {
    /** @type {string[]} */
    const problems = rows.length ? [] : ["there are no rows"];
    const examples = rows.flatMap((row, index) => {
      try {
        return [this.encode(row)];
      } catch (error) {
        problems.push(`row ${index + 1}: ${error instanceof Error ? error.message : error}`);
        return [];
      }
    });
    if (problems.length) throw new Error(problems.join("\n"));
    return examples;
  }

  /**
   * Token ids and labels of a row. A conversation is trained on each answer and the token that ends it,
   * prompt/completion on the completion and the end of the sequence, text on everything.
   *
   * @param {Row} row
   * @returns {Example}
   * @throws {Error} The row cannot be trained on.
   */
  encode(row) {
    const example =
      "messages" in row
        ? this.#encodeChat(row.messages)
        : "text" in row
          ? this.#encodePlain(row.text, null)
          : this.#encodePlain(row.prompt + row.completion, row.prompt.length);
    if (example.labels.slice(1).every((label) => label === IGNORED)) {
      throw new Error("no token of this row would be trained; give it a longer answer");
    }
    if (example.inputIds.length > this.#maxLength) {
      throw new Error(
        `this row has ${example.inputIds.length} tokens, at most ${this.#maxLength} are trained; shorten it`,
      );
    }
    return example;
  }

  /**
   * Token ids of a conversation that waits for the assistant's answer.
   *
   * @param {Message[]} messages
   */
  encodePrompt(messages) {
    return this.tokenizer.tokens(this.#render(messages, true)).map((token) => token.id);
  }

  /**
   * @param {Message[]} messages
   * @returns {Example}
   */
  #encodeChat(messages) {
    const text = this.#render(messages, false);
    const tokens = this.tokenizer.tokens(text);
    const labels = tokens.map(() => IGNORED);
    for (const [start, contentEnd] of this.#answers(messages, text)) {
      const end = endOfTurn(tokens, text, contentEnd);
      tokens.forEach((token, index) => {
        if (token.start >= start && token.start < end && token.end <= end) labels[index] = token.id;
      });
    }
    return { inputIds: tokens.map((token) => token.id), labels };
  }

  /**
   * @param {string} text
   * @param {number | null} promptEnd Where the trained part begins; null: everything is trained.
   * @returns {Example}
   */
  #encodePlain(text, promptEnd) {
    const tokens = this.tokenizer.tokens(text);
    const inputIds = this.tokenizer.idsWithSpecial(text);
    // Tokens that the tokenizer itself puts around the text have no place in it.
    const before = inputIds.length - tokens.length && inputIds.findIndex((_, at) => startsWith(inputIds, tokens, at));
    const labels = inputIds.map((id, index) => {
      const token = tokens[index - before];
      return promptEnd === null || (token && token.start >= promptEnd) ? id : IGNORED;
    });
    if (inputIds.at(-1) !== this.#eosTokenId) {
      inputIds.push(this.#eosTokenId);
      labels.push(IGNORED);
    }
    labels[labels.length - 1] = this.#eosTokenId;
    return { inputIds, labels };
  }

  /**
   * Where each assistant message's answer lies in the rendered conversation.
   *
   * @param {Message[]} messages
   * @param {string} text
   * @returns {[number, number][]} First character and the one after the last.
   */
  #answers(messages, text) {
    /** @type {[number, number][]} */
    const answers = [];
    let cursor = 0; // everything before it belongs to earlier messages
    messages.forEach((message, index) => {
      let span = find(text, message.content, cursor);
      if (message.role === "assistant") {
        const prompt = this.#render(messages.slice(0, index), true);
        if (text.startsWith(prompt) && prompt.length >= cursor) {
          const found = find(text, message.content, prompt.length);
          // What stands between the prompt and the content is the model's to write if it is white space only.
          if (found && !text.slice(prompt.length, found[0]).trim()) span = [prompt.length, found[1]];
        }
        if (!span) {
          const isEmpty = !message.content.trim();
          throw new Error(
            isEmpty ? "an answer is empty" : `the chat template changes the content of messages[${index}]`,
          );
        }
        answers.push(span);
      }
      if (span) cursor = span[1];
    });
    return answers;
  }

  /**
   * @param {Message[]} messages
   * @param {boolean} addGenerationPrompt End with what tells the model to answer.
   * @returns {string}
   */
  #render(messages, addGenerationPrompt) {
    if (!this.#template) throw new Error('the model has no chat template; write rows as {"prompt", "completion"}');
    return this.#template.render({
      ...this.#variables,
      messages,
      tools: null,
      documents: null,
      add_generation_prompt: addGenerationPrompt,
    });
  }
}

/**
 * @param {string} text
 * @param {string} content
 * @param {number} start
 * @returns {[number, number] | null}
 */
function find(text, content, start) {
  for (const candidate of [content, content.trim()]) {
    const at = candidate ? text.indexOf(candidate, start) : -1; // templates may strip
    if (at >= 0) return [at, at + candidate.length];
  }
  return null;
}

/**
 * End of the added token that closes an answer; `end` when the next thing after white space is none.
 *
 * @param {Token[]} tokens
 * @param {string} text
 * @param {number} end
 */
function endOfTurn(tokens, text, end) {
  const following = end + text.slice(end).search(/\S/);
  const token = tokens.find((candidate) => candidate.start === following && candidate.isAdded);
  return token && following >= end ? token.end : end;
}

/**
 * @param {number[]} ids
 * @param {Token[]} tokens
 * @param {number} at
 */
function startsWith(ids, tokens, at) {
  return tokens.every((token, index) => token.id === ids[at + index]);
}
