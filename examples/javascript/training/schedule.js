/**
 * Which rows a step takes, and its learning rate.
 */

/**
 * Batches without end, epoch after epoch; the last one of an epoch may be smaller.
 *
 * @template T
 * @param {T[]} rows At least one.
 * @param {number} batchSize
 * @param {number | null} seed Draws a new order every epoch; null keeps the order of the rows.
 * @returns {Generator<T[], never>}
 */
export function* batches(rows, batchSize, seed) {
  const random = seed === null ? null : mulberry32(seed);
  for (;;) {
    const order = random ? shuffled(rows, random) : rows;
    for (let start = 0; start < order.length; start += batchSize) yield order.slice(start, start + batchSize);
  }
}

/**
 * How the learning rate falls, from 1 at the start to its end: `edgetune train --schedule` has the same.
 *
 * @type {Record<string, (progress: number) => number>}
 */
const SCHEDULES = {
  constant: () => 1,
  linear: (progress) => 1 - progress,
  cosine: (progress) => (1 + Math.cos(Math.PI * progress)) / 2,
};

/**
 * Learning rate of a step.
 *
 * @param {string} schedule
 * @param {number} peak
 * @param {number} step Steps done before this one.
 * @param {number} steps Steps of the whole run.
 * @throws {Error} There is no such schedule.
 */
export function learningRate(schedule, peak, step, steps) {
  const factor = SCHEDULES[schedule];
  if (!factor) throw new Error(`schedule ${schedule} is unknown; choose ${Object.keys(SCHEDULES).join(", ")}`);
  return peak * factor(step / steps);
}

/**
 * Seeded numbers in [0, 1) (mulberry32 by Tommy Ettinger, public domain).
 *
 * @param {number} seed
 * @returns {() => number}
 */
function mulberry32(seed) {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * A new order (Fisher and Yates).
 *
 * @template T
 * @param {T[]} rows
 * @param {() => number} random
 * @returns {T[]}
 */
function shuffled(rows, random) {
  const order = [...rows];
  for (let end = order.length - 1; end > 0; end--) {
    const pick = Math.floor(random() * (end + 1));
    [order[end], order[pick]] = [order[pick], order[end]];
  }
  return order;
}
