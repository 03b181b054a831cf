/** QuestionView: a question in the conversation, which can be edited, and its other versions. */

import { button, element, iconButton } from "../dom.js";

const LONG = 600; // characters

let numQuestions = 0;

/**
 * Return the view of a turn's question.
 *
 * @param {object} options
 * @param {number} options.at its place among its alternatives, from 0
 * @param {number} options.of how many there are
 * @param {string} options.leftOut what to say of turns that the model did not read; may be empty
 * @param {(question: string) => void} options.onEdit
 * @param {(at: number) => void} options.onChoose
 */
export function questionView(text, { at, of, leftOut, onEdit, onChoose }) {
  const root = element("article", "question");
  root.append(element("h3", "unseen", "You"));
  if (leftOut) root.append(element("p", "left-out", leftOut));
  const bubble = element("div", "bubble");
  bubble.append(...shownText(text));
  const tools = element("div", "tools");
  if (of > 1) tools.append(...chooser(at, of, onChoose));
  const edit = iconButton("i-edit", "Edit the question", () => {
    const form = editor(text, { onEdit, onEnd: () => form.replaceWith(bubble, tools) });
    bubble.replaceWith(form);
    tools.remove();
    const field = /** @type {HTMLTextAreaElement} */ (form.querySelector("textarea"));
    field.focus();
    field.setSelectionRange(text.length, text.length);
  });
  tools.append(edit);
  root.append(bubble, tools);
  return root;
}

function chooser(at, of, onChoose) {
  const before = iconButton("i-before", "Version before", () => onChoose(at - 1));
  const after = iconButton("i-after", "Next version", () => onChoose(at + 1));
  before.disabled = at === 0;
  after.disabled = at === of - 1;
  const place = element("span", "place", `${at + 1} / ${of}`);
  place.append(element("span", "unseen", " versions"));
  return [before, place, after];
}

function editor(text, { onEdit, onEnd }) {
  const form = element("form", "editor");
  const field = element("textarea");
  field.value = text;
  field.required = true;
  field.rows = Math.min(12, text.split("\n").length + 1);
  field.setAttribute("aria-label", "The question, to be edited");
  const tools = element("div", "tools");
  const send = element("button", "primary", "Ask");
  send.type = "submit";
  tools.append(button("Cancel", onEnd), send);
  form.append(field, tools);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = field.value.trim();
    if (question) onEdit(question);
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
    if (event.key !== "Escape") return;
    event.stopPropagation();
    onEnd();
  });
  return form;
}

/** The text; of a long one its beginning, until it is asked for. */
function shownText(text) {
  const shown = element("p", "text", text);
  if (text.length <= LONG && text.split("\n").length <= 12) return [shown];
  numQuestions += 1;
  shown.id = `question-${numQuestions}`;
  const toggle = button("", () => fold(!shown.classList.contains("folded")));
  toggle.setAttribute("aria-controls", shown.id);
  const fold = (isFolded) => {
    shown.classList.toggle("folded", isFolded);
    toggle.textContent = isFolded ? "Show the whole question" : "Show less";
    toggle.setAttribute("aria-expanded", String(!isFolded));
  };
  fold(true);
  return [shown, toggle];
}
