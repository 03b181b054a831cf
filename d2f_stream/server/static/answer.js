/**
 * AnswerView: how one answer looks, from its first masks to its figures.
 *
 * The canvas draws every position of the blocks in work: a quiet bar for a mask, a tinted word for a
 * token that was accepted, and plain text once the block is committed. Knows events and the record
 * of a turn; nothing of connections.
 */

const REASONS = {
  length: "Cut off here: the answer reached its token limit.",
  stop: "Ended by a stop string.",
  cancelled: "Stopped.",
};

const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fractions = new Intl.NumberFormat("en", {
  minimumFractionDigits: 1,
  maximumFractionDigits: 1,
});

/** Return an element with a class and text. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

export class AnswerView {
  #text = element("p", "text");
  #rail = element("div", "rail");
  #note = element("p", "note");
  #figures = element("dl", "figures");
  #foot = element("div", "foot");
  #first = null; // block that was shown
  #blocks = new Map(); // index -> { span, cells, segment }
  #description; // what the model is for

  /**
   * `turn` is the record of transcript.js; what it holds already is shown at once.
   * `description` says what the model is for, where that is known.
   */
  constructor(turn, description = "") {
    this.#description = description;
    this.root = element("article", "answer");
    this.#foot.append(this.#figures);
    this.root.append(element("h3", "unseen", "Answer"), this.#text, this.#rail);
    this.root.append(this.#note, this.#foot);
    this.#rail.setAttribute("aria-hidden", "true");
    this.#note.hidden = true;
    this.#figures.hidden = true;
    turn.blocks.forEach((block) => this.#commit(block));
    if (turn.status === "running") this.#wait();
    else this.end(turn, { isNew: false });
    if (turn.blocks.length > 0) this.#showProgress(turn.blocks.at(-1), turn.blocks[0]);
  }

  /** Draw an event of the stream. */
  show(event) {
    this.root.classList.remove("waiting");
    switch (event.type) {
      case "stream.started":
        this.root.classList.add("started");
        break;
      case "block.draft":
        this.#draft(event);
        break;
      case "block.committed":
        this.#commit(event);
        this.#first ??= event;
        this.#showProgress(event, this.#first);
    }
  }

  /** Draw how the answer ended; `isNew` where the reader has not been told. */
  end(turn, { isNew }) {
    this.root.classList.remove("waiting", "started");
    this.root.removeAttribute("aria-busy");
    for (const [index, { span, segment, isFinal }] of this.#blocks) {
      if (isFinal) continue;
      span.remove();
      segment.remove();
      this.#blocks.delete(index);
    }
    if (turn.usage) this.#showTotals(turn);
    const silence = isSilent(turn) ? aboutSilence(turn.reason, this.#description) : "";
    const note = turn.error?.message ?? (silence || REASONS[turn.reason]);
    this.#note.hidden = !note;
    if (isNew) this.#note.setAttribute("role", turn.error ? "alert" : "status"); // before its text
    this.#note.textContent = note ?? "";
    this.#note.classList.toggle("failure", Boolean(turn.error));
  }

  /** Put controls beside the figures. */
  append(controls) {
    this.#foot.append(controls);
  }

  #wait() {
    this.root.classList.add("waiting");
    this.root.setAttribute("aria-busy", "true");
  }

  #block(index) {
    let block = this.#blocks.get(index);
    if (block === undefined) {
      block = { span: element("span", "block"), cells: [], segment: element("i"), isFinal: false };
      block.span.dataset.index = String(index);
      block.span.setAttribute("aria-hidden", "true"); // until it is final
      this.#blocks.set(index, block);
      this.#text.append(block.span);
      this.#rail.append(block.segment);
    }
    return block;
  }

  #draft({ index, filled, texts, text }) {
    const block = this.#block(index);
    if (block.isFinal) return;
    if (filled.length === 0) {
      block.cells.length = 0;
      block.span.textContent = text;
      return;
    }
    while (block.cells.length < filled.length) {
      const cell = element("span", "mask");
      block.cells.push(cell);
      block.span.append(cell);
    }
    filled.forEach((isFilled, position) => {
      const cell = block.cells[position];
      const className = isFilled ? "token" : "mask";
      if (cell.className !== className) cell.className = className;
      const shown = isFilled ? texts[position] : "";
      if (cell.textContent !== shown) cell.textContent = shown;
    });
    const share = filled.filter(Boolean).length / filled.length;
    block.segment.style.setProperty("--share", share.toFixed(3));
  }

  #commit({ index, text }) {
    const block = this.#block(index);
    const isFirst = index === 0;
    block.isFinal = true;
    block.cells = [];
    block.span.textContent = isFirst ? text.trimStart() : text;
    block.span.removeAttribute("aria-hidden");
    block.span.classList.add("final");
    block.segment.style.setProperty("--share", "1");
    block.segment.classList.add("final");
  }

  #showProgress(block, first) {
    this.#setFigures([
      [fractions.format(block.stop / block.steps), "tokens per step"],
      [speed(block.stop, block.elapsed_ms), "tokens/s"],
      [duration(first.elapsed_ms), "to the first block"],
      [numbers.format(block.steps), block.steps === 1 ? "step" : "steps"],
    ]);
  }

  #showTotals({ usage, timings }) {
    const { completion_tokens: tokens, steps } = usage;
    if (steps === 0) return;
    this.#setFigures([
      [fractions.format(tokens / steps), "tokens per step"],
      [speed(tokens, timings.total_ms), "tokens/s"],
      [duration(timings.first_block_ms ?? timings.total_ms), "to the first block"],
      [numbers.format(steps), steps === 1 ? "step" : "steps"],
      [duration(timings.total_ms), "in all"],
    ]);
  }

  #setFigures(figures) {
    const pairs = figures.map(([value, label]) => {
      const pair = element("div");
      pair.append(element("dt", "", label), element("dd", "", value));
      return pair;
    });
    this.#figures.replaceChildren(...pairs);
    this.#figures.hidden = false;
  }
}

function isSilent(turn) {
  return Boolean(turn.reason) && turn.blocks.every((block) => block.text.trim() === "");
}

/** Say why an answer has no text. */
function aboutSilence(reason, description) {
  if (reason === "stop") return "A stop string ended the answer before its first word.";
  if (reason !== "eos") return "";
  const told = "The model ended its answer at once, without a word.";
  return description ? `${told} What it is for: ${description}` : told;
}

function speed(tokens, ms) {
  return ms > 0 ? numbers.format((tokens / ms) * 1000) : "–";
}

function duration(ms) {
  if (ms >= 1000) return `${fractions.format(ms / 1000)} s`;
  return `${ms >= 10 ? numbers.format(ms) : fractions.format(ms)} ms`;
}
