/** Archive: chats as a file, and back. A file may come from anywhere: only what fits is taken. */

const VERSION = 1;
const REASONS = new Set(["eos", "length", "stop", "cancelled"]);
const ID = /^[\w-]{16,128}$/;

/** Return the content of a file with chats; each is { chat, turns }. */
export function pack(chats) {
  const packed = chats.map(({ chat, turns }) => ({ ...chat, turns: [...turns.values()] }));
  return JSON.stringify({ d2f_chats: VERSION, chats: packed }, null, 1);
}

/** Return the chats of a file's content. Throws an Error whose message is for the reader. */
export function unpack(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("This file holds no chats: it is not JSON.");
  }
  if (content?.d2f_chats !== VERSION || !Array.isArray(content.chats)) {
    throw new Error("This file holds no chats that this page can read.");
  }
  return content.chats.map(chatOf);
}

function chatOf(found) {
  const { id, title, createdAt, updatedAt, system, params, leaf, turns } = found ?? {};
  const isChat = ID.test(id) && isText(title) && isTime(createdAt) && isTime(updatedAt);
  if (!isChat || !isText(system) || !isRecord(params) || !Array.isArray(turns)) {
    throw new Error(`The chat ${String(title ?? "without a title").slice(0, 60)} is damaged.`);
  }
  const kept = new Map();
  for (const turn of turns.map((one) => turnOf(one, id))) {
    if (turn.parent !== null && !kept.has(turn.parent)) turn.parent = null; // parents come first
    kept.set(turn.id, turn);
  }
  const end = kept.has(leaf) ? leaf : ([...kept.keys()].at(-1) ?? null);
  return { chat: { id, title, createdAt, updatedAt, system, params, leaf: end }, turns: kept };
}

function turnOf(found, chat) {
  const { id, parent, question, createdAt, text, reason, error, progress } = found ?? {};
  if (!ID.test(id) || !isText(question) || !isText(text) || !isTime(createdAt)) {
    throw new Error("A turn of a chat in this file is damaged.");
  }
  const hasError = isText(error?.code) && isText(error?.message);
  const figures = ["tokens", "steps", "ms"].map((name) => [name, number(progress?.[name])]);
  const cost = { ...Object.fromEntries(figures), firstMs: number(progress?.firstMs) || null };
  return {
    ...{ id, chat, parent: isText(parent) ? parent : null, question, createdAt, text },
    status: hasError ? "failed" : "finished",
    reason: hasError ? null : REASONS.has(reason) ? reason : "cancelled",
    error: hasError ? { code: error.code, message: error.message } : null,
    ...{ requestId: id, stream: null, lastSeq: -1, shortened: null },
    ...{ progress: cost, before: cost, numLeftOut: number(found.numLeftOut) },
    ...{ promptTokens: number(found.promptTokens) || null, promptChars: number(found.promptChars) },
  };
}

function isText(value) {
  return typeof value === "string";
}

function isTime(value) {
  return Number.isFinite(value);
}

function isRecord(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function number(value) {
  return Number.isFinite(value) && value > 0 ? value : 0;
}
