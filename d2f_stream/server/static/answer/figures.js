/** What an answer cost: the figures below it. */

import { element } from "../dom.js";

const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fractions = new Intl.NumberFormat("en", {
  minimumFractionDigits: 1,
  maximumFractionDigits: 1,
});

/** Return what is worth telling of a turn's progress: pairs of value and label; none before any. */
function figuresOf({ tokens, steps, ms, firstMs }) {
  if (steps === 0) return [];
  return [
    [fractions.format(tokens / steps), "tokens per step"],
    [ms > 0 ? numbers.format((tokens / ms) * 1000) : "–", "tokens/s"],
    [duration(firstMs ?? ms), "to the first block"],
    [numbers.format(steps), steps === 1 ? "step" : "steps"],
    [duration(ms), "in all"],
  ];
}

/** Show the figures of a turn's progress in a definition list. */
export function showFigures(list, progress) {
  const pairs = figuresOf(progress).map(([value, label]) => {
    const pair = element("div");
    pair.append(element("dt", "", label), element("dd", "", value));
    return pair;
  });
  list.replaceChildren(...pairs);
  list.hidden = pairs.length === 0;
}

function duration(ms) {
  if (ms >= 1000) return `${fractions.format(ms / 1000)} s`;
  return `${ms >= 10 ? numbers.format(ms) : fractions.format(ms)} ms`;
}
