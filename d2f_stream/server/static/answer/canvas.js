/**
 * Canvas: the blocks that are in work, position by position: a quiet bar for a mask, a tinted word
 * for a token that was accepted. What is committed leaves it for the text.
 */

import { element } from "../dom.js";

const GOES_ON_IN = new Set(["P", "LI", "UL", "OL", "BLOCKQUOTE", "H4", "H5", "H6"]);

export class Canvas {
  #blocks = new Map(); // index -> { span, cells }

  constructor() {
    this.root = element("span", "canvas");
    this.root.setAttribute("aria-hidden", "true");
  }

  get isEmpty() {
    return this.#blocks.size === 0;
  }

  /** Draw a block's state. */
  draw({ index, filled, texts, text }) {
    const { span, cells } = this.#block(index);
    if (filled.length === 0) {
      cells.length = 0;
      span.textContent = text;
      return;
    }
    while (cells.length < filled.length) {
      const cell = element("span", "mask");
      cells.push(cell);
      span.append(cell);
    }
    filled.forEach((isFilled, position) => {
      const cell = cells[position];
      const className = isFilled ? "token" : "mask";
      if (cell.className !== className) cell.className = className;
      const shown = isFilled ? texts[position] : "";
      if (cell.textContent !== shown) cell.textContent = shown;
    });
  }

  /** Take away a block that is final, or all of them. */
  erase(index = null) {
    for (const [at, { span }] of this.#blocks) {
      if (index !== null && at !== index) continue;
      span.remove();
      this.#blocks.delete(at);
    }
  }

  /** Stand where the text will go on: in the last line of `open`, or on a line of its own. */
  place(text, open, isInLine) {
    const end = isInLine && open !== null ? endOf(open) : null;
    this.root.classList.toggle("apart", end === null);
    const parent = end ?? text;
    if (this.root.parentElement !== parent || this.root.nextSibling) parent.append(this.root);
  }

  #block(index) {
    let block = this.#blocks.get(index);
    if (block === undefined) {
      block = { span: element("span", "block"), cells: [] };
      this.#blocks.set(index, block);
      const later = [...this.#blocks].filter(([at]) => at > index).sort(([a], [b]) => a - b)[0];
      this.root.insertBefore(block.span, later?.[1].span ?? null);
    }
    return block;
  }
}

/** Return the element that more text would go on in; null where it would begin one of its own. */
function endOf(open) {
  let end = open.lastElementChild;
  if (end?.classList.contains("code")) return end.querySelector("code");
  if (!end || !GOES_ON_IN.has(end.tagName)) return null;
  for (;;) {
    const next = end.lastElementChild;
    if (next === null || !GOES_ON_IN.has(next.tagName)) break;
    end = next;
  }
  return ["UL", "OL", "BLOCKQUOTE"].includes(end.tagName) ? null : end;
}
