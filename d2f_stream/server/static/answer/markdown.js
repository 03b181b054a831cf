/**
 * Markdown to safe elements: markdown-it reads it, highlight.js colours code, KaTeX sets formulas as
 * MathML, DOMPurify lets nothing else through.
 *
 * HTML of the model's is text. Its pictures become links: the page loads nothing from elsewhere.
 */

import { DOMPurify, MarkdownIt, hljs, katex, remend, tex } from "../vendor/libraries.js";

const LONGEST_COLOURED = 50_000; // characters of code
const ALLOWED = {
  USE_PROFILES: { html: true, mathMl: true },
  ADD_TAGS: ["semantics", "annotation"],
  ADD_ATTR: ["target", "encoding"],
  FORBID_TAGS: ["style", "form", "img", "input", "textarea", "select", "audio", "video"],
  FORBID_ATTR: ["style"],
};

/** Return a parser of what the page reads. A line of dashes never makes a heading of text above. */
export function makeParser() {
  const parser = new MarkdownIt({ html: false, breaks: true, highlight });
  parser.disable("lheading");
  parser.use(tex, { delimiters: "all", render: formula });
  return parser;
}

const parser = makeParser();
const { escapeHtml } = parser.utils;

parser.renderer.rules.fence = (tokens, at) => code(tokens[at].content, tokens[at].info.trim());
parser.renderer.rules.code_block = (tokens, at) => code(tokens[at].content, "");
parser.renderer.rules.table_open = () =>
  '<div class="wide" tabindex="0" role="group" aria-label="Table"><table>';
parser.renderer.rules.table_close = () => "</table></div>";
parser.renderer.rules.th_open = parser.renderer.rules.td_open = (tokens, at) => {
  const side = /text-align:(\w+)/.exec(String(tokens[at].attrGet("style")))?.[1] ?? "left";
  return `<${tokens[at].tag} class="${side}">`;
};
parser.renderer.rules.image = (tokens, at) => {
  const href = escapeHtml(String(tokens[at].attrGet("src") ?? ""));
  return `<a ${FOREIGN} href="${href}">${escapeHtml(tokens[at].content || href)}</a>`;
};
parser.renderer.rules.link_open = (tokens, at, options, _env, self) => {
  tokens[at].attrSet("target", "_blank");
  tokens[at].attrSet("rel", "noopener noreferrer nofollow");
  return self.renderToken(tokens, at, options);
};
parser.renderer.rules.heading_open = (tokens, at, _options, env) =>
  `<${env.outline.open(Number(tokens[at].tag[1]))} class="${tokens[at].tag}">`;
parser.renderer.rules.heading_close = (_tokens, _at, _options, env) => `</${env.outline.tag}>`;

const FOREIGN = 'target="_blank" rel="noopener noreferrer nofollow"';

/** An answer's headings begin below the page's own, and skip no level. */
class Outline {
  constructor(first = 0, last = 3) {
    this.first = first; // level of the first heading; 0 before there is one
    this.last = last; // level that the last one got
  }

  get tag() {
    return `h${this.last}`;
  }

  open(level) {
    this.first ||= level;
    this.last = Math.max(4, Math.min(6, 4 + level - this.first, this.last + 1));
    return this.tag;
  }
}

/** What the parts of one answer share: its link definitions and its headings. */
export class Document {
  #env = { references: {}, outline: new Outline() };

  /** Return the elements of a part that is whole. */
  render(source) {
    return sanitised(parser.render(source, this.#env));
  }

  /** Return the elements of a part that more text will follow: what is open in it is closed. */
  renderOpen(source, { isCode }) {
    const { references, outline } = this.#env;
    const env = { references: { ...references }, outline: new Outline(outline.first, outline.last) };
    const ends = () => remend(source, { linkMode: "text-only", setextHeadings: false });
    return sanitised(parser.render(isCode ? source : ends(), env));
  }
}

function sanitised(html) {
  return /** @type {any} */ (DOMPurify.sanitize(html, { ...ALLOWED, RETURN_DOM_FRAGMENT: true }));
}

function code(text, info) {
  const language = info.split(/\s/)[0];
  const name = escapeHtml(language || "text");
  return (
    `<div class="code"><div class="head"><span>${name}</span>` +
    '<button type="button" class="plain copy" aria-label="Copy the code">Copy</button></div>' +
    `<pre tabindex="0" role="group" aria-label="Code, ${name}"><code>` +
    `${highlight(text.replace(/\n$/, ""), language)}</code></pre></div>`
  );
}

function highlight(text, language) {
  if (!language || text.length > LONGEST_COLOURED || !hljs.getLanguage(language)) {
    return escapeHtml(text);
  }
  return hljs.highlight(text, { language, ignoreIllegals: true }).value;
}

function formula(source, isDisplay) {
  try {
    const options = { output: "mathml", displayMode: isDisplay, throwOnError: true };
    const set = katex.renderToString(source, /** @type {any} */ (options));
    return isDisplay ? `<div class="wide" tabindex="0" role="group" aria-label="Formula">${set}</div>` : set;
  } catch {
    return `<code class="tex">${escapeHtml(source)}</code>`; // as the model wrote it
  }
}
