/**
 * Calls from the page into its worker. A call may report progress before it returns.
 */

/** @typedef {(value: any) => void} Progress */

/** The page's end. */
export class Channel {
  #worker;
  #next = 0;
  /** @type {Map<number, {resolve: (value: any) => void, reject: (error: Error) => void, progress: Progress}>} */
  #calls = new Map();

  /** @param {Worker} worker */
  constructor(worker) {
    this.#worker = worker;
    worker.addEventListener("message", ({ data }) => {
      const call = this.#calls.get(data.id);
      if (!call) return;
      if ("progress" in data) return call.progress(data.progress);
      this.#calls.delete(data.id);
      if ("error" in data) call.reject(new Error(data.error));
      else call.resolve(data.result);
    });
    worker.addEventListener("error", (event) => {
      for (const call of this.#calls.values()) call.reject(new Error(event.message || "the worker does not start"));
      this.#calls.clear();
    });
  }

  /**
   * @param {string} name
   * @param {any} [parameters]
   * @param {Progress} [progress]
   * @returns {Promise<any>}
   */
  call(name, parameters = {}, progress = () => {}) {
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      this.#calls.set(id, { resolve, reject, progress });
      this.#worker.postMessage({ id, name, parameters });
    });
  }
}

/**
 * The worker's end.
 *
 * @param {Record<string, (parameters: any, progress: Progress) => any>} functions
 */
export function answerCalls(functions) {
  self.addEventListener("message", async ({ data: { id, name, parameters } }) => {
    try {
      self.postMessage({
        id,
        result: await functions[name](parameters, (progress) => self.postMessage({ id, progress })),
      });
    } catch (error) {
      self.postMessage({ id, error: error instanceof Error ? error.message : String(error) });
    }
  });
}
