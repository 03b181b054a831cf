/** A question in the conversation; a long one shows its beginning until it is asked for. */

import { element } from "./answer.js";

const LONG = 600; // characters

let numQuestions = 0;

export function questionView(text) {
  const root = element("article", "question");
  const shown = element("p", "text", text);
  root.append(element("h3", "unseen", "You"), shown);
  if (text.length <= LONG && text.split("\n").length <= 12) return root;
  numQuestions += 1;
  shown.id = `question-${numQuestions}`;
  const toggle = element("button", "plain");
  toggle.type = "button";
  toggle.setAttribute("aria-controls", shown.id);
  const fold = (isFolded) => {
    shown.classList.toggle("folded", isFolded);
    toggle.textContent = isFolded ? "Show the whole question" : "Show less";
    toggle.setAttribute("aria-expanded", String(!isFolded));
  };
  toggle.addEventListener("click", () => fold(!shown.classList.contains("folded")));
  fold(true);
  root.append(toggle);
  return root;
}
