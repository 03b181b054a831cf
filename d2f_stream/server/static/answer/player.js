/**
 * Player: shows a stream's events one step at a time, for as long as an eye needs.
 *
 * A small model answers faster than anybody can follow. Only what is drawn waits, and never longer
 * than `MAX_LAG_MS`; the stream itself, its text and what screen readers are told never do.
 */

/** Milliseconds that a step stays. */
export const PACES = { live: 0, gentle: 240, slow: 900 };

/** How far the picture may fall behind the stream. */
export const MAX_LAG_MS = 3000;

export class Player {
  #show;
  #stepMs;
  #queue = [];
  #lastIndex = -1;
  #shownAt = -Infinity; // when the last step was
  #timer;

  /** `show` gets each event in its turn; `stepMs` is one of PACES. */
  constructor(show, stepMs) {
    this.#show = show;
    this.#stepMs = stepMs;
  }

  /** Whether events wait to be shown. */
  get isBehind() {
    return this.#queue.length > 0;
  }

  /** Change the pace, also of what waits. */
  setPace(stepMs) {
    this.#stepMs = stepMs;
    this.#run();
  }

  push(event) {
    // The events of a step come in the order of their blocks: an index that does not grow begins
    // the next step.
    let isNewStep = false;
    if (event.index !== undefined) {
      isNewStep = event.index <= this.#lastIndex;
      this.#lastIndex = event.index;
    }
    this.#queue.push({ event, isNewStep, latestAt: performance.now() + MAX_LAG_MS });
    this.#run();
  }

  /** Show all that waits, now. */
  flush() {
    clearTimeout(this.#timer);
    while (this.isBehind) this.#showNext();
  }

  #run() {
    clearTimeout(this.#timer);
    while (this.isBehind) {
      const wait = this.#queue[0].isNewStep ? this.#dueAt() - performance.now() : 0;
      if (wait > 0) {
        this.#timer = setTimeout(() => this.#run(), wait);
        return;
      }
      this.#showNext();
    }
  }

  /** When the next step is shown: soon enough that those behind it can be in time, evenly spaced. */
  #dueAt() {
    let step = this.#stepMs;
    let numSteps = 0;
    for (const { isNewStep, latestAt } of this.#queue) {
      numSteps += isNewStep ? 1 : 0;
      step = Math.min(step, (latestAt - this.#shownAt) / numSteps);
    }
    return this.#shownAt + Math.max(0, step);
  }

  #showNext() {
    const { event, isNewStep } = this.#queue.shift();
    if (isNewStep || this.#shownAt === -Infinity) this.#shownAt = performance.now();
    this.#show(event);
  }
}
