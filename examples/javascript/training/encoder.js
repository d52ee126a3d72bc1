/**
 * Rows to token ids and labels, as edgetune/data/encode.py does it on a device with Python.
 */

import { Template } from "@huggingface/jinja";

import { IGNORED } from "./batch.js";
import { isTrained, refuseEmpty } from "./rows.js";
import { TokenPlaces } from "./tokens.js";

/** @import { Message, Row } from "./rows.js" */
/** @import { Shipped } from "./shipped.js" */
/** @import { Token } from "./tokens.js" */

/** Unicode keeps it for programs: no text has it. */
const MARK = "\ufde0";

/** @typedef {{inputIds: number[], labels: number[]}} Example A label is the token itself, or −100: not trained. */

/**
 * The encoder of a shipped folder.
 *
 * @param {Shipped} shipped
 * @param {(path: string) => Promise<Uint8Array>} read Gives a file of the shipped folder, verified.
 */
export async function openEncoder(shipped, read) {
  const { file, chat_template } = shipped.tokenizer;
  const text = async (/** @type {string} */ path) => new TextDecoder().decode(await read(path));
  const template = chat_template === null ? null : new Template(await text(chat_template));
  return new Encoder(shipped, new TokenPlaces(JSON.parse(await text(file))), template);
}

/** Turns rows into token ids and labels. */
export class Encoder {
  #template;
  #variables;
  #eosTokenId;
  #maxLength;

  /**
   * @param {Shipped} shipped
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
   * Token ids and labels of a row. A conversation is trained on each answer and the token that ends it; where text
   * alone closes turns, the end of the sequence ends the last answer. Prompt/completion is a conversation of two turns,
   * or without a template trained on the completion and the end of the sequence. Text is trained whole.
   *
   * @param {Row} row
   * @returns {Example}
   * @throws {Error} The row cannot be trained on.
   */
  encode(row) {
    refuseEmpty(row);
    const example =
      "messages" in row
        ? this.#encodeChat(row.messages)
        : "text" in row
          ? this.#encodePlain(row.text, null)
          : this.#template
            ? this.#encodeChat(turnsOf(row.prompt, row.completion))
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
    const inputIds = tokens.map((token) => token.id);
    const labels = tokens.map(() => IGNORED);
    let answers = 0;
    let endsWithText = false;
    this.#ends(messages, text).forEach((contentEnd, index) => {
      const last = index === messages.length - 1;
      if (last) endsWithText = false;
      if (messages[index].role !== "assistant" || contentEnd === null) return;
      answers += 1;
      const begin = this.#begin(messages, index, text, contentEnd);
      const closing = last ? text.slice(contentEnd) : this.#closing(messages.slice(0, index + 1), text, contentEnd);
      const agreed = contentEnd + commonLength(text.slice(contentEnd), closing);
      const closer = tokens.find(
        ({ id, isSpecial, start, end }) =>
          start >= contentEnd && end <= agreed && (isSpecial || id === this.#eosTokenId),
      );
      if (!isTrained(messages[index])) return;
      endsWithText = last && !closer;
      const end = closer ? closer.end : this.#endOfText(tokens, text, contentEnd, closing);
      tokens.forEach((token, at) => {
        if (token.start >= begin && token.start < end) labels[at] = token.id;
      });
    });
    if (!answers) throw new Error("the chat template shows no answer of this conversation");
    if (endsWithText) endSequence(inputIds, labels, this.#eosTokenId);
    return { inputIds, labels };
  }

