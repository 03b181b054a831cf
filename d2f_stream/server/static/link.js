/**
 * What the page shows of its connection: a word in the header, a banner while it is lost, and the
 * question for a token where the server wants one.
 */

import { read, write } from "./storage.js";
import { sentenceFor } from "./sentences.js";

const TOKEN_KEY = "d2f.token";

const WORDS = {
  connecting: "Connecting",
  open: "Connected",
  reconnecting: "Reconnecting",
  closed: "Not connected",
};

/** A connection that is back within this time was hardly away. */
const QUIET_MS = 500;

/** The token that this tab was given; null where it was given none. */
export function storedToken() {
  return read(sessionStorage, TOKEN_KEY);
}

export function showConnection(client, $) {
  let timer;
  let wantsToken = false;

  const askForToken = (why) => {
    $("token-why").textContent = why;
    $("token-value").value = "";
    if (!$("token").open) $("token").showModal();
  };

  const show = (text, button) => {
    $("banner-text").textContent = text;
    $("retry-now").textContent = button;
    $("banner").hidden = false;
  };

  const explain = ({ state, error }) => {
    if (error?.code === "unauthorized") {
      show("This server asks for a token.", "Enter a token");
    } else if (state === "closed") {
      show(sentenceFor(error), "Try again");
    } else if (client.hello === null) {
      show("The server cannot be reached. Trying again.", "Try now");
    } else {
      show("The connection is lost. Trying again; answers go on where they stopped.", "Try now");
    }
  };

  client.addEventListener("state", ({ detail }) => {
    const { state, error } = detail;
    $("status").dataset.state = state;
    $("state").textContent = WORDS[state];
    wantsToken = error?.code === "unauthorized";
    clearTimeout(timer);
    if (state === "open") $("banner").hidden = true;
    else if (state === "closed") explain(detail);
    else if (state === "connecting") $("banner").hidden = true;
    else if ($("banner").hidden) timer = setTimeout(explain, QUIET_MS, detail);
    else if (state === "reconnecting") explain(detail);
    if (wantsToken) askForToken(storedToken() === null ? "" : "That token was not accepted.");
  });

  client.addEventListener("closing", () => {
    show("The server is shutting down. Answers that run may still end.", "Try now");
  });

  $("retry-now").addEventListener("click", () => {
    if (wantsToken) askForToken("");
    else client.retry();
  });

  $("token-form").addEventListener("submit", () => {
    const token = $("token-value").value;
    write(sessionStorage, TOKEN_KEY, token);
    client.authenticate(token).catch(() => {}); // the state tells
  });
  $("token-later").addEventListener("click", () => $("token").close());
}
