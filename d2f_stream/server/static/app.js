/** The chat page: joins the chats, the answers that are on their way and the connection. */

import { RunningAnswer } from "./answer/running.js";
import { Attachments } from "./ask/attachments.js";
import { Composer } from "./ask/composer.js";
import { use } from "./ask/context.js";
import { showUse } from "./ask/meter.js";
import { newChat, titleOf } from "./chats/chat.js";
import { Conversation } from "./chats/conversation.js";
import { Drawer } from "./chats/drawer.js";
import { ChatList } from "./chats/list.js";
import { ChatStore } from "./chats/store.js";
import { askAgain, newTurn, reopen, startOver } from "./chats/turn.js";
import { D2FClient } from "./d2f-client.js";
import { $ } from "./dom.js";
import { showConnection, storedToken } from "./link.js";
import { showModel } from "./model.js";
import { followEnd, scrollToEnd, watchDock } from "./scroll.js";
import { Settings } from "./settings.js";
import { watchTheme } from "./theme-choice.js";
import { tell } from "./toast.js";
import { ViewChoice } from "./view-choice.js";

const ADDRESS = "#chat-"; // and the id of the chat that is open

const client = new D2FClient({
  url: Object.assign(new URL("v1/stream", location.href), {
    protocol: location.protocol === "https:" ? "wss:" : "ws:",
    search: "",
    hash: "",
  }),
  token: storedToken(),
});
const store = new ChatStore();
const running = new Map(); // turn id -> RunningAnswer, of every chat
let chat = newChat(); // the one that is open
let isStale = false; // whether it has changed elsewhere

const conversation = new Conversation($("conversation"), {
  description: () => client.model?.description,
  maxLen: () => client.model?.max_len,
  isBusy: () => current() !== undefined,
  ask,
  again,
  goOn: (turn) => runAgain(turn, askAgain),
  readOn: (turn) => runAgain(turn, reopen),
  replace: (turn) => runAgain(turn, startOver),
  edit: takeBack,
  attach,
  choose,
});
const attachments = new Attachments($("attachments"), { changed: showContext, tell });
const composer = new Composer($("composer"), attachments, {
  mode: () => (current() === undefined ? "send" : current().hasCome ? "skip" : "stop"),
  ask: (question) => ask(question),
  stop: () => current()?.stop(),
  typed: showContext,
});
const choice = new ViewChoice($("show-canvas"), $("pace"), {
  onChange: () => current()?.changePace(),
});
const settings = new Settings($("fields"), {
  onChange: (chosen) => {
    Object.assign(chat, chosen);
    if (chat.leaf !== null) store.putChat(chat);
    showContext();
  },
});
const list = new ChatList(store, {
  chat: () => chat,
  working: () => new Set([...running.values()].map(({ turn }) => turn.chat)),
  ...{ open, forget, refresh, changed: showState },
});
const drawer = new Drawer($("chats"), $("toggle-chats"), $("shade"), [$("main"), $("dock")]);

// Questions and their answers.

/** The answer of the open chat that is on its way, or still being shown. */
function current() {
  return [...running.values()].find(({ turn }) => turn.chat === chat.id);
}

function ask(question, parent = chat.leaf) {
  if (current() !== undefined) return;
  $("same-again").hidden = true;
  const before = conversation.turns.get(parent);
  const turn = newTurn({ chat: chat.id, parent, question, numLeftOut: before?.numLeftOut });
  const isNext = parent === chat.leaf;
  conversation.turns.set(turn.id, turn);
  chat.title ||= titleOf(question);
  Object.assign(chat, { leaf: turn.id, updatedAt: turn.createdAt });
  store.putTurn(turn);
  store.putChat(chat);
  showAddress(chat.id);
  if (isNext) conversation.drawTurn(turn);
  else conversation.draw();
  showState();
  list.show();
  scrollToEnd();
  composer.focus();
}

/** Ask for another answer to a turn's question. */
function again(turn) {
  ask(turn.question, turn.parent);
  const { temperature = client.model?.defaults.temperature } = chat.params;
  followEnd(() => ($("same-again").hidden = temperature !== 0));
}

function runAgain(turn, change) {
  change(turn);
  store.putTurn(turn);
  conversation.drawTurn(turn);
  showState();
  composer.focus();
}

/** Show a turn's answer as it comes, from its beginning or from where a reload left it. */
function attach(turn, view) {
  const known = running.get(turn.id);
  const answer = known ?? new RunningAnswer({
    turn, chat, client, choice,
    path: conversation.path,
    on: {
      save: () => running.get(turn.id) === answer && store.putTurn(turn),
      replan: () => conversation.drawQuestion(turn),
      draw: (act) => {
        followEnd(act);
        showContext();
      },
      changed: showState,
      ended: () => end(answer),
    },
  });
  answer.attach(view, $("announcer"));
  if (known) return;
  running.set(turn.id, answer);
  answer.run();
}

