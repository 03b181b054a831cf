/**
 * Streams of a d2f_stream server in a browser: blocks over one websocket, exactly once.
 *
 *     const client = new D2FClient({ url: "wss://host/v1/stream" });
 *     for await (const block of client.generate("...").blocks()) show(block.text);
 *
 * A lost connection is opened again and every running stream read on from the last event that came;
 * a request that had not started yet is sent again under the same request_id, which never starts it
 * twice. No dependencies; the types stand in d2f-client.d.ts.
 */

const SUBPROTOCOL = "d2f.v1.json";
const AUTH_SUBPROTOCOL = "d2f.auth.";
const UNAUTHORIZED = 4401;
const PROTOCOL_ERROR = 1002;
const MESSAGE_TOO_BIG = 1009;
const NEVER_OPENED = 1006;

const TIMES = { baseMs: 250, maxMs: 10_000, giveUpMs: 120_000, helloMs: 10_000 };

/** What belongs to a stream; events of a kind that is not known are skipped. */
const EVENTS = new Set([
  "stream.started",
  "block.committed",
  "block.draft",
  "stream.finished",
  "stream.failed",
]);

/** Requests that are over, remembered so that their late start can be cancelled. */
const MAX_REMEMBERED = 1024;

/** Drafts that wait for one slow iteration; beyond it the oldest is dropped. */
const MAX_WAITING_DRAFTS = 256;

