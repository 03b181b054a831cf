/**
 * Settings: a chat's system prompt and parameters, as fields that begin with the model's defaults.
 *
 * Only what differs from a default is sent and kept, so a server's own choice stays in force. What
 * is out of range is told beside its field while it is typed, and not taken.
 */

import { element } from "./dom.js";

const MOST_STOPS = 16;

const FIELDS = [
  {
    name: "max_new_tokens",
    label: "Longest answer",
    about: "In tokens.",
    bounds: (model) => ({ min: 1, max: model.max_len, step: 1 }),
  },
  {
    name: "block_size",
    label: "Block size",
    about: "Tokens denoised together.",
    bounds: (model) => ({ min: 1, max: model.max_block_size, step: 1 }),
  },
  {
    name: "temperature",
    label: "Temperature",
    about: "At 0 the likeliest token is taken, and the seed has no effect.",
    kind: "range",
    bounds: () => ({ min: 0, max: 2, step: 0.1 }),
  },
  {
    name: "top_p",
    label: "Top p",
    about: "Tokens are drawn from the likeliest ones that together have this probability.",
    kind: "range",
    bounds: () => ({ min: 0.05, max: 1, step: 0.05 }),
  },
  {
    name: "confidence_threshold",
    label: "Confidence threshold",
    about: "Tokens surer than this are accepted at once. Lower is faster, higher is safer.",
    kind: "range",
    bounds: () => ({ min: 0.05, max: 1, step: 0.05 }),
  },
  {
    name: "add_threshold",
    label: "Next block joins at",
    about: "The share of a block that is filled when its successor begins.",
    kind: "range",
    bounds: () => ({ min: 0.05, max: 1, step: 0.05 }),
  },
  {
    name: "max_active_blocks",
    label: "Active blocks",
    about: "Written at once. Empty: no limit.",
    isOptional: true,
    bounds: () => ({ min: 1, max: 64, step: 1 }),
  },
  {
    name: "seed",
    label: "Seed",
    about: "For sampling. Empty: a new one each time.",
    isOptional: true,
    bounds: () => ({ min: Number.MIN_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER, step: 1 }),
  },
];

export class Settings {
  #root;
  #system;
  #stop;
  /** @type {any} */
  #model = null;
  /** @type {any} */
  #chosen = {}; // of the chat
  #inputs = new Map();
  #onChange;

  /** `root` gets the fields; `onChange` is called with what holds now, { system, params }. */
  constructor(root, { onChange }) {
    this.#root = root;
    this.#onChange = onChange;
    this.#system = textField("system", "System prompt", "What the model is told before the chat.", 4);
    const aboutStop = "One per line; each ends the answer where it would appear.";
    this.#stop = textField("stop", "Stop strings", aboutStop, 2);
    for (const field of [this.#system, this.#stop]) {
      field.input.addEventListener("input", () => this.#changed());
    }
    root.append(this.#system.root, this.#stop.root);
  }

  /** Build the fields for a model. */
  setModel(model) {
    if (this.#model?.name === model.name) return;
    this.#model = model;
    this.#inputs.clear();
    const fields = FIELDS.map((field) => this.#build(field));
    this.#root.replaceChildren(this.#system.root, ...fields, this.#stop.root);
    this.#fill();
  }

  /** Show a chat's settings. */
  show({ system, params }) {
    this.#system.input.value = system;
    this.#chosen = params;
    this.#fill();
  }

  /** Go back to the model's own; the system prompt stays. */
  reset() {
    this.#chosen = {};
    this.#fill();
    this.#changed();
  }

  /** The fields that differ from the model's defaults. */
  #overrides() {
    const overrides = { ...this.#chosen }; // also what this page has no field for
    for (const { name } of this.#model === null ? [] : FIELDS) {
      const input = this.#inputs.get(name);
      delete overrides[name];
      if (!input.checkValidity()) continue;
      // As text: a slider rounds a default to its steps, which must not count as a choice.
      if (input.value === input.dataset.initial) continue;
      overrides[name] = input.value === "" ? null : Number(input.value);
    }
    const stops = this.#stop.input.value.split("\n").filter(Boolean);
    delete overrides.stop;
    if (stops.length > 0 && stops.length <= MOST_STOPS) overrides.stop = stops;
    return overrides;
  }

  #changed() {
    const numStops = this.#stop.input.value.split("\n").filter(Boolean).length;
    const tooMany = numStops > MOST_STOPS ? `At most ${MOST_STOPS}; these are ${numStops}.` : "";
    this.#stop.input.setCustomValidity(tooMany);
    tell(this.#stop.input);
    this.#chosen = this.#overrides();
    this.#onChange({ system: this.#system.input.value, params: this.#chosen });
  }

  #fill() {
    const { stop = [] } = this.#chosen;
    this.#stop.input.value = [stop].flat().join("\n");
    for (const [name, input] of this.#inputs) {
      input.value = input.dataset.initial;
      if (name in this.#chosen) input.value = this.#chosen[name] ?? "";
      showValue(input);
    }
  }

  #build({ name, label, about, kind = "number", isOptional = false, bounds }) {
    const field = element("div", `field ${kind}`);
    const input = element("input");
    input.type = kind;
    input.name = name;
    input.id = `param-${name}`;
    input.required = !isOptional;
    if (kind === "number") input.inputMode = "numeric";
    Object.assign(input, bounds(this.#model));
    describe(field, input, label, about);
    if (kind === "range") field.firstElementChild?.after(element("output"));
    input.value = this.#model.defaults[name] ?? "";
    input.dataset.initial = input.value;
    input.addEventListener("input", () => {
      showValue(input);
      this.#changed();
    });
    this.#inputs.set(name, input);
    return field;
  }
}

function textField(name, label, about, rows) {
  const root = element("div", "field text");
  const input = element("textarea");
  input.id = `chat-${name}`;
  input.rows = rows;
  input.spellcheck = name === "system";
  describe(root, input, label, about);
  return { root, input };
}

function describe(field, input, label, about) {
  const title = element("label", "name", label);
  title.htmlFor = input.id;
  const hint = element("span", "about", about);
  hint.id = `${input.id}-about`;
  const error = element("span", "error");
  error.id = `${input.id}-error`;
  error.setAttribute("role", "status");
  input.setAttribute("aria-describedby", `${hint.id} ${error.id}`);
  field.append(title, input, hint, error);
}

function showValue(input) {
  const output = input.parentElement?.querySelector("output");
  if (output) output.textContent = input.value;
  tell(input);
}

/** Say beside a field what is wrong with it, if anything. */
function tell(input) {
  const error = input.parentElement?.querySelector(".error");
  if (!error) return;
  const isValid = input.checkValidity();
  input.setAttribute("aria-invalid", String(!isValid));
  error.textContent = isValid ? "" : sentence(input);
}

function sentence({ validity, validationMessage, min, max }) {
  if (validity.customError) return validationMessage;
  const range = `from ${min} to ${max}`;
  const number = validity.stepMismatch ? "a whole number" : "a number";
  return `Enter ${number} ${range}; until then, the model’s default applies.`;
}
