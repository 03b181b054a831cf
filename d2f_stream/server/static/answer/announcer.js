/** Announcer: tells screen readers an answer as it arrives, a finished Markdown block at a time. */

import { element } from "../dom.js";
import { MarkdownFeed } from "./feed.js";
import { Document } from "./markdown.js";

export class Announcer {
  #log;
  #feed = new MarkdownFeed();
  #document = new Document();

  /** `log` is a live region, which is emptied. */
  constructor(log) {
    this.#log = log;
    log.replaceChildren();
  }

  /** Take back what was told: it was no answer. */
  restart() {
    this.#feed = new MarkdownFeed();
    this.#document = new Document();
    this.#log.replaceChildren();
  }

  push(text) {
    this.#feed.push(text).forEach((source) => this.#tell(source));
  }

  end() {
    this.#feed.end().forEach((source) => this.#tell(source));
  }

  #tell(source) {
    const part = this.#document.render(source);
    for (const extra of part.querySelectorAll(".head, annotation")) extra.remove();
    const text = part.textContent.trim();
    if (text) this.#log.append(element("p", "", text));
  }
}
