/**
 * AnswerView: how one answer looks, from its first masks to its figures.
 *
 * A Markdown block is drawn while its text arrives and never touched again once it is finished; the
 * canvas shows behind it what is still in work. Knows events and the record of a turn; nothing of
 * connections.
 */

import { element } from "../dom.js";
import { Canvas } from "./canvas.js";
import { MarkdownFeed } from "./feed.js";
import { showFigures } from "./figures.js";
import { Document } from "./markdown.js";
import { patch } from "./patch.js";
import { ThoughtSplit, ThoughtView } from "./thought.js";

const REASONS = {
  length: "Cut off here: the answer reached its token limit.",
  stop: "Ended by a stop string.",
  cancelled: "Stopped.",
};

export class AnswerView {
  #text = element("div", "prose");
  #note = element("p", "note");
  #figures = element("dl", "figures");
  #foot = element("div", "foot");
  #feed = new MarkdownFeed();
  #document = new Document();
  #canvas = new Canvas();
  #split = new ThoughtSplit();
  /** @type {ThoughtView | null} */
  #thought = null;
  /** @type {HTMLElement | null} */
  #open = null; // the element of the Markdown block that still grows
  #description; // what the model is for

  /**
   * `turn` is the record of turn.js; what it holds already is shown at once.
   * `description` says what the model is for, where that is known.
   */
  constructor(turn, description = "") {
    this.#description = description;
    this.root = element("article", "answer");
    this.#foot.append(this.#figures);
    this.root.append(element("h3", "unseen", "Answer"), this.#text, this.#note, this.#foot);
    this.#note.hidden = true;
    this.#add(turn.text);
    if (turn.status === "running") this.#wait(turn);
    else this.end(turn, { isNew: false });
    showFigures(this.#figures, turn.progress);
  }

  /** Draw an event of the stream. */
  show(event) {
    switch (event.type) {
      case "stream.started":
        this.root.classList.remove("waiting");
        break;
      case "block.draft":
        this.root.classList.remove("waiting");
        this.#canvas.draw(event);
        this.#placeCanvas();
        break;
      case "block.committed":
        this.root.classList.remove("waiting");
        this.#canvas.erase(event.index);
        this.#add(event.text);
        showFigures(this.#figures, event.progress);
    }
  }

  /** Draw how the answer ended; `isNew` where the reader has not been told. */
  end(turn, { isNew }) {
    this.root.classList.remove("waiting");
    this.root.removeAttribute("aria-busy");
    this.#canvas.erase();
    this.#canvas.root.remove();
    this.#take(this.#split.end());
    this.#thought?.end();
    for (const source of this.#feed.end()) this.#finish(source);
    showFigures(this.#figures, turn.progress);
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

  #wait({ text }) {
    this.root.classList.toggle("waiting", text === "");
    this.root.setAttribute("aria-busy", "true");
    this.#placeCanvas();
  }

  #add(text) {
    this.#take(this.#split.push(text));
    if (!this.#canvas.isEmpty) this.#placeCanvas();
  }

  #take({ thought, answer, isTaken = false }) {
    if (isTaken) this.#forget();
    if (thought || isTaken || this.#split.isThinking) {
      if (this.#thought === null) {
        this.#thought = new ThoughtView();
        this.#text.before(this.#thought.root);
      }
      this.#thought.push(thought);
    }
    if (!this.#split.isThinking) this.#thought?.end();
    if (answer) this.#write(answer);
  }

  #forget() {
    this.#text.replaceChildren();
    this.#feed = new MarkdownFeed();
    this.#document = new Document();
    this.#open = null;
  }

  #write(text) {
    for (const source of this.#feed.push(text)) this.#finish(source);
    const { shown, isCode } = this.#feed;
    if (shown.trim()) {
      const part = (this.#open ??= this.#part());
      patch(part, this.#document.renderOpen(shown, { isCode }), this.#canvas.root);
    } else if (this.#open !== null) {
      this.#open.remove();
      this.#open = null;
    }
  }

  #finish(source) {
    const part = this.#open ?? this.#part();
    this.#open = null;
    patch(part, this.#document.render(source), this.#canvas.root);
    part.classList.add("final");
    if (part.childElementCount === 0) part.remove();
  }

  #part() {
    const part = element("div", "part");
    this.#text.insertBefore(part, this.#canvas.root.parentElement === this.#text ? this.#canvas.root : null);
    return part;
  }

  #placeCanvas() {
    if (this.#split.isThinking && this.#thought !== null) {
      this.#canvas.place(this.#thought.body, this.#thought.body, true);
      return;
    }
    this.#canvas.place(this.#text, this.#open, this.#feed.isInLine);
  }
}

function isSilent(turn) {
  return Boolean(turn.reason) && turn.text.trim() === "";
}

/** Say why an answer has no text. */
function aboutSilence(reason, description) {
  if (reason === "stop") return "A stop string ended the answer before its first word.";
  if (reason !== "eos") return "";
  const told = "The model ended its answer at once, without a word.";
  return description ? `${told} What it is for: ${description}` : told;
}
