/** Chats to a file of the reader's and back. */

import { $ } from "../dom.js";
import { tell } from "../toast.js";
import { pack, unpack } from "./archive.js";

/** Save chats as a file; each is { chat, turns }. */
export function save(chats) {
  const name = chats.length === 1 ? nameOf(chats[0].chat.title) : "chats";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([pack(chats)], { type: "application/json" }));
  link.download = `${name}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}

/** Let the reader choose files of chats and store those that are new, or newer. */
export function watchImport(store, onStored) {
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const files = [...$("import-file").files];
    $("import-file").value = "";
    try {
      const found = (await Promise.all(files.map((file) => file.text()))).flatMap(unpack);
      await add(found, store);
    } catch (error) {
      tell(error.message);
    }
    onStored();
  });
}

async function add(found, store) {
  let numNew = 0;
  for (const one of found) {
    const kept = await store.read(one.chat.id);
    if (kept !== null && kept.chat.updatedAt >= one.chat.updatedAt) continue;
    await store.restore(one);
    numNew += 1;
  }
  const chats = numNew === 1 ? "1 chat was imported" : `${numNew} chats were imported`;
  const numOld = found.length - numNew;
  tell(numOld === 0 ? `${chats}.` : `${chats}; ${numOld} were here already.`);
}

function nameOf(title) {
  return title.replaceAll(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "chat";
}
