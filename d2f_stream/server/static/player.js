/**
 * Player: shows a stream's events one step at a time, for as long as an eye needs.
 *
 * A small model answers faster than anybody can follow. Only what is drawn waits; the stream itself,
 * its text and what screen readers are told never do.
 */

/** Milliseconds that a step stays, and how far the picture may fall behind the stream in all. */
export const PACES = {
  live: { stepMs: 0, maxLagMs: 0 },
  gentle: { stepMs: 240, maxLagMs: 3000 },
  slow: { stepMs: 900, maxLagMs: Infinity },
};

export class Player {
  #show;
  #pace;
  #queue = [];
  #stepsWaiting = 0;
  #lastIndex = -1;
  #due = 0;
  #timer;

  /** `show` gets each event in its turn; `pace` is one of PACES. */
  constructor(show, pace) {
    this.#show = show;
    this.#pace = pace;
  }

  /** Whether events wait to be shown. */
  get isBehind() {
    return this.#queue.length > 0;
  }

  /** Change the pace, also of what waits. */
  setPace(pace) {
    this.#pace = pace;
    this.#due = Math.min(this.#due, performance.now() + pace.stepMs);
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
    this.#queue.push({ event, isNewStep });
    this.#stepsWaiting += isNewStep ? 1 : 0;
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
      const wait = this.#queue[0].isNewStep ? this.#due - performance.now() : 0;
      if (wait > 0) {
        this.#timer = setTimeout(() => this.#run(), wait);
        return;
      }
      this.#showNext();
    }
  }

  #showNext() {
    const { event, isNewStep } = this.#queue.shift();
    if (isNewStep) this.#stepsWaiting -= 1;
    if (isNewStep || this.#due === 0) {
      const { stepMs, maxLagMs } = this.#pace;
      this.#due = performance.now() + Math.min(stepMs, maxLagMs / Math.max(1, this.#stepsWaiting));
    }
    this.#show(event);
  }
}
