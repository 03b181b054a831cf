/**
 * MarkdownFeed: cuts a text that grows into its Markdown blocks, and says which are finished.
 *
 * Markdown is read line by line: once the next block has begun, nothing that follows changes the one
 * before it. So what is finished is drawn once and never again; only the rest is still open.
 */

import { makeParser } from "./markdown.js";

const parser = makeParser();
parser.core.ruler.enableOnly(["normalize", "block"]); // where blocks begin and end, no more

/** Blocks that end with their line, and those that a blank line ends. */
const OF_ONE_LINE = new Set(["heading_open", "hr"]);
const ENDED_BY_BLANK = new Set(["paragraph_open", "table_open", "blockquote_open"]);

/** The beginning of a line that may still become anything: a list, a fence, a rule, plain text. */
const UNDECIDED = /^[\s>]*([#*+\-=_~`|$\\]{1,}|\d{1,9}[.)]?)?\s*$/;

export class MarkdownFeed {
  #rest = "";
  #isEmpty = true;

  /** Take in more text; return the blocks that it finished, as Markdown. */
  push(text) {
    this.#rest += text;
    if (this.#isEmpty) {
      this.#rest = this.#rest.trimStart();
      this.#isEmpty = this.#rest === "";
    }
    const lines = this.#rest.split("\n");
    const numWhole = lines.length - 1; // the last line may grow
    const whole = lines.slice(0, numWhole);
    const blocks = parser
      .parse(whole.join("\n"), {})
      .filter(({ level, nesting, map }) => level === 0 && nesting >= 0 && map !== null);
    const edges = blocks.map(({ map }) => map?.[0] ?? 0);
    const last = blocks.at(-1);
    if (last !== undefined && hasEnded(last, whole)) edges.push(numWhole);
    if (edges.length < 2) return [];
    edges[0] = 0; // with what belongs to no block: definitions of links
    this.#rest = lines.slice(edges.at(-1)).join("\n");
    return edges.slice(1).map((edge, at) => whole.slice(edges[at], edge).join("\n"));
  }

  /** What is not finished. */
  get rest() {
    return this.#rest;
  }

  /** Whether that is code, of which nothing is Markdown. */
  get isCode() {
    return /^ {0,3}(```|~~~)/.test(this.#rest);
  }

  /** Of that, what can be shown: a line stays back while it may become anything. */
  get shown() {
    const rest = this.#rest;
    const at = rest.lastIndexOf("\n") + 1; // where the line begins that may grow
    if (this.isCode && at > 0) return rest;
    if (rest.trimStart().startsWith("|")) {
      const rows = rest.slice(0, at); // those that are whole, once they are known to be a table's
      return rows.trim().includes("\n") ? rows : "";
    }
    return UNDECIDED.test(rest.slice(at)) ? rest.slice(0, at) : rest;
  }

  /** Whether the text goes on in the line, or the code, that it ends with. */
  get isInLine() {
    return !this.#rest.endsWith("\n") && this.shown === this.#rest && this.#rest.trim() !== "";
  }

  /** End the text; return what was left, if anything. */
  end() {
    const rest = this.#rest;
    this.#rest = "";
    return rest.trim() ? [rest] : [];
  }
}

function hasEnded({ type, map, markup }, lines) {
  const [start, end] = map;
  if (OF_ONE_LINE.has(type)) return true;
  if (ENDED_BY_BLANK.has(type)) return end < lines.length && lines[end].trim() === "";
  if (type !== "fence" || end - start < 2) return false;
  const last = lines[end - 1].trim();
  return last.startsWith(markup) && last === markup[0].repeat(last.length);
}
