/**
 * Context: what of a chat is sent with a question, and how much of the model's room it takes.
 *
 * The page has no tokenizer. It learns from the server's counts how many characters a token has in
 * this chat, and estimates what comes; the server has the last word.
 */

import { answerOf } from "../answer/thought.js";

const USUAL_RATE = 0.3; // tokens per character of English
const ENOUGH = 100; // characters to learn from
const PER_MESSAGE = 5; // tokens that a chat template puts around one
const ROOM = 0.25; // share of the model's room that an answer is left, where nobody asks for more

/** Return the chat messages that ask for a turn's answer, the beginning of it where there is one. */
export function messagesFor(path, turn, system) {
  const messages = system.trim() ? [message("system", system)] : [];
  for (const past of path.slice(turn.numLeftOut)) {
    if (past === turn) break;
    const answer = past.status === "finished" ? answerOf(past.text) : "";
    if (answer) messages.push(message("user", past.question), message("assistant", answer));
  }
  messages.push(message("user", turn.question));
  if (turn.text) messages.push(message("assistant", turn.text));
  return messages;
}

/** Return how many turns at the chat's beginning must stay out for the answer to have room. */
export function numToLeaveOut(path, turn, { system, model, params }) {
  const usual = Math.min(model.defaults.max_new_tokens, Math.floor(model.max_len * ROOM));
  const room = model.max_len - (params.max_new_tokens ?? usual);
  const rate = rateOf(path);
  let numLeftOut = turn.numLeftOut;
  const most = path.indexOf(turn);
  while (numLeftOut < most) {
    const messages = messagesFor(path, { ...turn, numLeftOut }, system);
    if (estimate(messages, rate) <= room) break;
    numLeftOut += 1;
  }
  return numLeftOut;
}

/** Return the tokens of a chat so far and of what is being typed: { used, isExact }. */
export function use(path, typed, { system }) {
  const rate = rateOf(path);
  const last = path.findLast(({ status, promptTokens }) => status !== "failed" || promptTokens);
  const more = typed.trim() ? Math.ceil(typed.length * rate) + 2 * PER_MESSAGE : 0;
  if (last?.promptTokens) {
    return { used: last.promptTokens + last.progress.tokens - last.before.tokens + more, isExact: !more };
  }
  const sent = last === undefined ? [] : messagesFor(path, last, system);
  if (last === undefined && system.trim()) sent.push(message("system", system));
  return { used: estimate(sent, rate) + more, isExact: sent.length === 0 && more === 0 };
}

/** Return the characters of messages. */
export function charsOf(messages) {
  return messages.reduce((sum, { content }) => sum + content.length, 0);
}

function estimate(messages, rate) {
  return Math.ceil(charsOf(messages) * rate) + messages.length * PER_MESSAGE;
}

/** Tokens per character, as the server last counted those of a prompt and its answer. */
function rateOf(path) {
  const counted = path.findLast(
    ({ promptTokens, promptChars, text, before }) =>
      promptTokens && before.tokens === 0 && promptChars + text.length > ENOUGH,
  );
  if (counted === undefined) return USUAL_RATE;
  const { promptTokens, promptChars, progress, text } = counted;
  return (promptTokens + progress.tokens) / (promptChars + text.length);
}

function message(role, content) {
  return { role, content };
}
