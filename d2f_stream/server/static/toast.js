/** Toast: a sentence at the foot of the page, for a while, with something to do about it. */

import { $ } from "./dom.js";

const SHOWN_MS = 12_000;

let timer;

/**
 * Tell something; `act`, where there is one, is what `label` does.
 * @param {string} text
 * @param {(() => void) | null} [act]
 */
export function tell(text, label = "", act = null) {
  clearTimeout(timer);
  $("toast").hidden = false;
  $("toast-text").textContent = text;
  $("toast-act").textContent = label;
  $("toast-act").hidden = act === null;
  $("toast-act").onclick = () => {
    hide();
    act?.();
  };
  timer = setTimeout(hide, SHOWN_MS);
}

function hide() {
  clearTimeout(timer);
  $("toast").hidden = true;
}
