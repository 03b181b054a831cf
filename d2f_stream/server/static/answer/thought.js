/**
 * Thoughts: what a model writes between <think> and </think> before its answer. They are folded, and
 * part of neither the answer that is copied nor the conversation that is sent.
 *
 * A chat template may write <think> itself, so that an answer begins amid the thought and only its
 * end tells. A </think> that begins a line, outside of code and without a <think> before, is one.
 */

import { element } from "../dom.js";

const OPEN = "<think>";
const CLOSE = "</think>";

const numbers = new Intl.NumberFormat("en");

/** Cuts a text that grows into the thought at its beginning, if it has one, and the answer. */
export class ThoughtSplit {
  #state = "before"; // any of both, then "thought", then "answer"
  #held = ""; // what may still become the beginning of a mark
  /** @type {string | null} */
  #said = ""; // the answer while it may turn out to be a thought; null where it cannot

  /** Whether a thought has begun and not ended. */
  get isThinking() {
    return this.#state === "thought";
  }

  /**
   * Take in more text; return what is new of each: { thought, answer, isTaken }. With `isTaken`, all
   * that was answer so far is no answer: the thought has it.
   * @returns {{ thought: string, answer: string, isTaken?: boolean }}
   */
  push(text) {
    let rest = this.#held + text;
    this.#held = "";
    if (this.#state === "before") {
      const begun = rest.trimStart();
      if (begun.length < OPEN.length && OPEN.startsWith(begun)) {
        this.#held = rest;
        return { thought: "", answer: "" };
      }
      this.#state = begun.startsWith(OPEN) ? "thought" : "answer";
      if (this.isThinking) rest = begun.slice(OPEN.length);
    }
    if (this.#state === "answer") return this.#answer(rest);
    this.#said = null;
    const at = rest.indexOf(CLOSE);
    if (at >= 0) {
      this.#state = "answer";
      return { thought: rest.slice(0, at), answer: rest.slice(at + CLOSE.length) };
    }
    const numHeld = [...CLOSE].findLastIndex((_, end) => rest.endsWith(CLOSE.slice(0, end)));
    this.#held = rest.slice(rest.length - numHeld);
    return { thought: rest.slice(0, rest.length - numHeld), answer: "" };
  }

  #answer(rest) {
    if (this.#said === null) return { thought: "", answer: rest };
    const from = Math.max(0, this.#said.length - CLOSE.length);
    this.#said += rest;
    for (let at = from; (at = this.#said.indexOf(CLOSE, at)) >= 0; at += CLOSE.length) {
      const thought = this.#said.slice(0, at);
      if (!endsThought(thought)) continue;
      const answer = this.#said.slice(at + CLOSE.length);
      this.#said = null;
      return { thought, answer, isTaken: true };
    }
    return { thought: "", answer: rest };
  }

  /** End the text; return what was held back. */
  end() {
    const held = this.#held;
    this.#held = "";
    return this.isThinking ? { thought: held, answer: "" } : { thought: "", answer: held };
  }
}

/** Return whether a </think> behind a text that began as an answer makes it a thought. */
function endsThought(text) {
  const isInCode = (text.match(/^ {0,3}(```|~~~)/gm) ?? []).length % 2 === 1;
  return /(^|\n)[ \t]*$/.test(text) && !isInCode && !text.includes(OPEN);
}

/** Return an answer's text without the thought before it. */
export function answerOf(text) {
  const split = new ThoughtSplit();
  const { thought, answer } = split.push(text);
  if (thought === "" && !split.isThinking) return answer + split.end().answer;
  return answer.trimStart();
}

/** A thought on the page: folded, and never touched again where it has come. */
export class ThoughtView {
  root = element("details", "thought");
  /** Where what is in work of it stands. */
  body = element("div");
  #summary = element("summary", "", "Thinking");
  #text = document.createTextNode("");
  #isWhole = false;

  constructor() {
    const line = element("p", "text");
    line.append(this.#text);
    this.body.append(line);
    this.root.append(this.#summary, this.body);
  }

  push(text) {
    this.#text.appendData(this.#text.data ? text : text.trimStart());
  }

  /** Say that it is whole. Idempotent. */
  end() {
    if (this.#isWhole) return;
    this.#isWhole = true;
    const words = this.#text.data.split(/\s+/).filter(Boolean).length;
    this.#summary.textContent = `Thoughts, ${numbers.format(words)} ${words === 1 ? "word" : "words"}`;
  }
}
