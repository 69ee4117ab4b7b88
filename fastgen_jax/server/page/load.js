// Requests with long and short prompts, for people who want to see the engine at work. A browser keeps six
// connections to a server, which the chat and the steps need too: so each request here has many prompts.

import { ask } from "./api.js";

const N_CALLERS = 4;
const N_PROMPTS = 7; // of a request
const SECONDS = 60; // after which it ends by itself
const SENTENCES = [
  "Once upon a time there was a little dog.", "Tom has a red ball.", "Anna went to the park.",
  "The sun was warm and the sky was blue.", "Lily and Ben played in the garden.", "It began to rain.",
];
const N_SENTENCE = 9; // tokens, about

export class Load {
  constructor(button) {
    this.button = button;
    this.running = null;
    this.longest = 512;
    button.addEventListener("click", () => (this.running ? this.running.abort() : this.run()));
    document.addEventListener("limits", (event) => (this.longest = event.detail.max_model_len));
  }

  async run() {
    this.running = new AbortController();
    const timer = setTimeout(() => this.running.abort(), SECONDS * 1000);
    this.say("Stop the load", true);
    const callers = Array.from({ length: N_CALLERS }, (_, i) => this.call(i));
    const error = await Promise.all(callers).catch((error) => error);
    this.running.abort();
    clearTimeout(timer);
    this.running = null;
    this.say(error.name === "AbortError" ? "Start a load" : error.message, false);
  }

  say(words, isPressed) {
    this.button.textContent = words;
    this.button.setAttribute("aria-pressed", isPressed);
  }

  // Asks again and again, until it is aborted.
  async call(i) {
    const { signal } = this.running;
    await new Promise((resolve) => setTimeout(resolve, 300 * i));
    for (;;) await (await ask("v1/completions", { body: this.body(), signal })).json();
  }

  body() {
    const prompt = Array.from({ length: N_PROMPTS }, () => this.prompt());
    const max_tokens = 16 + pick(Math.min(160, Math.floor(this.longest / 4)));
    return { prompt, max_tokens, ignore_eos: true, temperature: 0.9 };
  }

  // One of four takes half of the context, of which a half is the same in all of them.
  prompt() {
    const quarter = Math.ceil(Math.min(this.longest, 4096) / 4 / N_SENTENCE);
    if (pick(4)) return sentences(2 + pick(8), () => pick(SENTENCES.length));
    return sentences(quarter, (i) => i) + sentences(quarter, () => pick(SENTENCES.length));
  }
}

const sentences = (n, choose) =>
  Array.from({ length: n }, (_, i) => `${SENTENCES[choose(i) % SENTENCES.length]} `).join("");

const pick = (n) => Math.floor(Math.random() * n);
