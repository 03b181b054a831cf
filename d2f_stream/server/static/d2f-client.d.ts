/** Types of d2f-client.js. Events are named as they travel; options as JavaScript writes them. */

export interface StreamStarted {
  type: "stream.started";
  stream: string;
  seq: number;
  request_id: string;
  model: string;
  block_size: number;
  prompt_tokens: number;
}

/** A block became final. The texts of a stream's blocks concatenate to its final text. */
export interface Block {
  type: "block.committed";
  stream: string;
  seq: number;
  index: number;
  start: number;
  stop: number;
  text: string;
  token_ids: number[];
  steps: number;
  elapsed_ms: number;
  /** Where the request asks for them: natural logarithms, one for each token. */
  logprobs?: number[];
  /** Where the request asks for logprobs: what each token adds to the text. */
  texts?: string[];
}

/** A block that is being denoised: provisional, may be missing, is never replayed. */
export interface Draft {
  type: "block.draft";
  stream: string;
  index: number;
  text: string;
  /** Which positions hold a token. */
  filled: boolean[];
  /** One piece of text per position, empty at masks. */
  texts: string[];
}

export type FinishReason = "eos" | "length" | "stop" | "cancelled";

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  steps: number;
}

export interface Timings {
  first_block_ms: number | null;
  total_ms: number;
}

export interface StreamFinished {
  type: "stream.finished";
  stream: string;
  seq: number;
  reason: FinishReason;
  text_length: number;
  usage: Usage;
  timings: Timings;
}

export interface StreamFailed {
  type: "stream.failed";
  stream: string;
  seq: number;
  code: string;
  message: string;
}

export type StreamEvent = StreamStarted | Block | Draft | StreamFinished | StreamFailed;

/** The settings of a request; those left out are the model's own. */
export interface Params {
  max_new_tokens?: number;
  block_size?: number;
  add_threshold?: number;
  activate_threshold?: number;
  confidence_threshold?: number;
  max_active_blocks?: number | null;
  temperature?: number;
  top_p?: number;
  seed?: number | null;
  rank?: "confidence" | "margin" | "neg_entropy" | "position";
  stop?: string | string[];
  stop_at_eos?: "truncate" | "drain";
  tail?: "cut" | "drop" | "whole";
  num_per_step?: number;
  steps_per_block?: number;
  schedule?: "even" | "masks" | "linear";
  edit_threshold?: number | null;
  max_edit_steps?: number;
  sub_block_size?: number;
  attention?: "blocks" | "full";
  /** Whether fewer blocks may be denoised at once while other answers share the steps. */
  may_narrow?: boolean;
  /** "verify" keeps of a block what the model's own next tokens say too: its autoregressive answer. */
  commit?: "filled" | "verify";
  drafts?: boolean;
  /** Whether blocks tell the log-probability and the text of each of their tokens. */
  logprobs?: boolean;
}

export interface ModelCard {
  name: string;
  family: string;
  native_block_size: number;
  max_block_size: number;
  max_len: number;
  defaults: Required<Params>;
  description: string;
  /** Of the weights, such as "Apache-2.0"; empty where it is not known. */
  license: string;
  /** Prompts that show what the model can do. */
  examples: string[];
}

export interface ServerHello {
  type: "server.hello";
  protocol: number;
  model: ModelCard;
  resume_ttl_s: number;
}

export interface ServerClosing {
  type: "server.closing";
  message: string;
  deadline_s: number;
}

/** A user's turn (with `raw` a verbatim text), token ids, or chat messages. */
export type Prompt = string | number[] | { role: string; content: string }[];

export interface GenerateOptions {
  params?: Params;
  /** Whether the answer goes on while nobody is connected. Default: "continue". */
  onDisconnect?: "continue" | "cancel";
  /** Whether drafts are sent too. Default: false. */
  drafts?: boolean;
  /** Whether a string is taken verbatim; else it is a user's turn, for a model that chats. Default: false. */
  raw?: boolean;
  /** Cancels the stream when aborted. */
  signal?: AbortSignal;
  /** 16 to 128 letters, digits, "_" or "-", hard to guess. Default: a fresh one. */
  requestId?: string;
}

export interface ResumeOptions {
  stream: string;
  request_id: string;
  /** The last event that is known; -1 reads from the beginning. Default: -1. */
  after_seq?: number;
  /** The text up to there, so that `text` is whole. Default: "". */
  text?: string;
  drafts?: boolean;
  signal?: AbortSignal;
}

export interface Result {
  text: string;
  /** Those that this page received: after `resume`, the tokens behind `after_seq`. */
  tokenIds: number[];
  reason: FinishReason;
  usage: Usage;
  timings: Timings;
}

export declare class D2FError extends Error {
  constructor(code: string, message: string, retryAfterS?: number | null);
  /** The server's code, or one of this side: "connection_lost" after giving up. */
  readonly code: string;
  readonly retryAfterS: number | null;
}

export declare class D2FStream implements AsyncIterable<StreamEvent> {
  readonly requestId: string;
  /** The server's name of the stream; null until it has started. */
  readonly id: string | null;
  /** Of the last event that came; -1 before the first. */
  readonly lastSeq: number;
  readonly text: string;
  readonly tokenIds: number[];
  readonly started: boolean;
  readonly ended: boolean;
  /** End the answer within a step; what was committed stays. Idempotent. */
  cancel(): void;
  /** Wait for the end. Rejects with a D2FError. */
  result(): Promise<Result>;
  /** Every event. Throws only where the request was turned away before it had started. */
  [Symbol.asyncIterator](): AsyncGenerator<StreamEvent, void, void>;
  /** The committed blocks. Throws a D2FError where the stream failed. */
  blocks(): AsyncGenerator<Block, void, void>;
}

export type State = "connecting" | "open" | "reconnecting" | "closed";

export interface StateDetail {
  state: State;
  error: D2FError | null;
  retryInMs: number | null;
}

export interface ClientEvents {
  state: CustomEvent<StateDetail>;
  hello: CustomEvent<ServerHello>;
  closing: CustomEvent<ServerClosing>;
}

export interface ClientOptions {
  /** ws: or wss:, ending in /v1/stream. */
  url: string | URL;
  /** Travels as a subprotocol, never in the address. */
  token?: string | null;
  /** For tests. */
  WebSocket?: typeof globalThis.WebSocket;
  /** First and longest wait between tries, when to give up, and how long a hello may take. */
  times?: { baseMs?: number; maxMs?: number; giveUpMs?: number; helloMs?: number };
}

export declare class D2FClient extends EventTarget {
  constructor(options: ClientOptions);
  readonly state: State;
  /** Null until the first hello. */
  readonly hello: ServerHello | null;
  readonly model: ModelCard | null;
  connect(): Promise<ServerHello>;
  authenticate(token: string): Promise<ServerHello>;
  retry(): void;
  generate(prompt: Prompt, options?: GenerateOptions): D2FStream;
  resume(options: ResumeOptions): D2FStream;
  close(): void;
  addEventListener<Name extends keyof ClientEvents>(
    type: Name,
    listener: (event: ClientEvents[Name]) => void,
    options?: AddEventListenerOptions | boolean,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: AddEventListenerOptions | boolean,
  ): void;
}

/** Return a fresh request_id. */
export declare function newRequestId(): string;
