/** The chat page: joins the conversation, the views of its answers and the connection. */

import { AnswerView, element } from "./answer.js";
import { Transcript, textOf } from "./transcript.js";
import { D2FClient, newRequestId } from "./d2f-client.js";
import { examplesFor } from "./examples.js";
import { showConnection, storedToken } from "./link.js";
import { PACES, Player } from "./player.js";
import { questionView } from "./question.js";
import { Settings } from "./settings.js";
import { watchTheme } from "./theme-choice.js";
import { ViewChoice } from "./view-choice.js";

const NEAR_END_PX = 160; // so close to its end, the page follows the answer
const MENDABLE = /^(invalid_.*|prompt_too_long|message_too_large)$/; // by the reader
const PASSING = /^(connection_lost|unauthorized)$/; // the answer may still be there

const ACTS = {
  send: { label: "Send", icon: "#i-send" },
  stop: { label: "Stop", icon: "#i-stop" },
  skip: { label: "Show all at once", icon: "#i-skip" },
};

// The page and its script ship together: each id is there, and is the element that is meant.
const $ = (id) => /** @type {any} */ (document.getElementById(id));

const transcript = new Transcript();
const settings = new Settings($("fields"));
const choice = new ViewChoice($("show-canvas"), $("pace"), {
  onChange: () => running?.player.setPace(choice.pace),
});
const client = new D2FClient({
  url: Object.assign(new URL("v1/stream", location.href), {
    protocol: location.protocol === "https:" ? "wss:" : "ws:",
    search: "",
    hash: "",
  }),
  token: storedToken(),
});

/** @type {any} */
let running = null; // the answer that is streamed, or still shown: { turn, stream, view, player }
let takesMessages = true; // until a model without a chat template refuses them

// One question and its answer.

function ask(question) {
  const params = settings.overrides;
  const turn = transcript.add({ question, requestId: newRequestId(), params });
  run(turn, render(turn));
  scrollToEnd();
}

/** Stream a turn's answer, from its beginning or from where a reload left it. */
async function run(turn, view) {
  const player = new Player((event) => show(event, mine), choice.pace);
  const mine = { turn, view, stream: open(turn), player };
  running = mine;
  showAct();
  try {
    for await (const event of mine.stream) receive(event, mine);
  } catch (error) {
    if (error.code === "no_chat_template" && takesMessages) {
      takesMessages = false;
      turn.requestId = newRequestId();
      transcript.save();
      run(turn, view);
      return;
    }
    transcript.fail(turn, error);
  }
  mine.player.push({ type: "end" }); // behind what is still to be shown
  showAct();
}

function open(turn) {
  const { stream, requestId, lastSeq, params } = turn;
  const drafts = choice.isCanvas;
  if (stream !== null) {
    return client.resume({ stream, request_id: requestId, after_seq: lastSeq, drafts });
  }
  const prompt = takesMessages ? transcript.messagesFor(turn) : turn.question;
  return client.generate(prompt, { params, requestId, drafts });
}

/** Keep and announce at once what has come; showing it takes the time that it takes. */
function receive(event, { turn, player }) {
  if (event.type !== "block.draft") transcript.apply(turn, event);
  if (event.type === "block.committed" && event.text.trim()) {
    $("announcer").append(element("p", "", event.text));
  }
  player.push(event);
}

function show(event, mine) {
  const follows = isNearEnd();
  if (event.type === "end") {
    if (running === mine) running = null;
    finish(mine.turn, mine.view);
    showAct();
  } else {
    mine.view.show(event);
  }
  if (follows) scrollToEnd();
}

/** Stop the answer; where it is complete and only still being shown, show the rest. */
function stop() {
  if (running === null) return;
  if (running.stream.ended) {
    running.player.flush();
  } else {
    running.stream.cancel();
    running.player.setPace(PACES.live);
  }
}

// The conversation.

function render(turn) {
  const view = new AnswerView(turn, client.model?.description);
  $("conversation").append(questionView(turn.question), view.root);
  if (turn.status !== "running") addActions(turn, view);
  showWelcome();
  return view;
}

function finish(turn, view) {
  view.end(turn, { isNew: true });
  addActions(turn, view);
}

