/**
 * Transcript: the turns of this tab, kept in its sessionStorage after every event that lasts.
 *
 * A turn holds all that is needed to draw its answer again and, while it runs, to read it on after
 * a reload. Knows neither the page nor the connection.
 */

import { sentenceFor } from "./sentences.js";

const KEY = "d2f.conversation";

export class Transcript {
  #storage;

  constructor(storage = globalThis.sessionStorage) {
    this.#storage = storage;
    this.turns = read(storage, KEY) ?? [];
  }

  /** Begin a turn. `requestId` names it at the server, whether the page is loaded again or not. */
  add({ question, requestId, params }) {
    const turn = {
      question,
      requestId,
      params,
      stream: null,
      lastSeq: -1,
      blocks: [],
      status: "running",
      reason: null,
      usage: null,
      timings: null,
      error: null,
    };
    this.turns.push(turn);
    this.save();
    return turn;
  }

  /** Take in a lasting event of the turn's stream. */
  apply(turn, event) {
    if (event.type === "stream.failed") {
      this.fail(turn, event); // which the client may have made itself: its seq does not count
      return;
    }
    turn.lastSeq = event.seq;
    switch (event.type) {
      case "stream.started":
        turn.stream = event.stream;
        break;
      case "block.committed": {
        const { index, start, stop, text, steps, elapsed_ms } = event;
        turn.blocks.push({ index, start, stop, text, steps, elapsed_ms });
        break;
      }
      case "stream.finished":
        turn.status = "finished";
        turn.reason = event.reason;
        turn.usage = event.usage;
        turn.timings = event.timings;
    }
    this.save();
  }

  /** End a turn that got no more. */
  fail(turn, error) {
    turn.status = "failed";
    turn.error = { code: error.code, message: sentenceFor(error) };
    this.save();
  }

  /** Let a turn that failed run again, from its last event on. */
  reopen(turn) {
    turn.status = "running";
    turn.error = null;
    this.save();
  }

  remove(turn) {
    this.turns = this.turns.filter((kept) => kept !== turn);
    this.save();
  }

  clear() {
    this.turns = [];
    this.save();
  }

  /** The chat messages that ask a turn's question: what went before it, and the question. */
  messagesFor(turn) {
    const messages = [];
    for (const past of this.turns) {
      if (past === turn) break;
      if (past.status !== "finished" || past.blocks.length === 0) continue;
      messages.push({ role: "user", content: past.question });
      messages.push({ role: "assistant", content: textOf(past) });
    }
    return [...messages, { role: "user", content: turn.question }];
  }

  save() {
    write(this.#storage, KEY, this.turns);
  }
}

/** Return the committed text of a turn. */
export function textOf(turn) {
  return turn.blocks.map((block) => block.text).join("");
}

/** Return what a storage holds under a key; null where it is blocked, empty or damaged. */
export function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

/** Store a value. A full or blocked storage costs the memory of the tab, nothing else. */
export function write(storage, key, value) {
  try {
    storage.setItem(key, JSON.stringify(value));
  } catch {
    // The page works on without it.
  }
}
