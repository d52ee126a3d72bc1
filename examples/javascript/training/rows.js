/**
 * Rows as people write them, checked: the three kinds of docs/data.md.
 */

/** @typedef {{role: "system" | "user" | "assistant", content: string, weight?: 0 | 1}} Message */
/** @typedef {{messages: Message[]} | {prompt: string, completion: string} | {text: string}} Row */

const ROLES = ["system", "user", "assistant"];

/**
 * Read the lines of a JSONL file.
 *
 * @param {string} text
 * @returns {Row[]}
 * @throws {Error} Naming every line that is no row, and why.
 */
export function parseRows(text) {
  /** @type {Row[]} */
  const rows = [];
  /** @type {string[]} */
  const problems = [];
  text.split("\n").forEach((line, index) => {
    if (!line.trim()) return;
    try {
      rows.push(checkRow(JSON.parse(line)));
    } catch (error) {
      problems.push(`line ${index + 1}: ${error instanceof Error ? error.message : error}`);
    }
  });
  if (!rows.length && !problems.length) problems.push("there are no rows");
  if (problems.length) throw new Error(problems.join("\n"));
  return rows;
}

/**
 * Refuse a row with nothing to learn, as edgetune/data/rows.py does.
 *
 * @param {Row} row
 * @throws {Error} What the model is to write is empty.
 */
export function refuseEmpty(row) {
  if ("text" in row) {
    if (!row.text.trim()) throw new Error("the text is empty");
    return;
  }
  const answers =
    "messages" in row
      ? row.messages.filter(isTrained).map(({ content }) => content)
      : [row.completion];
  if (answers.some((answer) => !answer.trim())) throw new Error("an answer is empty");
}

/**
 * @param {any} row
 * @returns {Row}
 */
function checkRow(row) {
  const keys = row !== null && typeof row === "object" ? Object.keys(row).sort().join(", ") : typeof row;
  if (keys === "text" && typeof row.text === "string") return row;
  if (keys === "completion, prompt" && typeof row.prompt === "string" && typeof row.completion === "string") return row;
  if (keys === "messages" && Array.isArray(row.messages) && row.messages.length && row.messages.every(isMessage)) {
    return row;
  }
  throw new Error(
    'a row has "messages", "prompt" and "completion", or "text"; a message has "role" and "content"; ' +
      `found ${keys || "nothing"}`,
  );
}

/**
 * Whether a message is an answer that is trained: one of weight 0 is only read.
 *
 * @param {Message} message
 */
export function isTrained({ role, weight }) {
  return role === "assistant" && weight !== 0;
}

/** @param {any} message */
function isMessage(message) {
  const weighed = message?.role === "assistant" && [0, 1].includes(message.weight);
  const keys = weighed ? 3 : 2;
  return ROLES.includes(message?.role) && typeof message?.content === "string" && Object.keys(message).length === keys;
}
