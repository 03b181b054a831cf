/** ChatList: the list of chats, and what is done to chats that need not be open. */

import { $ } from "../dom.js";
import { tell } from "../toast.js";
import { save, watchImport } from "./files.js";
import { Sidebar } from "./sidebar.js";

export class ChatList {
  #store;
  #page;
  #sidebar;

  /**
   * @param {import("./store.js").ChatStore} store
   * @param {any} page has chat(), the one that is open; working(), the ids of those with an answer on
   *   its way; open(id), where null is a new one; forget(id), which ends a chat's answers;
   *   refresh(), as the open chat may be another; and changed(), as it has another name
   */
  constructor(store, page) {
    this.#store = store;
    this.#page = page;
    this.#sidebar = new Sidebar($("chat-list"), {
      open: (id) => page.open(id),
      rename: (id, title) => this.#rename(id, title),
      remove: (id) => this.#remove(id),
      save: (id) => this.#save([id]),
    });
    store.isLasting().then((isLasting) => {
      $("chats-note").hidden = isLasting;
    });
    $("search").addEventListener("input", () => this.#search());
    $("export-all").addEventListener("click", async () => {
      const chats = await store.chats();
      await this.#save(chats.map(({ id }) => id));
    });
    watchImport(store, () => {
      this.show();
      page.refresh();
    });
  }

  /** Show what is stored now. */
  async show() {
    const chats = await this.#store.chats();
    this.#sidebar.show({ chats, current: this.#page.chat().id, running: this.#page.working() });
  }

  async #search() {
    const text = $("search").value;
    const found = text.trim() ? await this.#store.search(text) : null;
    if (text === $("search").value) this.#sidebar.filter(found);
  }

  async #rename(id, title) {
    const open = this.#page.chat();
    const chat = id === open.id ? open : (await this.#store.read(id))?.chat;
    if (chat === undefined) return;
    chat.title = title;
    await this.#store.putChat(chat);
    this.#page.changed();
    this.show();
  }

  async #remove(id) {
    this.#page.forget(id);
    const wasOpen = id === this.#page.chat().id;
    const removed = await this.#store.remove(id);
    if (wasOpen) await this.#page.open(null);
    else this.show();
    if (removed === null) return;
    tell(`“${removed.chat.title}” was deleted.`, "Undo", async () => {
      await this.#store.restore(removed);
      if (wasOpen) this.#page.open(id);
      else this.show();
    });
  }

  async #save(ids) {
    const found = await Promise.all(ids.map((id) => this.#store.read(id)));
    const chats = found.filter((one) => one !== null);
    if (chats.length > 0) save(chats);
    else tell("There are no chats to export.");
  }
}
