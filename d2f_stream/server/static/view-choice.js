/** How the reader wants answers shown: with the canvas or in whole blocks, and how fast. */

import { PACES } from "./answer/player.js";
import { read, write } from "./storage.js";

const CANVAS_KEY = "d2f.canvas";
const PACE_KEY = "d2f.pace";

export class ViewChoice {
  #canvas;
  #pace;

  /** `canvas` is the switch, `pace` the set of radio buttons. */
  constructor(canvas, pace, { onChange }) {
    this.#canvas = canvas;
    this.#pace = pace;
    const chosen = read(localStorage, PACE_KEY) ?? "live";
    canvas.checked = read(localStorage, CANVAS_KEY) ?? true;
    for (const input of pace.querySelectorAll("input")) input.checked = input.value === chosen;
    canvas.addEventListener("change", () => {
      write(localStorage, CANVAS_KEY, canvas.checked);
      this.#show();
      onChange();
    });
    pace.addEventListener("change", (event) => {
      write(localStorage, PACE_KEY, event.target.value);
      onChange();
    });
    this.#show();
  }

  get isCanvas() {
    return this.#canvas.checked;
  }

  /** One of PACES: without the canvas there is nothing to slow down. */
  get pace() {
    const chosen = this.#pace.querySelector(":checked")?.value ?? "live";
    return this.isCanvas ? PACES[chosen] : PACES.live;
  }

  #show() {
    document.body.classList.toggle("whole-blocks", !this.isCanvas);
    this.#pace.disabled = !this.isCanvas;
  }
}
