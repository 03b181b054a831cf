/** Types of libraries.js, which scripts/vendor.js makes: those of the packages. */

export { tex } from "@mdit/plugin-tex";
export { default as DOMPurify } from "dompurify";
export { default as hljs } from "highlight.js";
export { openDB } from "idb";
export { default as katex } from "katex";
export { default as MarkdownIt } from "markdown-it";
export { default as remend } from "remend";
