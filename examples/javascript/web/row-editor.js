/**
 * Rows as cards that can be edited: a field for every message, or for prompt and completion, or for the text.
 */

/** @import { Message, Row } from "../training/rows.js" */

/** @typedef {{pieces: {text: string, isTrained: boolean}[]} | {error: string}} Shown What a row becomes. */

const NAMES = { system: "Instruction", user: "Question", assistant: "Answer" };

/** The list of rows. */
export class RowEditor {
  #list;
  #onChange;

  /**
   * @param {HTMLElement} list
   * @param {() => void} onChange Hears of every edit.
   */
  constructor(list, onChange) {
    this.#list = list;
    this.#onChange = onChange;
    list.addEventListener("input", onChange);
  }

  /** @param {Row[]} rows */
  set rows(rows) {
    this.#list.replaceChildren(...rows.map((row) => this.#card(row)));
    this.#onChange();
  }

  /** @returns {Row[]} */
  get rows() {
    return this.#cards().map(rowOf);
  }

  /** Add an empty question and answer, and go there. */
  add() {
    const card = this.#card({
      messages: [
        { role: "user", content: "" },
        { role: "assistant", content: "" },
      ],
    });
    this.#list.append(card);
    card.querySelector("textarea")?.focus();
    this.#onChange();
  }

  /**
   * Mark rows that cannot be trained on, and show the tokens of the others.
   *
   * @param {Shown[]} shown
   * @param {boolean} withTokens
   */
  show(shown, withTokens) {
    this.#cards().forEach((card, index) => {
      const strip = /** @type {HTMLElement} */ (card.querySelector(".tokens"));
      const row = shown[index];
      const problem = row && "error" in row ? row.error : "";
      card.classList.toggle("bad", problem !== "");
      if (problem) strip.replaceChildren(problem);
      else if (row && "pieces" in row && withTokens) strip.replaceChildren(...row.pieces.map(chip));
      else strip.replaceChildren();
    });
  }

  #cards() {
    return /** @type {HTMLFieldSetElement[]} */ ([...this.#list.children]);
  }

  /** @param {Row} row */
  #card(row) {
    const card = document.createElement("fieldset");
    card.className = "row";
    const legend = document.createElement("legend");
    legend.className = "visually-hidden";
    legend.textContent = "Row";
    card.append(legend);
    for (const { name, key, value } of fields(row)) card.append(field(name, key, value));
    const remove = document.createElement("button");
    remove.type = "button";
    remove.className = "remove";
    remove.textContent = "×";
    remove.ariaLabel = "Remove this row";
    remove.addEventListener("click", () => {
      const neighbour = card.nextElementSibling ?? card.previousElementSibling;
      card.remove();
      neighbour?.querySelector("textarea")?.focus();
      this.#onChange();
    });
    const tokens = document.createElement("p");
    tokens.className = "tokens";
    card.append(remove, tokens);
    return card;
  }
}

/**
 * @param {Row} row
 * @returns {{name: string, key: string, value: string}[]}
 */
function fields(row) {
  if ("text" in row) return [{ name: "Text", key: "text", value: row.text }];
  if ("prompt" in row) {
    return [
      { name: "Prompt", key: "prompt", value: row.prompt },
      { name: "Completion", key: "completion", value: row.completion },
    ];
  }
  return row.messages.map(({ role, content }) => ({ name: NAMES[role], key: role, value: content }));
}

/**
 * The row that a card holds now.
 *
 * @param {HTMLElement} card
 * @returns {Row}
 */
function rowOf(card) {
  const values = [...card.querySelectorAll("textarea")].map(({ name, value }) => /** @type {const} */ ([name, value]));
  if (values[0][0] in NAMES) {
    return { messages: values.map(([role, content]) => /** @type {Message} */ ({ role, content })) };
  }
  return /** @type {Row} */ (Object.fromEntries(values));
}

/**
 * @param {string} name
 * @param {string} key
 * @param {string} value
 */
function field(name, key, value) {
  const label = document.createElement("label");
  label.className = `field ${key}`;
  const caption = document.createElement("span");
  caption.textContent = name;
  const area = document.createElement("textarea");
  area.name = key;
  area.rows = Math.max(1, value.split("\n").length);
  area.value = value;
  label.append(caption, area);
  return label;
}

/** @param {{text: string, isTrained: boolean}} piece */
function chip({ text, isTrained }) {
  const made = document.createElement("span");
  made.className = isTrained ? "token trained" : "token";
  made.textContent = text.replaceAll("\n", "↵").replaceAll(" ", "·");
  return made;
}
