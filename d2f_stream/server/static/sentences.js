/** What a reader is told of an error: one sentence, the server's own where it is clear to anybody. */

const SENTENCES = {
  stream_lost:
    "The server no longer knows this answer; it was probably restarted. What had arrived is kept.",
  unauthorized: "This server asks for a token.",
  shutting_down: "The server is shutting down and takes no more questions.",
};

/** Return the sentence for an error, with its capital and its full stop. */
export function sentenceFor({ code, message }) {
  const text = (SENTENCES[code] ?? message).trim() || "Something went wrong";
  const ended = /[.!?]$/.test(text) ? text : `${text}.`;
  return ended[0].toUpperCase() + ended.slice(1);
}
