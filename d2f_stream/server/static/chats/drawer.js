/** Drawer: the list of chats beside the conversation, or over it where there is no room. */

import { read, write } from "../storage.js";

const KEY = "d2f.chats-open";

export class Drawer {
  #root;
  #button;
  #shade;
  #behind;
  #isWide = matchMedia("(min-width: 64rem)");

  /** `behind` is what cannot be reached while the list lies over it. */
  constructor(root, button, shade, behind) {
    this.#root = root;
    this.#button = button;
    this.#shade = shade;
    this.#behind = behind;
    button.addEventListener("click", () => this.#choose(root.hidden));
    shade.addEventListener("click", () => this.#choose(false));
    root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.#isOver) return;
      event.stopPropagation();
      this.#choose(false);
    });
    this.#isWide.addEventListener("change", () => this.#show(this.#wanted));
    this.#show(this.#wanted);
  }

  /** Let the reader search, wherever the page is. */
  search() {
    if (this.#root.hidden) this.#choose(true);
    this.#root.querySelector("input").focus();
  }

  /** Something was chosen in the list: where it lies over the page, it goes. */
  leave() {
    if (this.#isOver) this.#choose(false);
  }

  get #isOver() {
    return !this.#isWide.matches && !this.#root.hidden;
  }

  get #wanted() {
    return this.#isWide.matches && (read(localStorage, KEY) ?? true);
  }

  #choose(isOpen) {
    if (this.#isWide.matches) write(localStorage, KEY, isOpen);
    this.#show(isOpen);
    if (this.#isWide.matches) return;
    if (isOpen) this.#root.querySelector("input").focus();
    else this.#button.focus();
  }

  #show(isOpen) {
    this.#root.hidden = !isOpen;
    this.#button.setAttribute("aria-expanded", String(isOpen));
    document.body.classList.toggle("with-chats", isOpen && this.#isWide.matches);
    this.#shade.hidden = !this.#isOver;
    for (const part of this.#behind) part.inert = this.#isOver;
  }
}
