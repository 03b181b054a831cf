/** Composer: where a question is written, and the button that sends it or stops the answer. */

const ACTS = {
  send: { label: "Send", icon: "#i-send" },
  stop: { label: "Stop", icon: "#i-stop" },
  skip: { label: "Show all at once", icon: "#i-skip" },
};

export class Composer {
  #form;
  #field;
  #attachments;
  #act;
  #opening = null; // a promise, until the chat is open
  #isWaiting = false; // for the chat, or for a file to be read, before the question is sent

  /** `attachments` go with the question; `act` has mode() of ACTS, ask(question), stop() and typed(). */
  constructor(form, attachments, act) {
    this.#form = form;
    this.#attachments = attachments;
    this.#field = form.querySelector("textarea");
    this.#act = act;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#field.addEventListener("input", () => this.#changed());
    this.#field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (act.mode() === "send") this.#submit();
    });
  }

  /** Ask nothing before the chat is open; what the reader sends meanwhile is asked then. */
  waitFor(opening) {
    this.#opening = opening.catch(() => {}).then(() => {
      this.#opening = null;
    });
  }

  /** The question as it would be asked. */
  get text() {
    return this.#attachments.into(this.#field.value.trim());
  }

  /** Put a text there, to be changed. */
  edit(text) {
    this.#field.value = text;
    this.#changed();
    this.#field.focus({ preventScroll: true });
  }

  /** Let the reader type on; fingers ask for the keyboard themselves, as it covers the page. */
  focus() {
    if (matchMedia("(pointer: fine)").matches) this.#field.focus({ preventScroll: true });
  }

  /** Show what the button does now. */
  showMode() {
    const mode = this.#act.mode();
    const { label, icon } = ACTS[mode];
    const button = this.#form.querySelector(".act");
    button.dataset.mode = mode;
    button.title = label;
    button.querySelector(".unseen").textContent = label;
    button.querySelector("use").setAttribute("href", icon);
  }

  #submit() {
    const question = this.text;
    const first = this.#opening ?? this.#attachments.reading;
    if (this.#isWaiting) return;
    if (this.#act.mode() !== "send") this.#act.stop();
    else if (first) {
      this.#isWaiting = true;
      first.then(() => {
        this.#isWaiting = false;
        this.#submit();
      });
    } else if (question) {
      this.#field.value = "";
      this.#attachments.clear();
      this.#changed();
      this.#act.ask(question);
    } else this.#field.focus();
  }

  #changed() {
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight}px`;
    this.#act.typed();
  }
}
