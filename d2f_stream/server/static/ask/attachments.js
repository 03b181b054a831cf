/** Attachments: text files that go with a question, as part of its text. */

import { element, iconButton } from "../dom.js";

const MOST_FILES = 8;
const MOST_CHARACTERS = 100_000; // of all files of a question
const MOST_BYTES = 200_000; // of them in a message, whose own limit is 262,144 where nobody set one

const numbers = new Intl.NumberFormat("en");

export class Attachments {
  #list;
  #files = []; // { name, text, size: bytes in a message }
  #reading = Promise.resolve(); // one file is taken after the other, so that each sees what is left
  #numWaiting = 0;
  #act;

  /**
   * @param {HTMLElement} list shows them
   * @param {object} act
   * @param {() => void} act.changed
   * @param {(text: string) => void} act.tell says why a file is not taken
   */
  constructor(list, act) {
    this.#list = list;
    this.#act = act;
  }

  /** Let the reader choose files, drop them anywhere on the page, or paste them. */
  watch(button, input, field) {
    button.addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      const files = [...input.files];
      input.value = "";
      await this.add(files);
      field.focus();
    });
    document.addEventListener("dragover", (event) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
      if (!event.dataTransfer?.files.length) return;
      event.preventDefault();
      this.add([...event.dataTransfer.files]);
    });
    field.addEventListener("paste", (event) => {
      if (!event.clipboardData?.files.length) return;
      event.preventDefault();
      this.add([...event.clipboardData.files]);
    });
  }

  /** Take files that are text and not too long; of others, say why not. */
  add(files) {
    this.#numWaiting++;
    this.#reading = this.#reading.then(async () => {
      for (const file of files) {
        const problem = await this.#take(file);
        if (problem) this.#act.tell(problem);
      }
      this.#numWaiting--;
      this.#show();
    });
    return this.#reading;
  }

  /** What to wait for before a question is whole; null where nothing is being read. */
  get reading() {
    return this.#numWaiting > 0 ? this.#reading : null;
  }

  /** Return a question with the files behind it, each as a block of code under its name. */
  into(question) {
    return [question, ...this.#files.map(asText)].filter(Boolean).join("\n\n");
  }

  clear() {
    this.#files = [];
    this.#show();
  }

  /** Read a file; return why it is not taken, where it is not. */
  async #take(file) {
    if (this.#files.length === MOST_FILES) {
      return `${file.name} is left out: a question takes at most ${MOST_FILES} files.`;
    }
    const room = MOST_CHARACTERS - this.#files.reduce((sum, { text }) => sum + text.length, 0);
    const limit = `the files of a question have at most ${numbers.format(MOST_CHARACTERS)} characters`;
    if (file.size > 4 * MOST_CHARACTERS) return `${file.name} is left out: ${limit}.`;
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch {
      return `${file.name} is left out: it is not text in UTF-8.`;
    }
    if (text.includes("\0")) return `${file.name} is left out: it is not text.`;
    if (text.length > room) {
      return `${file.name} is left out: it has ${numbers.format(text.length)}, and ${limit} together.`;
    }
    const size = new TextEncoder().encode(JSON.stringify(text)).length;
    if (size > MOST_BYTES - this.#files.reduce((sum, other) => sum + other.size, 0)) {
      const most = `the files of a question take at most ${numbers.format(MOST_BYTES)} together`;
      return `${file.name} is left out: it takes ${numbers.format(size)} bytes, and ${most}.`;
    }
    this.#files.push({ name: file.name, text, size });
    return "";
  }

  #show() {
    const items = this.#files.map((file) => {
      const item = element("li", "attachment");
      const remove = iconButton("i-close", `Remove ${file.name}`, () => {
        this.#files = this.#files.filter((other) => other !== file);
        this.#show();
      });
      const size = `${numbers.format(file.text.length)} characters`;
      item.append(element("span", "name", file.name), element("span", "size", size), remove);
      return item;
    });
    this.#list.replaceChildren(...items);
    this.#list.hidden = items.length === 0;
    this.#act.changed();
  }
}

function asText({ name, text }) {
  const fences = text.match(/`{3,}/g) ?? [];
  const fence = "`".repeat(Math.max(3, ...fences.map(({ length }) => length + 1)));
  const language = /\.([A-Za-z0-9]{1,10})$/.exec(name)?.[1] ?? "";
  return `${name}:\n${fence}${language}\n${text.replace(/\n$/, "")}\n${fence}`;
}
