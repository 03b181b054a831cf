/** What the page tells of the model: its name, what it is for, its licence, what to ask it. */

import { button, element, $ } from "./dom.js";

/** For models that name no examples of their own. */
const USUAL = [
  "Explain in three sentences why the sky is blue.",
  "Write a Python function that tells whether a word is a palindrome, and explain it.",
  "Give me five tips for sleeping better.",
];

const numbers = new Intl.NumberFormat("en");

/** Show a model; `ask(question)` is what its examples do. */
export function showModel(model, ask) {
  const { name, description, license, family, max_len } = model;
  $("model-name").textContent = name;
  $("model-description").textContent = description || `Answers come from ${name}.`;
  const context = `Context of ${numbers.format(max_len)} tokens`;
  const facts = [name, license ? `Licence: ${license}` : "Licence: not stated", context];
  $("model-facts").textContent = facts.join(" · ");
  $("about-model").textContent = [description || `Family: ${family}.`, facts.join(" · ")].join("\n");
  const questions = model.examples?.length ? model.examples : USUAL;
  const chips = questions.slice(0, 3).map((question) => {
    const chip = button("", () => ask(question), "chip");
    chip.append(element("span", "", question));
    return chip;
  });
  $("examples").replaceChildren(...chips);
  $("examples").hidden = false;
}
