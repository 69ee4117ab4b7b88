// Requests with long and short prompts, for people who want to see the engine at work.

import { Refused, ask } from "./api.js";

const N = 32;
const SENTENCES = [
  "Once upon a time there was a little dog.", "Tom has a red ball.", "Anna went to the park.",
  "The sun was warm and the sky was blue.", "Lily and Ben played in the garden.", "It began to rain.",
];

export class Load {
  constructor(button) {
    this.button = button;
    this.running = null;
    this.longest = 512;
    button.addEventListener("click", () => (this.running ? this.running.abort() : this.send()));
    document.addEventListener("limits", (event) => (this.longest = event.detail.max_model_len));
  }

  async send() {
    const { signal } = (this.running = new AbortController());
    this.button.setAttribute("aria-pressed", true);
    this.button.textContent = "Stop them";
    const requests = Array.from({ length: N }, (_, i) => this.request(i, signal));
    const ends = await Promise.allSettled(requests);
    const refused = ends.find((end) => end.reason instanceof Refused);
    this.button.textContent = refused ? refused.reason.message : `Send ${N} requests`;
    this.button.setAttribute("aria-pressed", false);
    this.running = null;
  }

  // One of four has a prompt of about half the context; they come one after the other.
  async request(i, signal) {
    await new Promise((resolve) => setTimeout(resolve, i * 120));
    const n_tokens = i % 4 === 3 ? Math.min(this.longest, 4096) / 2 : 12 + 8 * (i % 5);
    const words = [];
    for (let k = i; words.length * 8 < n_tokens; k += 1 + (i % 3)) words.push(SENTENCES[k % SENTENCES.length]);
    const max_tokens = Math.min(60 + 30 * (i % 6), Math.floor(this.longest / 4));
    const body = { prompt: words.join(" "), max_tokens, seed: i, ignore_eos: true, temperature: 0.9 };
    await (await ask("v1/completions", { body, signal })).json();
  }
}
