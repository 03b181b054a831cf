/**
 * Makes the children of one element those of another, keeping every node that can stay: text that
 * grew gets what is new, so that nothing is drawn again, and a selection lasts.
 */

/**
 * @param {Node} target what is on the page
 * @param {Node} wanted what it shall hold; is used up
 * @param {Node} [aside] a node of the target that is left where it is
 */
export function patch(target, wanted, aside) {
  const old = [...target.childNodes].filter((node) => node !== aside);
  const fresh = [...wanted.childNodes];
  fresh.forEach((node, at) => {
    const kept = old[at];
    if (kept === undefined) target.insertBefore(node, aside?.parentNode === target ? aside : null);
    else if (kept.nodeName !== node.nodeName) target.replaceChild(node, kept);
    else if (kept instanceof Element) {
      copyAttributes(kept, /** @type {Element} */ (node));
      patch(kept, node, aside);
    } else mend(/** @type {Text} */ (kept), node.nodeValue ?? "");
  });
  for (const node of old.slice(fresh.length)) target.removeChild(node);
}

function mend(kept, text) {
  if (kept.data === text) return;
  if (text.startsWith(kept.data)) kept.appendData(text.slice(kept.data.length));
  else kept.data = text;
}

function copyAttributes(kept, node) {
  for (const { name } of [...kept.attributes]) if (!node.hasAttribute(name)) kept.removeAttribute(name);
  for (const { name, value } of node.attributes) {
    if (kept.getAttribute(name) !== value) kept.setAttribute(name, value);
  }
}
