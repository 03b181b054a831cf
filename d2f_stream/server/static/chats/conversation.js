/**
 * Conversation: the chat that is open, drawn: its questions, its answers, and what can be done to
 * each. Holds the chat's records and asks the page (`act`) for all that needs more.
 */

import { answerOf } from "../answer/thought.js";
import { AnswerView } from "../answer/view.js";
import { questionView } from "../ask/question.js";
import { copyFor } from "../copy.js";
import { button, element } from "../dom.js";
import { alternatives, newestLeaf, pathTo } from "./turn.js";

const MENDABLE = /^(invalid_.*|prompt_too_long|message_too_large)$/; // by the reader
const PASSING = /^(connection_lost|unauthorized)$/; // the answer may still be there
const CONTINUED = /^(length|cancelled)$/;

const numbers = new Intl.NumberFormat("en");

export class Conversation {
  #root;
  #act;
  #sections = new Map(); // turn id -> { root, view }

  /**
   * `act` has: description(), maxLen(), isBusy(), ask(question, parent), again(turn), readOn(turn),
   * goOn(turn), edit(turn), replace(turn), attach(turn, view), choose(leaf).
   */
  constructor(root, act) {
    this.#root = root;
    this.#act = act;
    this.chat = null;
    this.turns = new Map();
    root.addEventListener("click", ({ target }) => {
      const copy = target.closest?.(".copy");
      if (copy) copyFor(copy, codeOf(copy.closest(".code")));
    });
  }

  /** The turns that are shown. */
  get path() {
    return pathTo(this.turns, this.chat?.leaf);
  }

  /** Show a chat and its turns; null shows none. */
  open(chat, turns) {
    this.chat = chat;
    this.turns = turns;
    this.draw();
  }

  /** Draw all that is shown anew. */
  draw() {
    this.#root.replaceChildren();
    this.#sections.clear();
    for (const turn of this.path) this.#append(turn);
  }

  /** Draw a turn: a new one behind the others, another one in its place. */
  drawTurn(turn) {
    const old = this.#sections.get(turn.id);
    if (old === undefined) {
      this.#append(turn);
      return;
    }
    const { root } = old;
    this.#append(turn);
    root.replaceWith(this.#sections.get(turn.id).root);
  }

  /** Draw a turn's question anew: there is more to say of it. */
  drawQuestion(turn) {
    const section = this.#sections.get(turn.id);
    section?.root.firstElementChild?.replaceWith(this.#question(turn));
  }

  /** Show how a turn's answer ended. */
  end(turn) {
    const section = this.#sections.get(turn.id);
    if (section === undefined) return;
    section.view.end(turn, { isNew: true });
    this.#addActions(turn, section.view);
  }

  #append(turn) {
    const root = element("section", "turn");
    root.dataset.turn = turn.id;
    const view = new AnswerView(turn, this.#act.description());
    root.append(this.#question(turn), view.root);
    this.#sections.set(turn.id, { root, view });
    this.#root.append(root);
    if (turn.status === "running") this.#act.attach(turn, view);
    else this.#addActions(turn, view);
  }

  #question(turn) {
    const others = alternatives(this.turns, turn);
    return questionView(turn.question, {
      at: others.indexOf(turn),
      of: others.length,
      leftOut: this.#leftOut(turn),
      onEdit: (question) => this.#act.ask(question, turn.parent),
      onChoose: (at) => {
        this.#act.choose(newestLeaf(this.turns, others[at]));
        const section = this.#sections.get(others[at].id);
        section?.root.querySelector(".question .tool:enabled").focus({ preventScroll: true });
      },
    });
  }

  #leftOut({ numLeftOut }) {
    if (numLeftOut === 0) return "";
    const maxLen = this.#act.maxLen();
    const room = maxLen ? `The model’s context of ${numbers.format(maxLen)} tokens` : "The context";
    const which = numLeftOut === 1 ? "question and answer" : `${numLeftOut} questions and answers`;
    return `${room} is full: the oldest ${which} were left out.`;
  }

  #addActions(turn, view) {
    const actions = element("div", "actions");
    const whenIdle = (label, act) => button(label, () => !this.#act.isBusy() && act());
    const text = answerOf(turn.text).trim();
    if (text) {
      const copy = button("Copy", () => copyFor(copy, text));
      actions.append(copy);
    }
    if (turn.error) actions.append(whenIdle(...this.#remedy(turn)));
    else if (CONTINUED.test(turn.reason) && turn.text) {
      actions.append(whenIdle("Continue", () => this.#act.goOn(turn)));
    }
    if (!turn.error) actions.append(whenIdle("Regenerate", () => this.#act.again(turn)));
    view.append(actions);
  }

  /** What to do about a turn that failed. */
  #remedy(turn) {
    const { code } = turn.error;
    if (PASSING.test(code) && turn.stream !== null) {
      return ["Read on", () => this.#act.readOn(turn)];
    }
    if (MENDABLE.test(code)) return ["Edit and ask again", () => this.#act.edit(turn)];
    return ["Ask again", () => this.#act.replace(turn)];
  }
}

/** The code of a block as it is written, without what is still in work. */
function codeOf(block) {
  const code = block.querySelector("code").cloneNode(true);
  for (const canvas of code.querySelectorAll(".canvas")) canvas.remove();
  return `${code.textContent}\n`;
}
