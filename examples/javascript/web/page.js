/**
 * The page: what it shows, and when. Everything that computes is in worker.js.
 *
 * Settings may come in the address, such as `?steps=120&learning-rate=0.003`.
 */

import { parseRows } from "../training/rows.js";
import { Channel } from "./channel.js";
import { LossCurve } from "./curve.js";
import { RowEditor } from "./row-editor.js";

/** @type {Channel} */
let worker;
const curve = new LossCurve(/** @type {any} */ (document.getElementById("curve")));
const editor = new RowEditor(find("rows"), () => void refreshTokens());

/** What is shown is the first of several quick edits' last. */
let edits = 0;
let isTraining = false;

/**
 * @param {string} id
 * @returns {any} The element; its kind is known to who asks.
 */
function find(id) {
  return document.getElementById(id);
}

/** @param {string} message */
function say(message, isProblem = false) {
  find("status").textContent = message;
  find("status").classList.toggle("bad", isProblem);
}

/** @param {unknown} error */
function complain(error) {
  say(error instanceof Error ? error.message : String(error), true);
}

/** @param {number} bytes */
function size(bytes) {
  return bytes < 1e6
    ? `${(bytes / 1e3).toFixed(0)} kB`
    : bytes < 1e9
      ? `${(bytes / 1e6).toFixed(1)} MB`
      : `${(bytes / 1e9).toFixed(2)} GB`;
}

/** From the second visit on, no server is needed: offline.js keeps what was fetched. */
async function keepForOffline() {
  // Private windows have no service workers.
  const registration = await navigator.serviceWorker?.register("offline.js").catch(() => null);
  const first = registration && !registration.active ? (registration.installing ?? registration.waiting) : null;
  if (!first) return;
  await new Promise((resolve) => {
    first.addEventListener("statechange", () => ["activated", "redundant"].includes(first.state) && resolve(null));
  });
  // What the page is made of came before anybody kept it.
  const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  await Promise.all([location.pathname, ...loaded].map((address) => fetch(address)));
}

async function open() {
  /** @type {Map<string, HTMLElement>} */
  const bars = new Map();
  const model = await worker.call("open", {}, ({ path, received, size: all }) => {
    if (!bars.has(path)) {
      const bar = document.createElement("span");
      bar.title = path;
      bars.set(path, bar);
      find("files").append(bar);
    }
    const bar = /** @type {HTMLElement} */ (bars.get(path));
    bar.style.setProperty("--part", `${(100 * received) / all}%`);
    say(`${path}: ${size(received)} of ${size(all)}`);
  });
  find("model-name").textContent = model.name;
  const facts = [
    `${size(model.bytes)}, every byte verified`,
    `frozen weights in ${model.weights}`,
    `${model.trainable.toLocaleString("en")} trainable numbers`,
    `${model.threads} ${model.threads === 1 ? "thread" : "threads"}`,
  ];
  find("facts").replaceChildren(
    ...facts.map((fact) => {
      const item = document.createElement("li");
      item.textContent = fact;
      return item;
    }),
  );
  find("model").classList.add("ready");
  if (!find("learning-rate").value) find("learning-rate").value = model.learningRate;
  say(model.hasLearnt ? "What it learnt here before is loaded." : "Ready.");
  find("forget").disabled = find("save").disabled = !model.hasLearnt;
}

/** Rows that come with the page, if there are any. */
async function openRows() {
  const response = await fetch("rows.jsonl");
  if (response.ok) editor.rows = parseRows(await response.text());
  else editor.add();
  find("question").value = firstQuestion() ?? "";
}

function firstQuestion() {
  for (const row of editor.rows) {
    const question = "messages" in row && row.messages.find((message) => message.role === "user");
    if (question) return question.content;
  }
  return null;
}

async function refreshTokens() {
  const edit = ++edits;
  await new Promise((resolve) => setTimeout(resolve, 150));
  if (edit !== edits || find("start").disabled) return;
  const shown = await worker.call("tokens", { rows: editor.rows });
  if (edit === edits) editor.show(shown, find("show-tokens").checked);
}

/** @param {boolean} isBusy */
function setBusy(isBusy) {
  for (const id of ["start", "ask-now", "question", "save", "forget"]) find(id).disabled = isBusy;
  const wasAtStop = document.activeElement === find("stop");
  find("stop").hidden = !isTraining;
  find("start").hidden = isTraining;
  // What was pressed is gone: the keyboard goes on with what stands in its place.
  if (isTraining) find("stop").focus();
  else if (wasAtStop) find("start").focus();
  find("answers").ariaBusy = String(isBusy); // read out whole answers, not every word
}

