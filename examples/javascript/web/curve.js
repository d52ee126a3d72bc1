/**
 * The loss, step by step, as a picture.
 */

const HEIGHT = 260;
const LEFT = 44;
const RIGHT = 14;
const TOP = 26;
const BOTTOM = 30;
const SVG = "http://www.w3.org/2000/svg";

/** Draws losses as they come. */
export class LossCurve {
  /** @type {number[]} */
  losses = [];
  #steps = 1;
  #svg;

  /** @param {SVGSVGElement} svg */
  constructor(svg) {
    this.#svg = svg;
    new ResizeObserver(() => this.#draw()).observe(svg); // also draws it the first time
  }

  /** @param {number} steps Steps of the run that begins. */
  start(steps) {
    this.losses = [];
    this.#steps = steps;
    this.#draw();
  }

  /** @param {number} loss */
  add(loss) {
    this.losses.push(loss);
    this.#draw();
  }

  #description() {
    const { losses } = this;
    if (!losses.length) return "No training yet";
    const [first, last] = [losses[0], losses[losses.length - 1]].map((loss) => loss.toFixed(2));
    return `Loss from ${first} to ${last}, step ${losses.length} of ${this.#steps}`;
  }

  #draw() {
    const { losses } = this;
    const width = this.#svg.clientWidth;
    const top = ceiling(Math.max(...losses, 0.1));
    const x = (/** @type {number} */ step) =>
      LEFT + ((step - 1) / Math.max(1, this.#steps - 1)) * (width - LEFT - RIGHT);
    const y = (/** @type {number} */ loss) => HEIGHT - BOTTOM - (loss / top) * (HEIGHT - TOP - BOTTOM);
    const parts = [];
    for (let share = 0; share <= 4; share++) {
      const value = (top * share) / 4;
      const classes = share ? "grid" : "axis";
      parts.push(element("line", { class: classes, x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      parts.push(text(String(Number(value.toPrecision(2))), LEFT - 8, y(value) + 4, "end"));
    }
    parts.push(text("loss", LEFT, TOP - 8, "start"));
    parts.push(text("step 1", LEFT, HEIGHT - 8, "start"));
    parts.push(text(`step ${this.#steps}`, width - RIGHT, HEIGHT - 8, "end"));
    if (losses.length) {
      const points = losses.map((loss, index) => `${x(index + 1).toFixed(1)},${y(loss).toFixed(1)}`);
      const last = { x: x(losses.length), y: y(losses[losses.length - 1]) };
      const area = `${LEFT},${y(0)} ${points.join(" ")} ${last.x.toFixed(1)},${y(0)}`;
      parts.push(element("polygon", { class: "area", points: area }));
      parts.push(element("polyline", { class: "line", points: points.join(" ") }));
      parts.push(element("circle", { class: "last", cx: last.x, cy: last.y, r: 5 }));
      const anchor = last.x > width - 80 ? "end" : "middle";
      const label = text(
        losses[losses.length - 1].toFixed(3),
        last.x + (anchor === "end" ? 6 : 0),
        last.y - 14,
        anchor,
      );
      label.setAttribute("class", "value");
      parts.push(label);
    }
    this.#svg.replaceChildren(...parts);
    this.#svg.setAttribute("aria-label", this.#description());
  }
}

/**
 * A round number that is not lower.
 *
 * @param {number} value
 */
function ceiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return unit * ([1, 1.5, 2, 3, 4, 5, 6, 8, 10].find((factor) => factor * unit >= value) ?? 10);
}

/**
 * @param {string} name
 * @param {Record<string, string | number>} attributes
 */
function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

/**
 * @param {string} content
 * @param {number} x
 * @param {number} y
 * @param {string} anchor
 */
function text(content, x, y, anchor) {
  const made = element("text", { x, y, "text-anchor": anchor });
  made.textContent = content;
  return made;
}
