/**
 * ChatStore: the chats of this browser, in its IndexedDB, shared by its tabs.
 *
 * A chat and each of its turns are records of their own, so that two tabs that ask in the same chat
 * lose nothing. Where a browser has no database for the page, chats last as long as the tab.
 *
 * Dispatches "change" (detail: chat, turn or null) for what another tab stored or removed, and
 * "full" where something could not be stored.
 */

import { openDB } from "../vendor/libraries.js";

const NAME = "d2f.chats";

export class ChatStore extends EventTarget {
  #opening = openTables(); // what is asked meanwhile is answered then
  #channel = new BroadcastChannel(NAME);

  constructor() {
    super();
    this.#channel.addEventListener("message", ({ data }) => {
      this.dispatchEvent(new CustomEvent("change", { detail: data }));
    });
  }

  /** Whether chats outlive the tab. */
  async isLasting() {
    return !((await this.#opening) instanceof MemoryTables);
  }

  /** All chats, the one that was used last first. */
  async chats() {
    const tables = await this.#opening;
    const chats = await tables.getAll("chats");
    return chats.sort((a, b) => b.updatedAt - a.updatedAt);
  }

  /** A chat and its turns by id; null where there is none. */
  async read(id) {
    const tables = await this.#opening;
    const chat = await tables.get("chats", id);
    if (chat === undefined) return null;
    const turns = await tables.getAllFromIndex("turns", "chat", id);
    return { chat, turns: turnsById(turns) };
  }

  async putChat(chat) {
    await this.#put("chats", chat, { chat: chat.id, turn: null });
  }

  async putTurn(turn) {
    await this.#put("turns", turn, { chat: turn.chat, turn: turn.id });
  }

  /** Remove a chat; return what `restore` brings back. */
  async remove(id) {
    const removed = await this.read(id);
    if (removed === null) return null;
    const tables = await this.#opening;
    await tables.delete("chats", id);
    await Promise.all([...removed.turns.keys()].map((turn) => tables.delete("turns", turn)));
    this.#channel.postMessage({ chat: id, turn: null });
    return removed;
  }

  async removeTurn(turn) {
    const tables = await this.#opening;
    await tables.delete("turns", turn.id);
    this.#channel.postMessage({ chat: turn.chat, turn: turn.id });
  }

  async restore({ chat, turns }) {
    await Promise.all([...turns.values()].map((turn) => this.putTurn(turn)));
    await this.putChat(chat);
  }

  /** The ids of the chats in which each of the words stands: in the title, a question, an answer. */
  async search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const texts = new Map();
    const add = (id, more) => texts.set(id, `${texts.get(id) ?? ""}\n${more.toLowerCase()}`);
    const tables = await this.#opening;
    for (const { id, title } of await tables.getAll("chats")) add(id, title);
    for (const turn of await tables.getAll("turns")) {
      if (texts.has(turn.chat)) add(turn.chat, `${turn.question}\n${turn.text}`);
    }
    const found = [...texts].filter(([, all]) => words.every((word) => all.includes(word)));
    return new Set(found.map(([id]) => id));
  }

  async #put(table, value, detail) {
    try {
      const tables = await this.#opening;
      await tables.put(table, value);
    } catch (error) {
      this.dispatchEvent(new CustomEvent("full", { detail: error }));
      return;
    }
    this.#channel.postMessage(detail);
  }
}

/** Return turns by id, in the order in which they were asked. */
export function turnsById(turns) {
  return new Map(turns.sort((a, b) => a.createdAt - b.createdAt).map((turn) => [turn.id, turn]));
}

async function openTables() {
  try {
    const upgrade = (database) => {
      database.createObjectStore("chats", { keyPath: "id" });
      database.createObjectStore("turns", { keyPath: "id" }).createIndex("chat", "chat");
    };
    return await openDB(NAME, 1, { upgrade });
  } catch {
    return new MemoryTables();
  }
}

/** What a database does, for one tab. */
class MemoryTables {
  #tables = { chats: new Map(), turns: new Map() };

  async getAll(table) {
    return [...this.#tables[table].values()].map((value) => structuredClone(value));
  }

  async get(table, id) {
    return structuredClone(this.#tables[table].get(id));
  }

  async getAllFromIndex(table, name, wanted) {
    return (await this.getAll(table)).filter((value) => value[name] === wanted);
  }

  async put(table, value) {
    this.#tables[table].set(value.id, structuredClone(value));
  }

  async delete(table, id) {
    this.#tables[table].delete(id);
  }
}