  /**
   * Where the content of each message ends in the rendered conversation, without white space at its end; null where the
   * template leaves it out. Noncharacters are put there before rendering, and tell where they come out.
   *
   * @param {Message[]} messages
   * @param {string} text
   * @returns {(number | null)[]}
   */
  #ends(messages, text) {
    const marked = messages.map(({ role, content }, index) => {
      // A mark in an empty message would change what templates test.
      if (role !== "assistant" && !content.trim()) return { role, content };
      const length = content.trimEnd().length;
      return { role, content: `${content.slice(0, length)}${MARK}${index}${MARK}${content.slice(length)}` };
    });
    const pieces = this.#render(marked, false).split(new RegExp(`${MARK}([0-9]+)${MARK}`));
    /** @type {(number | null)[]} */
    const ends = messages.map(() => null);
    let shown = "";
    pieces.forEach((piece, at) => {
      if (at % 2) ends[Number(piece)] = shown.length;
      else shown += piece;
    });
    if (shown !== text) throw new Error("the chat template changes the messages, so that the answers cannot be told");
    return ends;
  }

  /**
   * Where the prompt ends that asks for an answer: all that follows is the model's to write.
   *
   * @param {Message[]} messages
   * @param {number} index
   * @param {string} text
   * @param {number} contentEnd
   */
  #begin(messages, index, text, contentEnd) {
    const { content } = messages[index];
    const bare = content.trim();
    const prompt = this.#attempt(messages.slice(0, index), true);
    if (prompt !== null && text.startsWith(prompt) && prompt.length + Math.min(1, bare.length) <= contentEnd) {
      return prompt.length;
    }
    const begin = contentEnd - bare.length;
    if (prompt !== null || text.slice(begin, contentEnd) !== bare) {
      throw new Error(`the chat template changes the answer in turn ${index + 1}`);
    }
    const own = content.slice(0, content.length - content.trimStart().length);
    return text.slice(0, begin).endsWith(own) ? begin - own.length : begin;
  }

  /**
   * What follows the content of the last message when nothing follows that message.
   *
   * @param {Message[]} messages
   * @param {string} text
   * @param {number} contentEnd
   */
  #closing(messages, text, contentEnd) {
    const alone = this.#attempt(messages, false);
    return alone !== null && alone.startsWith(text.slice(0, contentEnd)) ? alone.slice(contentEnd) : "";
  }

  /**
   * Where an answer ends that text alone closes: with the last token that is the same without a next turn.
   *
   * @param {Token[]} tokens Of the text.
   * @param {string} text
   * @param {number} contentEnd
   * @param {string} closing
   */
  #endOfText(tokens, text, contentEnd, closing) {
    if (text.slice(contentEnd) === closing) return text.length;
    const alone = this.tokenizer.tokens(text.slice(0, contentEnd) + closing);
    const common = commonLength(
      tokens.map((token) => token.id),
      alone.map((token) => token.id),
    );
    return common ? tokens[common - 1].end : 0;
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
    endSequence(inputIds, labels, this.#eosTokenId);
    return { inputIds, labels };
  }

  /**
   * The rendered messages; null where the template takes other conversations only.
   *
   * @param {Message[]} messages
   * @param {boolean} addGenerationPrompt
   */
  #attempt(messages, addGenerationPrompt) {
    try {
      return this.#render(messages, addGenerationPrompt);
    } catch {
      return null;
    }
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
 * Prompt and completion as a conversation.
 *
 * @param {string} prompt
 * @param {string} completion
 * @returns {Message[]}
 */
function turnsOf(prompt, completion) {
  return [
    { role: "user", content: prompt },
    { role: "assistant", content: completion },
  ];
}

/**
 * Let a row end with the end of the sequence, and train it.
 *
 * @param {number[]} inputIds
 * @param {number[]} labels
 * @param {number} eosTokenId
 */
function endSequence(inputIds, labels, eosTokenId) {
  if (inputIds.at(-1) !== eosTokenId) {
    inputIds.push(eosTokenId);
    labels.push(IGNORED);
  }
  labels[labels.length - 1] = eosTokenId;
}

/**
 * How many elements two sequences have in common at their beginning.
 *
 * @param {ArrayLike<unknown>} first
 * @param {ArrayLike<unknown>} second
 */
function commonLength(first, second) {
  const shorter = Math.min(first.length, second.length);
  for (let at = 0; at < shorter; at += 1) if (first[at] !== second[at]) return at;
  return shorter;
}

/**
 * @param {number[]} ids
 * @param {Token[]} tokens
 * @param {number} at
 */
function startsWith(ids, tokens, at) {
  return tokens.every((token, index) => token.id === ids[at + index]);
}
