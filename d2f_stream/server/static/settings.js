/**
 * Settings: the parameters of the next request, as fields that begin with the model's defaults.
 *
 * Only what differs from a default is sent and remembered, so a server's own choice stays in force.
 */

import { element } from "./answer.js";
import { read, write } from "./transcript.js";

const FIELDS = [
  {
    name: "block_size",
    label: "Block size",
    about: "Tokens denoised together.",
    bounds: (model) => ({ min: 1, max: model.max_block_size, step: 1 }),
  },
  {
    name: "max_new_tokens",
    label: "Longest answer",
    about: "In tokens.",
    bounds: (model) => ({ min: 1, max: model.max_len, step: 1 }),
  },
  {
    name: "confidence_threshold",
    label: "Confidence threshold",
    about: "Surer tokens are accepted at once. Lower is faster, higher is safer.",
    kind: "range",
    bounds: () => ({ min: 0.05, max: 1, step: 0.05 }),
  },
  {
    name: "max_active_blocks",
    label: "Active blocks",
    about: "In work at once. Empty: no bound.",
    isOptional: true,
    bounds: () => ({ min: 1, max: 64, step: 1 }),
  },
  {
    name: "seed",
    label: "Seed",
    about: "Of the sampling. Empty: a new one.",
    isOptional: true,
    bounds: () => ({ min: Number.MIN_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER, step: 1 }),
  },
  {
    name: "add_threshold",
    label: "Next block joins at",
    about: "The share of a block that is filled when its successor begins.",
    kind: "range",
    bounds: () => ({ min: 0.05, max: 1, step: 0.05 }),
  },
  {
    name: "temperature",
    label: "Temperature",
    about: "At 0 the likeliest token is taken, and the seed has no effect.",
    kind: "range",
    bounds: () => ({ min: 0, max: 2, step: 0.1 }),
  },
];

export class Settings {
  #root;
  #storage;
  /** @type {any} */
  #model = null;
  #inputs = new Map();

  /** `root` gets the fields. */
  constructor(root, storage = globalThis.localStorage) {
    this.#root = root;
    this.#storage = storage;
  }

  /** Build the fields for a model. */
  setModel(model) {
    if (this.#model?.name === model.name) return;
    this.#model = model;
    this.#inputs.clear();
    const chosen = read(this.#storage, this.#key) ?? {};
    const fields = FIELDS.map((field) => this.#build(field, chosen[field.name]));
    this.#root.replaceChildren(...fields);
  }

  /** The fields that differ from the model's defaults. */
  get overrides() {
    const overrides = {};
    for (const { name } of FIELDS) {
      const input = this.#inputs.get(name);
      if (input === undefined || !input.checkValidity()) continue;
      // As text: a slider rounds a default to its steps, which must not count as a choice.
      if (input.value === input.dataset.initial) continue;
      overrides[name] = input.value === "" ? null : Number(input.value);
    }
    return overrides;
  }

  reset() {
    for (const { name } of FIELDS) this.#set(name, this.#model?.defaults[name]);
    this.#save();
  }

  get #key() {
    return `d2f.params.${this.#model.name}`;
  }

  #build({ name, label, about, kind = "number", isOptional = false, bounds }, chosen) {
    const field = element("div", `field ${kind}`);
    const input = element("input");
    input.type = kind;
    input.name = name;
    input.id = `param-${name}`;
    input.required = !isOptional;
    if (kind === "number") input.inputMode = "numeric";
    Object.assign(input, bounds(this.#model));
    const title = element("label", "name", label);
    title.htmlFor = input.id;
    const hint = element("span", "about", about);
    hint.id = `${input.id}-about`;
    input.setAttribute("aria-describedby", hint.id);
    field.append(title, input, hint);
    if (kind === "range") title.after(element("output"));
    input.addEventListener("input", () => {
      this.#showValue(input);
      this.#save();
    });
    this.#inputs.set(name, input);
    this.#set(name, this.#model.defaults[name]);
    input.dataset.initial = input.value;
    if (chosen !== undefined) this.#set(name, chosen);
    return field;
  }

  #set(name, value) {
    const input = this.#inputs.get(name);
    if (input === undefined) return;
    input.value = value ?? "";
    this.#showValue(input);
  }

  #showValue(input) {
    const output = input.parentElement?.querySelector("output");
    if (output) output.textContent = input.value;
  }

  #save() {
    write(this.#storage, this.#key, this.overrides);
  }
}
