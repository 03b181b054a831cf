/** A chat as it is kept: its name, its settings, and the last turn of the branch that is shown. */

import { newRequestId } from "../d2f-client.js";

const LONGEST_TITLE = 60;

/** Return a chat in which nothing was asked. */
export function newChat() {
  const now = Date.now();
  const empty = { title: "", system: "", params: {}, leaf: null };
  return { id: newRequestId(), createdAt: now, updatedAt: now, ...empty };
}

/** Return what a chat is called that begins with a question. */
export function titleOf(question) {
  const line = question.trim().split("\n")[0];
  return line.length <= LONGEST_TITLE ? line : `${line.slice(0, LONGEST_TITLE - 1).trimEnd()}…`;
}