function addActions(turn, view) {
  const actions = element("div", "actions");
  if (turn.error) {
    const { label, act } = remedy(turn, view);
    actions.append(action(label, () => running === null && act()));
  } else if (turn.blocks.length > 0 && navigator.clipboard) {
    const copy = action("Copy", async () => {
      await navigator.clipboard.writeText(textOf(turn).trim());
      copy.textContent = "Copied";
    });
    actions.append(copy);
  }
  if (actions.childElementCount > 0) view.append(actions);
}

/** What to do about a turn that failed. */
function remedy(turn, view) {
  const { code } = turn.error;
  if (PASSING.test(code) && turn.stream !== null) {
    return { label: "Read on", act: () => readOn(turn, view) };
  }
  const isMendable = MENDABLE.test(code);
  const again = isMendable ? edit : ask;
  const act = () => {
    forget(turn, view);
    again(turn.question);
  };
  return { label: isMendable ? "Edit the question" : "Ask again", act };
}

function readOn(turn, view) {
  transcript.reopen(turn);
  const fresh = new AnswerView(turn, client.model?.description);
  view.root.replaceWith(fresh.root);
  run(turn, fresh);
}

function action(label, act) {
  const button = element("button", "plain", label);
  button.type = "button";
  button.addEventListener("click", act);
  return button;
}

function forget(turn, view) {
  transcript.remove(turn);
  view.root.previousElementSibling.remove();
  view.root.remove();
  showWelcome();
}

function startOver() {
  running?.stream.cancel();
  running = null;
  transcript.clear();
  $("conversation").replaceChildren();
  $("announcer").replaceChildren();
  showWelcome();
  showAct();
  $("prompt").focus();
}

function showWelcome() {
  const isEmpty = transcript.turns.length === 0;
  $("welcome").hidden = !isEmpty;
  $("new-chat").hidden = isEmpty;
}

function isNearEnd() {
  const page = document.scrollingElement ?? document.documentElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < NEAR_END_PX;
}

function scrollToEnd() {
  const page = document.scrollingElement ?? document.documentElement;
  page.scrollTop = page.scrollHeight;
}

// The composer.

function edit(text) {
  $("prompt").value = text;
  fitPrompt();
  $("prompt").focus();
}

function fitPrompt() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function showAct() {
  const mode = running === null ? "send" : running.stream.ended ? "skip" : "stop";
  const { label, icon } = ACTS[mode];
  $("act").dataset.mode = mode;
  $("act").title = label;
  $("act-label").textContent = label;
  $("act-icon").setAttribute("href", icon);
}

function submit() {
  const question = $("prompt").value.trim();
  if (running !== null) {
    stop();
  } else if (question) {
    $("announcer").replaceChildren();
    edit("");
    ask(question);
  } else {
    $("prompt").focus();
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("input", fitPrompt);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (running === null) submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.querySelector("dialog[open]") === null) stop();
});
$("new-chat").addEventListener("click", startOver);

document.addEventListener("visibilitychange", () => {
  if (document.hidden) running?.player.flush(); // nobody is watching
});

// The model and its settings.

function showModel(model) {
  if (model.name !== $("model-name").textContent) takesMessages = true;
  settings.setModel(model);
  $("model-name").textContent = model.name;
  $("model-description").textContent = model.description || `Answers come from ${model.name}.`;
  $("about-model").textContent = `${model.name}: ${model.description || model.family}`;
  const chips = examplesFor(model).map(({ label, question }) => {
    const chip = element("button", "chip");
    chip.type = "button";
    chip.append(element("span", "name", label), element("span", "about", question));
    chip.addEventListener("click", () => {
      if (running === null) ask(question);
    });
    return chip;
  });
  $("examples").replaceChildren(...chips);
  $("examples").hidden = chips.length === 0;
}

$("open-settings").addEventListener("click", () => $("settings").showModal());
$("reset").addEventListener("click", () => settings.reset());
$("settings").addEventListener("click", (event) => {
  if (event.target === $("settings")) $("settings").close(); // the backdrop
});

// The connection.

client.addEventListener("hello", (event) => showModel(event.detail.model));
showConnection(client, $);

// Begin: what this tab was showing, and the answer it was reading.

watchTheme($);
for (const turn of transcript.turns) {
  const view = render(turn);
  if (turn.status === "running") run(turn, view);
}
showWelcome();
scrollToEnd();
client.connect().catch(() => {});
if (matchMedia("(pointer: fine)").matches) $("prompt").focus({ preventScroll: true });
