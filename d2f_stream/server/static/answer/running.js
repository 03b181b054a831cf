/**
 * RunningAnswer: an answer on its way, from the request to its last event, shown or not.
 *
 * It goes on while another chat is looked at, and keeps every lasting event at once. Where the
 * server finds the prompt too long, it leaves the oldest turn out and asks again.
 */

import { Announcer } from "./announcer.js";
import { Player } from "./player.js";
import { ThoughtSplit } from "./thought.js";
import { charsOf, messagesFor, numToLeaveOut } from "../ask/context.js";
import { apply, fail } from "../chats/turn.js";
import { newRequestId } from "../d2f-client.js";

const TOO_LONG = /^(prompt_too_long|message_too_large)$/;
const plainModels = new Set(); // names of those that take no messages

export class RunningAnswer {
  #client;
  #path;
  #chat;
  #choice;
  #on;
  #player;
  /** @type {any} */
  #view = null;
  /** @type {Announcer | null} */
  #announcer = null;
  #split = new ThoughtSplit();

  /**
   * @param {object} options
   * @param {any} options.turn its record, which grows
   * @param {any[]} options.path the turns before it, and it
   * @param {{ system: string, params: any }} options.chat
   * @param {any} options.client
   * @param {{ isCanvas: boolean, pace: number }} options.choice
   * @param {any} options.on what to do: save() the turn, replan() as more is left out, draw(act) what
   *   moves the page, changed() once all has come, ended() once all is shown
   */
  constructor({ turn, path, chat, client, choice, on }) {
    this.turn = turn;
    this.stream = null;
    this.#path = path;
    this.#chat = chat;
    this.#client = client;
    this.#choice = choice;
    this.#on = on;
    this.#player = new Player((event) => this.#show(event), choice.pace);
    this.#split.push(turn.text);
  }

  /** Whether all has come, and only the picture is behind. */
  get hasCome() {
    return this.stream?.ended && this.turn.status !== "running";
  }

  /** Show it in a view that was made of its turn as it is now; `log` is told the text to come. */
  attach(view, log) {
    this.#player.flush(); // into the view before it, since the new one has it
    this.#view = view;
    this.#announcer = new Announcer(log);
    this.#player.setPace(this.#choice.pace);
  }

  /** Go on unseen. */
  detach() {
    this.#view = null;
    this.#announcer = null;
    this.#player.setPace(0);
    this.#player.flush();
  }

  /** Take up the reader's choice of a pace. */
  changePace() {
    if (this.#view !== null) this.#player.setPace(this.#choice.pace);
  }

  flush() {
    this.#player.flush();
  }

  /** Stop the answer; where it has come and is only being shown, show the rest. */
  stop() {
    if (this.hasCome) {
      this.#player.flush();
      return;
    }
    this.stream?.cancel();
    this.#player.setPace(0);
  }

  /** Read the answer to its end. */
  async run() {
    const { turn } = this;
    for (;;) {
      this.stream = this.#open();
      try {
        for await (const event of this.stream) this.#receive(event);
        break;
      } catch (error) {
        if (this.#mend(error)) continue;
        fail(turn, error);
        break;
      }
    }
    this.#on.save();
    this.#announcer?.push(this.#split.end().answer);
    this.#announcer?.end();
    this.#player.push({ type: "end" }); // behind what is still to be shown
    this.#on.changed();
  }

  #open() {
    const { turn } = this;
    const drafts = this.#choice.isCanvas;
    if (turn.stream !== null) {
      const { stream, requestId, lastSeq } = turn;
      return this.#client.resume({ stream, request_id: requestId, after_seq: lastSeq, drafts });
    }
    const { max_new_tokens, ...others } = this.#chat.params;
    const isAsked = max_new_tokens !== undefined && !turn.shortened;
    const params = isAsked ? { ...others, max_new_tokens } : others;
    return this.#client.generate(this.#prompt(params), { params, requestId: turn.requestId, drafts });
  }

  #prompt(params) {
    const { turn } = this;
    const { model } = this.#client;
    if (plainModels.has(model?.name)) return turn.question + turn.text;
    const { system } = this.#chat;
    if (model !== null && turn.promptTokens === null) {
      const before = turn.numLeftOut;
      turn.numLeftOut = numToLeaveOut(this.#path, turn, { system, model, params });
      if (turn.numLeftOut !== before) this.#on.replan();
    }
    const messages = messagesFor(this.#path, turn, system);
    turn.promptChars = charsOf(messages);
    this.#on.save();
    return messages;
  }

  /** Change the request so that it may be served; false where nothing helps. */
  #mend(error) {
    const { turn } = this;
    if (error.code === "no_chat_template" && !plainModels.has(this.#client.model?.name)) {
      plainModels.add(this.#client.model?.name);
    } else if (TOO_LONG.test(error.code) && this.#path.indexOf(turn) > turn.numLeftOut) {
      turn.numLeftOut += 1;
      this.#on.replan();
    } else if (TOO_LONG.test(error.code) && !turn.shortened && this.#chat.params.max_new_tokens) {
      turn.shortened = true; // the answer takes the room that is left
    } else {
      return false;
    }
    turn.requestId = newRequestId();
    this.#on.save();
    return true;
  }

  #receive(event) {
    const { turn } = this;
    if (event.type !== "block.draft") {
      apply(turn, event);
      this.#on.save();
    }
    if (event.type === "block.committed") {
      const { answer, isTaken } = this.#split.push(event.text);
      if (isTaken) this.#announcer?.restart();
      this.#announcer?.push(answer);
    }
    this.#player.push({ ...event, progress: turn.progress });
  }

  #show(event) {
    if (event.type === "end") this.#on.ended();
    else if (this.#view !== null) this.#on.draw(() => this.#view.show(event));
  }
}