async function ask() {
  const question = find("question").value;
  find("before").textContent = find("after").textContent = "";
  for (const [id, isBase] of /** @type {const} */ ([
    ["before", true],
    ["after", false],
  ])) {
    const text = await worker.call("ask", { question, isBase }, (growing) => show(id, growing));
    show(id, text);
  }
}

/**
 * @param {"before" | "after"} id
 * @param {string} answer
 */
function show(id, answer) {
  find(id).textContent = answer || "(no answer)";
}

async function train() {
  const settings = {
    steps: find("steps").valueAsNumber,
    batchSize: find("batch-size").valueAsNumber,
    learningRate: find("learning-rate").valueAsNumber,
    schedule: find("schedule").value,
    shuffle: find("shuffle").checked,
  };
  const question = find("question").value;
  curve.start(settings.steps);
  find("after").textContent = "";
  find("after-heading").textContent = "After";
  show("before", await worker.call("ask", { question, isBase: true }, (growing) => show("before", growing)));
  const started = performance.now();
  const isKept = await worker.call("train", { rows: editor.rows, question, settings }, (progress) => {
    if ("answer" in progress) {
      find("after-heading").textContent = `After ${progress.step} steps`;
      return show("after", progress.answer);
    }
    curve.add(progress.loss);
    const seconds = (performance.now() - started) / 1000;
    const left = (seconds / progress.step) * (settings.steps - progress.step);
    find("progress").textContent =
      progress.step < settings.steps
        ? `Step ${progress.step} of ${settings.steps}, ${Math.ceil(left)} s left`
        : `${settings.steps} steps in ${seconds.toFixed(0)} s`;
  });
  const done = curve.losses.length;
  if (!done) return say("Stopped before the first step.");
  show("after", await worker.call("ask", { question, isBase: false }, (growing) => show("after", growing)));
  find("after-heading").textContent = `After ${done} steps`;
  const [first, last] = [curve.losses[0], curve.losses[done - 1]].map((loss) => loss.toFixed(3));
  const kept = isKept ? "Kept in this browser." : "This browser keeps nothing: save the adapter.";
  say(`Learnt in ${done} steps. Loss ${first} → ${last}. ${kept}`);
}

/**
 * Do something that keeps the worker busy; say what went wrong.
 *
 * @param {() => Promise<void>} job
 */
async function run(job) {
  setBusy(true);
  try {
    await job();
  } catch (error) {
    complain(error);
  } finally {
    isTraining = false;
    setBusy(false);
  }
}

/**
 * @param {Uint8Array<ArrayBuffer>} bytes
 * @param {string} name
 */
function download(bytes, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

find("settings").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  isTraining = true;
  void run(train);
});
find("asking").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  void run(ask);
});
find("stop").addEventListener("click", () => void worker.call("stop"));
find("add-row").addEventListener("click", () => editor.add());
find("show-tokens").addEventListener("change", () => void refreshTokens());
find("open-rows").addEventListener("change", async (/** @type {Event} */ event) => {
  const input = /** @type {HTMLInputElement} */ (event.target);
  try {
    const [file] = input.files ?? [];
    if (file) editor.rows = parseRows(await file.text());
    say("");
  } catch (error) {
    complain(error);
  }
  input.value = "";
});
find("save").addEventListener("click", async () => {
  const { weights, config } = await worker.call("adapter");
  download(weights, "adapter_model.safetensors");
  download(config, "adapter_config.json");
});
find("forget").addEventListener(
  "click",
  () =>
    void run(async () => {
      await worker.call("forget");
      curve.start(1);
      find("after").textContent = "";
      say("Forgotten: the model is as it came.");
    }),
);

for (const [name, value] of new URLSearchParams(location.search)) {
  const input = find(name);
  if (input?.type === "checkbox") input.checked = value === "true";
  else if (input?.closest("#settings")) input.value = value;
}

try {
  if (!isSecureContext)
    throw new Error("A browser verifies files on https pages and on localhost only; open this one there.");
  await keepForOffline();
  worker = new Channel(new Worker("worker.js", { type: "module" }));
  await openRows();
  await open();
  setBusy(false);
  void refreshTokens();
} catch (error) {
  complain(error);
}
