/** Meter: how much of the model's context the chat takes. */

const numbers = new Intl.NumberFormat("en");

/** Show the use of a context: `root` has a bar (of role meter) and a text. */
export function showUse(root, { used, isExact }, maxLen) {
  const share = Math.min(1, used / maxLen);
  const about = isExact ? "" : "about ";
  const sentence = `${about}${numbers.format(used)} of ${numbers.format(maxLen)} tokens`;
  root.hidden = false;
  root.classList.toggle("full", share > 0.9);
  const bar = root.querySelector("[role=meter]");
  bar.setAttribute("aria-valuemax", String(maxLen));
  bar.setAttribute("aria-valuenow", String(Math.min(used, maxLen)));
  bar.setAttribute("aria-valuetext", sentence);
  bar.style.setProperty("--share", share.toFixed(3));
  root.querySelector(".figure").textContent = sentence;
}
