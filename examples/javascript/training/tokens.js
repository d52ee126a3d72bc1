/**
 * Text to tokens with their places in it, and back.
 *
 * The tokenizer is Hugging Face's `@huggingface/tokenizers`, which reads `tokenizer.json`. It does not say where in the
 * text a token stands, so that is counted here, for the two kinds of tokenizer that Phi-3 models have: BPE over text in
 * which ▁ stands for a space (Phi-3, Phi-3.5), and BPE over bytes (Phi-4-mini).
 */

import { Tokenizer } from "@huggingface/tokenizers";

/**
 * A token and its place: indices into the text. One that is a part of a character has the place of the character.
 *
 * @typedef {{id: number, start: number, end: number, isSpecial: boolean}} Token
 */
/** @typedef {{id: number, content: string, rstrip: boolean, special: boolean}} AddedToken */

/** Characters that are white space to the model's own tokenizer and not to JavaScript, or the other way round. */
const DISPUTED = /[\u0085\ufeff]/;
const WHITE_SPACE = /\p{White_Space}*/uy;
const BYTE = /^<0x[0-9A-F]{2}>$/;
const SPACE = "▁";

export class TokenPlaces {
  #tokenizer;
  #isByteLevel;
  #trims;
  /** @type {Map<number, AddedToken>} */
  #added;

  /**
   * @param {any} json The parsed `tokenizer.json`.
   * @throws {Error} It is of another kind.
   */
  constructor(json) {
    this.#tokenizer = new Tokenizer(json, {});
    this.#isByteLevel = parts(json.decoder, "decoders").some((part) => part.type === "ByteLevel");
    const processors = parts(json.post_processor, "processors");
    this.#trims = processors.some((part) => part.type === "ByteLevel" && part.trim_offsets);
    this.#added = new Map(json.added_tokens.map((/** @type {AddedToken} */ token) => [token.id, token]));
    const kinds = parts(json.normalizer, "normalizers")
      .map((part) => part.type)
      .join();
    if (json.model.type !== "BPE" || kinds !== (this.#isByteLevel ? "" : "Prepend,Replace")) {
      throw new Error("tokenizer.json: expected BPE over bytes, or over text with ▁ for a space, as in Phi-3 models");
    }
  }

  /**
   * Token ids of a text, with those that the tokenizer itself puts around it.
   *
   * @param {string} text
   * @returns {number[]}
   */
  idsWithSpecial(text) {
    return this.#tokenizer.encode(text).ids;
  }

  /**
   * Tokens of a text, without those that the tokenizer itself puts around it.
   *
   * @param {string} text
   * @returns {Token[]}
   * @throws {Error} The text has a character that cannot be told apart.
   */
  tokens(text) {
    if (DISPUTED.test(text)) throw new Error("the text has U+0085 or U+FEFF, which are no part of it; remove them");
    if (/\p{Surrogate}/u.test(text)) throw new Error("the text has half a surrogate pair, which is no character");
    const { ids, tokens } = this.#tokenizer.encode(text, { add_special_tokens: false });
    const reader = new Reader(text);
    let isFirst = true; // of what stands between two added tokens
    const found = ids.map((/** @type {number} */ id, /** @type {number} */ index) => {
      const added = this.#added.get(id);
      const start = added ? reader.find(added.content) : reader.at;
      if (added) reader.skip(added);
      else if (this.#isByteLevel)
        reader.skipBytes(tokens[index].length); // a character for every byte
      else if (BYTE.test(tokens[index])) reader.skipBytes(1);
      else reader.skipWord(isFirst && tokens[index].startsWith(SPACE) ? tokens[index].slice(1) : tokens[index]);
      isFirst = added !== undefined;
      const end = added ? start + added.content.length : reader.end;
      // As the model's own tokenizer counts: a place may be without the spaces of its token.
      const [before, after] = this.#trims ? spaces(tokens[index]) : [0, 0];
      const isSpecial = added !== undefined && added.special;
      return { id, start: Math.min(start + before, end), end: end - Math.min(after, end - start), isSpecial };
    });
    if (reader.at !== text.length) throw new Error(`the tokens end at ${reader.at} of ${text.length} characters`);
    return found;
  }

  /**
   * @param {number[]} ids
   * @returns {string}
   */
  decode(ids) {
    if (!ids.length) return "";
    return this.#tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  /**
   * A token as people read it.
   *
   * @param {number} id
   * @returns {string}
   */
  shown(id) {
    if (this.#isByteLevel) return this.#tokenizer.decode([id], { skip_special_tokens: false });
    return this.#tokenizer.id_to_token(id)?.replaceAll(SPACE, " ") ?? "";
  }
}

/** Goes through a text as its tokens spell it. */
class Reader {
  /** Index of the character that comes next, or of which a part was read. */
  at = 0;
  #bytesRead = 0;

  /** @param {string} text */
  constructor(text) {
    this.text = text;
  }

  /** Index after the last character of which something was read. */
  get end() {
    return this.at + (this.#bytesRead ? this.#character().length : 0);
  }

  /**
   * Where an added token stands; it may have swallowed the white space before it.
   *
   * @param {string} content
   */
  find(content) {
    const start = this.text.indexOf(content, this.at);
    if (start < 0 || this.text.slice(this.at, start).trim()) throw new Error(`${content} is not at ${this.at}`);
    return (this.at = start);
  }

  /** @param {AddedToken} added */
  skip(added) {
    this.at += added.content.length;
    if (added.rstrip) {
      WHITE_SPACE.lastIndex = this.at;
      this.at += WHITE_SPACE.exec(this.text)?.[0].length ?? 0;
    }
  }

  /** @param {number} count */
  skipBytes(count) {
    this.#bytesRead += count;
    for (let size = this.#size(); size && this.#bytesRead >= size; size = this.#size()) {
      this.#bytesRead -= size;
      this.at += this.#character().length;
    }
  }

  /** @param {string} word */
  skipWord(word) {
    const found = this.text.slice(this.at, this.at + word.length);
    if (found.replaceAll(" ", SPACE) !== word) throw new Error(`${JSON.stringify(word)} is not at ${this.at}`);
    this.at += word.length;
  }

  #character() {
    return String.fromCodePoint(this.text.codePointAt(this.at) ?? 0);
  }

  /** Bytes of the next character in UTF-8; 0 at the end. */
  #size() {
    const point = this.text.codePointAt(this.at);
    if (point === undefined) return 0;
    return point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
  }
}

/**
 * Spaces at the start and at the end of a byte-level token.
 *
 * @param {string} token
 */
function spaces(token) {
  return [token.match(/^[Ġ\s]*/)?.[0].length ?? 0, token.match(/[Ġ\s]*$/)?.[0].length ?? 0];
}

/**
 * @param {any} component A tokenizer's component, perhaps a sequence of them.
 * @param {string} key What a sequence calls its parts.
 * @returns {any[]}
 */
function parts(component, key) {
  if (!component) return [];
  return component.type === "Sequence" ? component[key] : [component];
}
