/** Elements, made in one call. */

/** Return an element with a class and text. */
export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

/** Return a button with a label that does something. */
export function button(label, act, className = "plain") {
  const made = element("button", className, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/** Return a button that shows one of the page's symbols; its label is for those who cannot see. */
export function iconButton(symbol, label, act) {
  const made = button("", act, "tool square");
  made.title = label;
  made.append(icon(symbol), element("span", "unseen", label));
  return made;
}

/** Return one of the page's symbols. */
export function icon(symbol) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  made.setAttribute("class", "icon");
  made.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${symbol}`);
  made.append(use);
  return made;
}

// The page and its scripts ship together: each id is there, and is the element that is meant.
export const $ = (id) => /** @type {any} */ (document.getElementById(id));
