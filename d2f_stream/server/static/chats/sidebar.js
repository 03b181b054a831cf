/** Sidebar: the list of chats, with what can be done to each. Knows no storage. */

import { button, element, iconButton } from "../dom.js";

export class Sidebar {
  #list;
  #act;
  #chats = [];
  /** @type {string | null} */
  #current = null;
  #running = new Set();
  /** @type {Set<string> | null} */
  #found = null; // ids, while something is searched for
  #renamed = null; // id of the chat whose name is being written

  /** `act` has open(id), rename(id, title), remove(id) and save(id). */
  constructor(list, act) {
    this.#list = list;
    this.#act = act;
  }

  /** Show the chats; those whose id is in `running` have an answer on its way. */
  show({ chats = this.#chats, current = this.#current, running = this.#running } = {}) {
    this.#chats = chats;
    this.#current = current;
    this.#running = running;
    this.#draw();
  }

  /** Show only these chats; null shows all. */
  filter(found) {
    this.#found = found;
    this.#draw();
  }

  #draw() {
    if (this.#renamed !== null && this.#list.querySelector("input")) return; // after it is written
    const focused = /** @type {any} */ (document.activeElement?.closest("[data-chat]"));
    const id = focused && this.#list.contains(focused) ? focused.dataset.chat : null;
    const chats = this.#chats.filter((chat) => this.#found?.has(chat.id) ?? true);
    this.#list.replaceChildren(...chats.map((chat) => this.#item(chat)));
    const none = this.#found === null ? "No chats yet." : "No chat has these words.";
    if (chats.length === 0) this.#list.append(element("li", "none", none));
    if (id !== null) this.#list.querySelector(`[data-chat="${CSS.escape(id)}"] .open`)?.focus();
  }

  #item(chat) {
    const item = element("li", "chat");
    item.dataset.chat = chat.id;
    if (chat.id === this.#renamed) {
      item.append(this.#nameField(chat));
      return item;
    }
    const open = button("", () => this.#act.open(chat.id), "open");
    open.append(element("span", "title", chat.title));
    open.title = chat.title;
    if (chat.id === this.#current) open.setAttribute("aria-current", "true");
    if (this.#running.has(chat.id)) {
      const mark = element("span", "working");
      mark.append(element("span", "unseen", " (answering)"));
      open.append(mark);
    }
    const tools = element("span", "tools");
    const about = (what) => `${what}: ${chat.title}`;
    tools.append(
      iconButton("i-edit", about("Rename"), () => this.#rename(chat.id)),
      iconButton("i-save", about("Export"), () => this.#act.save(chat.id)),
      iconButton("i-delete", about("Delete"), () => this.#act.remove(chat.id)),
    );
    item.append(open, tools);
    return item;
  }

  #rename(id) {
    this.#renamed = id;
    this.#draw();
    const field = this.#list.querySelector("input");
    field.focus();
    field.select();
  }

  #nameField(chat) {
    const field = element("input", "rename");
    field.value = chat.title;
    field.maxLength = 120;
    field.setAttribute("aria-label", "Name of the chat");
    const end = (isKept) => {
      if (this.#renamed === null) return;
      this.#renamed = null;
      const title = field.value.trim();
      if (isKept && title && title !== chat.title) this.#act.rename(chat.id, title);
      const hadFocus = document.activeElement === field;
      field.remove();
      this.#draw();
      if (hadFocus) this.#list.querySelector(`[data-chat="${CSS.escape(chat.id)}"] .open`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      if (event.key !== "Escape") return;
      event.stopPropagation();
      end(false);
    });
    field.addEventListener("blur", () => end(true));
    return field;
  }
}
