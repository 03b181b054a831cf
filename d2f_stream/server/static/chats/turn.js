/**
 * Turn: a question and its answer, as they are kept. All that is needed to draw the answer again
 * and, while it runs, to read it on after a reload. Plain values; knows neither page nor connection.
 */

import { newRequestId } from "../d2f-client.js";
import { sentenceFor } from "../sentences.js";

const NO_PROGRESS = { tokens: 0, steps: 0, ms: 0, firstMs: null };

/** Return a new turn of a chat. `parent` is the id of the turn before it; null begins the chat. */
export function newTurn({ chat, parent, question, numLeftOut = 0 }) {
  return {
    ...{ id: newRequestId(), chat, parent, question, createdAt: Date.now() },
    ...{ text: "", status: "running", reason: null, error: null },
    ...request(),
    progress: NO_PROGRESS,
    before: NO_PROGRESS, // of the streams that this answer was continued from
    numLeftOut, // turns at the chat's beginning that the model did not read
    promptTokens: null,
    promptChars: 0,
  };
}

/** What names a request at the server, whether the page is loaded again or not. */
function request() {
  return { requestId: newRequestId(), stream: null, lastSeq: -1, shortened: null };
}

/** Take in a lasting event of the turn's stream. */
export function apply(turn, event) {
  if (event.type === "stream.failed") {
    fail(turn, event); // which the client may have made itself: its seq does not count
    return;
  }
  turn.lastSeq = event.seq;
  switch (event.type) {
    case "stream.started":
      turn.stream = event.stream;
      turn.promptTokens = event.prompt_tokens;
      break;
    case "block.committed":
      turn.text += event.text;
      move(turn, event.stop, event.steps, event.elapsed_ms, event.elapsed_ms);
      break;
    case "stream.finished": {
      const { usage, timings, reason } = event;
      turn.status = "finished";
      turn.reason = reason;
      move(turn, usage.completion_tokens, usage.steps, timings.total_ms, timings.first_block_ms);
    }
  }
}

function move(turn, tokens, steps, ms, firstMs) {
  const { before, progress } = turn;
  turn.progress = {
    tokens: before.tokens + tokens,
    steps: before.steps + steps,
    ms: before.ms + ms,
    firstMs: progress.firstMs ?? firstMs,
  };
}

/** End a turn that got no more. */
export function fail(turn, error) {
  turn.status = "failed";
  turn.error = { code: error.code, message: sentenceFor(error) };
}

/** Let a turn that failed run again, from its last event on. */
export function reopen(turn) {
  Object.assign(turn, { status: "running", reason: null, error: null });
}

/** Let a turn be asked for under a new name: what it has by now is the beginning of its answer. */
export function askAgain(turn) {
  reopen(turn);
  Object.assign(turn, request());
  turn.before = turn.progress;
}

/** Let a turn be asked for once more, from its answer's beginning. */
export function startOver(turn) {
  Object.assign(turn, { text: "", progress: NO_PROGRESS });
  askAgain(turn);
}

/** The branch of a chat that ends with a turn: from the first one to it. */
export function pathTo(turns, leaf) {
  const path = [];
  const seen = new Set();
  for (let at = leaf; !seen.has(at); ) {
    const turn = turns.get(at);
    if (turn === undefined) break;
    seen.add(at);
    path.unshift(turn);
    at = turn.parent;
  }
  return path;
}

/** The turns that stand at the same place, oldest first: other questions there, other answers. */
export function alternatives(turns, { parent }) {
  const found = [...turns.values()].filter((other) => other.parent === parent);
  return found.sort((a, b) => a.createdAt - b.createdAt || (a.id < b.id ? -1 : 1));
}

/** The end of the newest branch that goes through a turn. */
export function newestLeaf(turns, turn) {
  for (let leaf = turn; ; ) {
    const next = alternatives(turns, { parent: leaf.id }).at(-1);
    if (next === undefined) return leaf;
    leaf = next;
  }
}