function end(answer) {
  if (running.get(answer.turn.id) !== answer) return;
  running.delete(answer.turn.id);
  if (answer.turn.chat === chat.id) followEnd(() => conversation.end(answer.turn));
  if (isStale) refresh();
  showState();
  list.show();
}

/** Put a question that could not be served back where it can be changed. */
function takeBack(turn) {
  conversation.turns.delete(turn.id);
  chat.leaf = turn.parent;
  store.removeTurn(turn);
  if (conversation.turns.size > 0) store.putChat(chat);
  else store.remove(chat.id).then(() => list.show());
  conversation.draw();
  showState();
  composer.edit(turn.question);
}

function choose(leaf) {
  if (current() !== undefined) return;
  chat.leaf = leaf.id;
  store.putChat(chat);
  conversation.draw();
  showState();
}

// Chats.

/**
 * Open a chat; one that is not there, or null, is a new one.
 * @param {string | null} id
 */
async function open(id, { isNew = true } = {}) {
  const found = id === null ? null : await store.read(id);
  if (isNew) showAddress(found === null ? null : id);
  show(found ?? { chat: newChat(), turns: new Map() });
  drawer.leave();
  scrollToEnd();
  composer.focus();
}

function show(found) {
  if (found.chat.id !== chat.id) {
    current()?.detach();
    $("same-again").hidden = true;
  }
  chat = found.chat;
  isStale = false;
  for (const { turn } of running.values()) {
    if (turn.chat === chat.id) found.turns.set(turn.id, turn);
  }
  $("announcer").replaceChildren();
  conversation.open(chat, found.turns);
  settings.show(chat);
  showState();
  list.show();
}

/** Take in what was done to the open chat elsewhere: at once, or after the answer on its way. */
async function refresh() {
  if (chat.leaf === null) return;
  const { id } = chat;
  const found = await store.read(id);
  if (id !== chat.id) return;
  if (found === null) {
    forget(id);
    await open(null);
  } else if (current() === undefined) {
    show(found);
  } else {
    isStale = true;
  }
}

/** End a chat's answers, and keep no more of them. */
function forget(id) {
  for (const [turn, answer] of running) {
    if (answer.turn.chat !== id) continue;
    running.delete(turn);
    answer.detach();
    answer.stop();
  }
}

function showAddress(id) {
  const address = id === null ? location.pathname + location.search : ADDRESS + id;
  if (id === null ? location.hash.startsWith(ADDRESS) : location.hash !== address) {
    history.pushState(null, "", address);
  }
}

function addressed() {
  return location.hash.startsWith(ADDRESS) ? location.hash.slice(ADDRESS.length) : null;
}

// What is shown of all that.

function showState() {
  const isEmpty = conversation.path.length === 0;
  $("welcome").hidden = !isEmpty;
  document.title = chat.title ? `${chat.title} · d2f_stream` : "d2f_stream";
  composer.showMode();
  showContext();
}

function showContext() {
  if (client.model === null) return;
  showUse($("meter"), use(conversation.path, composer.text, chat), client.model.max_len);
}

// What the reader does.

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") !== null) return;
  const isCommand = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (key === "escape" && !$("chats").contains(event.target)) current()?.stop();
  else if (isCommand && !event.shiftKey && key === "k") drawer.search();
  else if (isCommand && event.shiftKey && key === "o") open(null);
  else return;
  event.preventDefault();
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) current()?.flush(); // nobody is watching
});
addEventListener("popstate", () => open(addressed(), { isNew: false }));
$("new-chat").addEventListener("click", () => open(null));
for (const id of ["open-settings", "change-settings"]) {
  $(id).addEventListener("click", () => $("settings").showModal());
}
$("reset").addEventListener("click", () => settings.reset());
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // the backdrop
});
attachments.watch($("attach"), $("attach-files"), $("prompt"));
watchTheme($);
watchDock($("dock"), $("to-end"));

// The connection, and other tabs.

client.addEventListener("hello", ({ detail: { model } }) => {
  settings.setModel(model);
  showModel(model, (question) => ask(question));
  showContext();
});
showConnection(client, $);
store.addEventListener("change", (/** @type {any} */ { detail }) => {
  if (detail.turn === null) list.show();
  if (detail.chat === chat.id && !running.has(detail.turn)) refresh();
});
store.addEventListener("full", () => {
  tell("This browser has no room for more: what comes is not kept. Export and delete some chats.");
});

const opening = open(addressed(), { isNew: false });
composer.waitFor(opening);
opening.finally(() => client.connect()).catch(() => {});