/** An error with the server's stable code. */
export class D2FError extends Error {
  constructor(code, message, retryAfterS = null) {
    super(message);
    this.name = "D2FError";
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/** Return a fresh request_id. Pages on plain http have no crypto.randomUUID. */
export function newRequestId() {
  if (typeof crypto.randomUUID === "function") return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** One answer. Iterations read the same events, each from the beginning; leaving one ends nothing. */
export class D2FStream {
  #client;
  #log = [];
  #readers = new Set();
  #error = null;
  #promptTokens;
  #firstBlock = null;
  #lastBlock = null;
  #outcome;
  #settle;

  constructor(client, request) {
    this.#client = client;
    this.requestId = request.requestId;
    this.id = request.stream ?? null;
    this.lastSeq = request.afterSeq ?? -1;
    this.text = request.text ?? "";
    this.tokenIds = [];
    this.ended = false;
    this._request = request;
    this._wasSent = this.started; // whether the server may know of it
    this._isCancelled = false;
    this._resumedAfter = null; // asked for again on this connection, as an event was missing
    this.#promptTokens = 0;
    this.#outcome = new Promise((resolve, reject) => (this.#settle = { resolve, reject }));
    this.#outcome.catch(() => {}); // nobody has to ask for the result
  }

  /** Whether the server has begun; from then on the request is never sent again. */
  get started() {
    return this.id !== null;
  }

  /** End the answer within a step; what was committed stays. Idempotent. */
  cancel() {
    if (this.ended || this._isCancelled) return;
    this._isCancelled = true;
    this.#client._cancel(this);
  }

  /** Wait for the end: text, token ids, reason, usage and timings. Rejects with a D2FError. */
  result() {
    return this.#outcome;
  }

  /** Yield every event as the server sends it; drafts, where asked for, in between. */
  async *[Symbol.asyncIterator]() {
    const reader = { queue: [...this.#log], drafts: 0, wake: () => {} };
    this.#readers.add(reader);
    try {
      for (;;) {
        while (reader.queue.length > 0) {
          const event = reader.queue.shift();
          if (event.type === "block.draft") reader.drafts -= 1;
          yield event;
        }
        if (this.ended) break;
        await new Promise((resolve) => (reader.wake = resolve));
      }
    } finally {
      this.#readers.delete(reader);
    }
    if (this.#error !== null && !this.started) throw this.#error;
  }

  /** Yield the committed blocks; throws a D2FError where the stream failed. */
  async *blocks() {
    for await (const event of this) if (event.type === "block.committed") yield event;
    if (this.#error !== null) throw this.#error;
  }

  // What the client calls.

  /** Take an event; false where one before it is missing. Repeated events are dropped. */
  _receive(event) {
    if (this.ended) return true;
    if (event.type === "stream.started" && !this.started) this.id = event.stream;
    if (event.stream !== this.id) return true; // a second stream for the same request
    if (event.type === "block.draft") {
      this.#hand(event);
      return true;
    }
    if (event.seq <= this.lastSeq) return true;
    if (event.seq > this.lastSeq + 1) return false;
    this.lastSeq = event.seq;
    this.#log.push(event);
    if (event.type === "stream.started") this.#promptTokens = event.prompt_tokens;
    if (event.type === "block.committed") {
      this.text += event.text;
      this.tokenIds.push(...event.token_ids);
      this.#firstBlock ??= event;
      this.#lastBlock = event;
    }
    if (event.type === "stream.finished") this.#end(event, null);
    if (event.type === "stream.failed") this.#end(event, new D2FError(event.code, event.message));
    this.#hand(event);
    return true;
  }

  /** End the stream from this side. Idempotent. */
  _fail(error) {
    if (this.ended) return;
    if (!this.started) {
      this.#end(null, error);
      this.#wake();
      return;
    }
    const { code, message } = error;
    this._receive({
      type: "stream.failed",
      stream: this.id,
      seq: this.lastSeq + 1,
      code,
      message,
    });
  }

  /** End the stream as cancelled from this side, with what has come. Idempotent. */
  _endCancelled() {
    if (this.ended) return;
    const event = {
      type: "stream.finished",
      stream: this.id ?? this.requestId,
      seq: this.lastSeq + 1,
      reason: "cancelled",
      text_length: this.text.length,
      usage: {
        prompt_tokens: this.#promptTokens,
        completion_tokens: this.tokenIds.length,
        steps: this.#lastBlock?.steps ?? 0,
      },
      timings: {
        first_block_ms: this.#firstBlock?.elapsed_ms ?? null,
        total_ms: this.#lastBlock?.elapsed_ms ?? 0,
      },
    };
    this.#log.push(event);
    this.#end(event, null);
    this.#hand(event);
  }

  #end(event, error) {
    this.ended = true;
    this.#error = error;
    if (error !== null) {
      this.#settle.reject(error);
      return;
    }
    const { text, tokenIds } = this;
    const { reason, usage, timings } = event;
    this.#settle.resolve({ text, tokenIds, reason, usage, timings });
  }

  #hand(event) {
    for (const reader of this.#readers) {
      if (event.type === "block.draft" && ++reader.drafts > MAX_WAITING_DRAFTS) {
        reader.queue.splice(
          reader.queue.findIndex((waiting) => waiting.type === "block.draft"),
          1,
        );
        reader.drafts -= 1;
      }
      reader.queue.push(event);
    }
    this.#wake();
  }

  #wake() {
    for (const reader of this.#readers) reader.wake();
  }
}

/**
 * One connection to a server, opened when first needed and again whenever it is lost.
 *
 * Dispatches "state" (detail: state, error, retryInMs), "hello" and "closing" (detail: the message).
 */
export class D2FClient extends EventTarget {
  #url;
  #token;
  #WebSocket;
  #times;
  #socket = null;
  #streams = new Set();
  #owed = new Map(); // by request id: cancels of what ended on this side
  #over = new Map(); // request id -> stream id
  #state = "closed";
  #waiting = []; // of connect()
  #retryTimer;
  #helloTimer;
  #numTries = 0;
  #downSince = null;
  #hasGivenUp = false;
  #isShut = false;
  #onOnline = () => this.#comeOnline();

  constructor({ url, token = null, WebSocket = globalThis.WebSocket, times = {} }) {
    super();
    this.#url = String(url);
    this.#token = token;
    this.#WebSocket = WebSocket;
    this.#times = { ...TIMES, ...times };
    this.hello = null;
    this.model = null;
    globalThis.addEventListener?.("online", this.#onOnline);
  }

  /** "connecting", "open", "reconnecting" or "closed". */
  get state() {
    return this.#state;
  }

  /** Open the connection; resolves with the server's hello. */
  connect() {
    return new Promise((resolve, reject) => {
      if (this.#isShut) {
        reject(new D2FError("connection_lost", "the client was closed"));
        return;
      }
      if (this.#state === "open") {
        resolve(this.hello);
        return;
      }
      this.#waiting.push({ resolve, reject });
      this.#ensureOpening();
    });
  }

  /** Take another token, from the next connection on, which begins at once. */
  authenticate(token) {
    this.#token = token;
    this.#drop();
    this.#numTries = 0;
    this.#downSince = null;
    return this.connect();
  }

  /** Try again now instead of at the next planned time. */
  retry() {
    if (this.#socket === null && !this.#isShut) this.#openNow();
  }

  /** Ask for an answer. `prompt` is a user's turn (with `raw` a verbatim text), chat messages or token ids. */
  generate(prompt, options = {}) {
    const { params = {}, onDisconnect = "continue", drafts = false, raw = false, signal, requestId } = options;
    const request = { requestId: requestId ?? newRequestId(), prompt, raw, onDisconnect, drafts };
    request.params = drafts ? { ...params, drafts: true } : params;
    return this.#add(request, signal);
  }

  /** Read on a stream that another page, or this one before a reload, had begun. */
  resume({ stream, request_id, after_seq = -1, drafts = false, text = "", signal }) {
    const request = { requestId: request_id, stream, afterSeq: after_seq, drafts, text };
    return this.#add(request, signal);
  }

  /** Close for good; running streams fail here, and go on or end at the server as asked. */
  close() {
    this.#isShut = true;
    globalThis.removeEventListener?.("online", this.#onOnline);
    this.#stop(new D2FError("connection_lost", "the client was closed"));
  }

  // Streams.

  #add(request, signal) {
    if (this.#isShut) throw new D2FError("connection_lost", "the client was closed");
    const stream = new D2FStream(this, request);
    this.#streams.add(stream);
    signal?.addEventListener("abort", () => stream.cancel(), { once: true });
    if (signal?.aborted) stream.cancel();
    if (stream.ended) return stream;
    if (this.#state === "open") this.#submit(stream);
    else this.#ensureOpening();
    return stream;
  }

  _cancel(stream) {
    if (!stream._wasSent) {
      this.#endCancelled(stream);
    } else if (this.#state === "open") {
      this.#send(cancelOf(stream));
    } else {
      this.#owed.set(stream.requestId, cancelOf(stream));
      this.#endCancelled(stream);
    }
  }

  #submit(stream) {
    this.#send(stream.started ? resumeOf(stream) : generateOf(stream));
    stream._wasSent = true;
  }

  #send(message) {
    this.#socket.send(JSON.stringify(message));
  }

  // Messages.

  #receive(data) {
    let message;
    try {
      message = JSON.parse(data);
    } catch {
      this.#lost(PROTOCOL_ERROR, "the server sent what is not JSON");
      return;
    }
    switch (message.type) {
      case "server.hello":
        this.#greet(message);
        break;
      case "server.closing":
        this.#tell("closing", message);
        break;
      case "request.rejected":
        this.#reject(message);
        break;
      default:
        if (EVENTS.has(message.type)) this.#route(message);
    }
  }

  #greet(hello) {
    clearTimeout(this.#helloTimer);
    this.hello = hello;
    this.model = hello.model;
    this.#numTries = 0;
    this.#downSince = null;
    this.#state = "open";
    for (const cancel of this.#owed.values()) this.#send(cancel);
    this.#owed.clear();
    for (const stream of this.#streams) this.#submit(stream); // before listeners add more
    this.#enter("open");
    this.#tell("hello", hello);
    for (const { resolve } of this.#waiting.splice(0)) resolve(hello);
  }

  #route(event) {
    const isStart = event.type === "stream.started";
    for (const stream of this.#streams) {
      if (stream.id !== event.stream && !(isStart && stream.requestId === event.request_id)) continue;
      if (stream.started && stream.id !== event.stream) break; // a second one for the same request
      if (!stream._receive(event) && stream._resumedAfter !== stream.lastSeq) {
        stream._resumedAfter = stream.lastSeq;
        this.#send(resumeOf(stream)); // an event is missing: read on from there
      }
      if (stream.ended) this.#settle(stream);
      return;
    }
    const isKnown = [...this.#streams].some((stream) => stream.requestId === event.request_id);
    const isLate = this.#over.has(event.request_id) && this.#over.get(event.request_id) !== event.stream;
    if (isStart && (isKnown || isLate)) this.#send({ type: "cancel", stream: event.stream });
  }

  #reject({ code, message, request_id, stream: id, retry_after_s }) {
    const error = new D2FError(code, message, retry_after_s ?? null);
    if (!id && !request_id) {
      // The server could not read an operation, so nobody can tell which.
      for (const stream of this.#unanswered()) this.#failStream(stream, error);
      return;
    }
    const stream = [...this.#streams].find(
      (one) => (id && one.id === id) || (request_id && one.requestId === request_id),
    );
    if (stream === undefined || (stream.started && stream.id !== id)) return; // not about what runs
    if (stream._isCancelled && code === "stream_lost") this.#endCancelled(stream);
    else this.#failStream(stream, error);
  }

  /** The requests that may have reached the server and got no answer. */
  #unanswered() {
    return [...this.#streams].filter((stream) => stream._wasSent && !stream.started);
  }

  #failStream(stream, error) {
    stream._fail(error);
    this.#settle(stream);
  }

  #endCancelled(stream) {
    stream._endCancelled();
    this.#settle(stream);
  }

  #settle(stream) {
    this.#streams.delete(stream);
    this.#over.set(stream.requestId, stream.id);
    if (this.#over.size > MAX_REMEMBERED) this.#over.delete(this.#over.keys().next().value);
  }

  // The connection.

  #ensureOpening() {
    if (this.#socket === null && this.#retryTimer === undefined) this.#openNow();
  }

  #openNow() {
    this.#drop();
    this.#hasGivenUp = false;
    this.#downSince ??= Date.now();
    this.#enter(this.#numTries > 0 || this.hello ? "reconnecting" : "connecting");
    const protocols = [SUBPROTOCOL];
    if (this.#token !== null) protocols.push(AUTH_SUBPROTOCOL + base64url(this.#token));
    let socket;
    try {
      socket = new this.#WebSocket(this.#url, protocols);
    } catch (error) {
      this.#stop(new D2FError("connection_lost", `${this.#url} cannot be opened: ${error.message}`));
      return;
    }
    this.#socket = socket;
    const ifMine = (act) => (event) => this.#socket === socket && act(event);
    // A server that wants a token waits for it; an empty one makes it say so at once.
    socket.onopen = ifMine(() => {
      if (this.#token === null) this.#send({ type: "authenticate", token: "" });
    });
    socket.onmessage = ifMine((event) => this.#receive(event.data));
    socket.onclose = ifMine((event) => this.#lost(event.code, event.reason));
    this.#helloTimer = setTimeout(
      ifMine(() => this.#lost(NEVER_OPENED, "")),
      this.#times.helloMs,
    );
  }

  #lost(code, reason) {
    this.#drop();
    if (code === UNAUTHORIZED) {
      this.#stop(new D2FError("unauthorized", reason || "the server wants a token"));
      return;
    }
    if (code === PROTOCOL_ERROR) {
      this.#stop(new D2FError("protocol_error", reason || "the server could not read a message"));
      return;
    }
    if (code === MESSAGE_TOO_BIG) this.#failLargest(reason);
    this.#downSince ??= Date.now();
    const left = this.#downSince + this.#times.giveUpMs - Date.now();
    if (left <= 0) {
      const tried_s = Math.round(this.#times.giveUpMs / 1000);
      const message = `the server could not be reached for ${tried_s} s; is it running?`;
      this.#stop(new D2FError("connection_lost", message));
      return;
    }
    const bound = Math.min(this.#times.maxMs, this.#times.baseMs * 2 ** this.#numTries);
    const delay = Math.min(bound * (0.5 + Math.random() / 2), left);
    this.#numTries += 1;
    this.#retryTimer = setTimeout(() => this.#openNow(), delay);
    this.#enter("reconnecting", { retryInMs: delay });
  }

  /** End the largest request that got no answer: sent again, it would be refused again. */
  #failLargest(reason) {
    const error = new D2FError("message_too_large", reason || "the message is too large to send");
    const size = (stream) => JSON.stringify(generateOf(stream)).length;
    const largest = this.#unanswered().sort((a, b) => size(b) - size(a))[0];
    if (largest !== undefined) this.#failStream(largest, error);
  }

  /** Networks came back: a wait is over, and a connection that seems open may be dead. */
  #comeOnline() {
    if (this.#state === "closed" && !this.#hasGivenUp) return;
    this.#numTries = 0;
    this.#openNow();
  }

  /** Let go of the connection and of all timers. */
  #drop() {
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#helloTimer);
    this.#retryTimer = undefined;
    const socket = this.#socket;
    this.#socket = null;
    if (socket === null) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
    for (const stream of [...this.#streams]) {
      stream._resumedAfter = null;
      if (!stream._isCancelled) continue;
      this.#owed.set(stream.requestId, cancelOf(stream));
      this.#endCancelled(stream);
    }
  }

  /** Give up; `retry`, `connect`, `authenticate` or a new request begin again. */
  #stop(error) {
    this.#drop();
    this.#numTries = 0;
    this.#downSince = null;
    this.#hasGivenUp = error.code === "connection_lost" && !this.#isShut;
    this.#owed.clear();
    for (const stream of [...this.#streams]) this.#failStream(stream, error);
    for (const { reject } of this.#waiting.splice(0)) reject(error);
    this.#enter("closed", { error });
  }

  #enter(state, detail = {}) {
    this.#state = state;
    this.#tell("state", { state, error: null, retryInMs: null, ...detail });
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

function generateOf(stream) {
  const { requestId, prompt, raw, params, onDisconnect } = stream._request;
  const request = { request_id: requestId, prompt, raw, params, on_disconnect: onDisconnect };
  return { type: "generate", ...request };
}

function resumeOf(stream) {
  const { drafts } = stream._request;
  return { type: "resume", stream: stream.id, after_seq: stream.lastSeq, drafts };
}

function cancelOf(stream) {
  const name = stream.started ? { stream: stream.id } : { request_id: stream.requestId };
  return { type: "cancel", ...name };
}

function base64url(text) {
  const bytes = new TextEncoder().encode(text);
  const base64 = btoa(String.fromCharCode(...bytes));
  return base64.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}
