// The chat: one conversation in sight, one answer at a time. What the model writes is only ever text.

import { ask, stream } from "./api.js";
import { Conversations, titleOf } from "./conversations.js";
import { TokenReader, TokenText } from "./tokens.js";

const N_ALTERNATIVES = 5;
const SETTINGS = "fastgen.settings";
const at = (id) => document.getElementById(id);

export class Chat {
  constructor() {
    this.conversations = new Conversations();
    this.answering = null; // the AbortController of the answer that is written
    this.isPlain = false; // the model has no chat template
    this.settings = at("settings");
    this.text = at("composer").elements.text;
    this.readSettings();
    this.listen();
    this.show();
  }

  listen() {
    at("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.answering ? this.stop() : this.send();
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.answering) this.send();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    at("new").addEventListener("click", () => this.turnTo(() => this.conversations.add()));
    at("delete").addEventListener("click", () => this.turnTo(() => this.conversations.remove()));
    at("conversations").addEventListener("change", (event) =>
      this.turnTo(() => this.conversations.select(event.target.value)));
    at("colouring").addEventListener("change", () => (this.writeSettings(), this.show()));
    this.settings.addEventListener("change", () => this.writeSettings());
    this.settings.addEventListener("submit", (event) => event.preventDefault());
    at("show-settings").addEventListener("click", (event) => {
      this.settings.hidden = !this.settings.hidden;
      event.currentTarget.setAttribute("aria-expanded", !this.settings.hidden);
    });
  }

  // Learns what the server's model is, once it is ready.
  async meet() {
    const [models, tokenizer] = await Promise.all(
      ["v1/models", "tokenizer_info"].map(async (path) => (await ask(path)).json()));
    this.isPlain = !tokenizer.chat_template;
    at("model").textContent = models.data[0].id;
    at("notice").hidden = !this.isPlain;
    at("notice").textContent =
      "This model has no chat template: it continues your text, and sees the conversation as one.";
  }

  turnTo(change) {
    this.stop();
    change();
    this.show();
    this.text.focus();
  }

  async send() {
    const text = this.text.value;
    if (!text.trim()) return;
    this.text.value = "";
    this.conversations.current.messages.push({ role: "user", content: text });
    await this.answer();
  }

  // Asks for the answer to the newest message, and shows it while it is written.
  async answer() {
    const conversation = this.conversations.current;
    const message = { role: "assistant", content: "", tokens: [] };
    const [path, body] = this.request(conversation.messages);
    conversation.messages.push(message);
    const controller = (this.answering = new AbortController());
    this.show();
    const view = this.views.at(-1);
    const clock = new Clock();
    try {
      for await (const event of stream(path, { body, signal: controller.signal })) {
        clock.take(event);
        this.take(message, event);
        view.show(message, this.isColouring);
        this.scroll();
      }
      message.note = clock.words();
    } catch (error) {
      if (error.name === "AbortError") message.note = `stopped · ${clock.words()}`;
      else message.error = error.message;
    }
    this.answered(conversation, message, controller);
  }

  answered(conversation, message, controller) {
    if (this.answering === controller) this.answering = null;
    delete message.reader;
    this.conversations.save();
    at("said").textContent = message.error ?? `Answered: ${message.note}`;
    if (conversation === this.conversations.current) this.show();
  }

  take(message, event) {
    const choice = event.choices?.[0];
    if (!choice) return;
    message.reader ??= new TokenReader();
    if (choice.delta) {
      message.content += choice.delta.content ?? "";
      if (choice.delta.reasoning_content) {
        message.thought = (message.thought ?? "") + choice.delta.reasoning_content;
      }
      message.tokens.push(...message.reader.chat(choice.logprobs));
    } else {
      message.content += choice.text;
      message.tokens.push(...message.reader.completion(choice.logprobs));
    }
  }

  request(messages) {
    const { system, ...sampling } = this.sampling();
    const said = messages.filter(({ error }) => !error).map(({ role, content }) => ({ role, content }));
    const common = { ...sampling, stream: true, stream_options: { include_usage: true } };
    if (this.isPlain) {
      const prompt = [system, ...said.map(({ content }) => content)].filter(Boolean).join("\n");
      return ["v1/completions", { max_tokens: 256, ...common, prompt, logprobs: N_ALTERNATIVES }];
    }
    if (system) said.unshift({ role: "system", content: system });
    const logprobs = { logprobs: true, top_logprobs: N_ALTERNATIVES };
    return ["v1/chat/completions", { ...common, ...logprobs, messages: said }];
  }

  // What the settings ask for; fields that are empty are left out.
  sampling() {
    const asked = {};
    for (const { name, type, value } of this.settings.elements) {
      if (name && value.trim()) asked[name] = type === "number" ? Number(value) : value;
    }
    return asked;
  }

  stop() {
    this.answering?.abort();
  }

  get isColouring() { return at("colouring").checked; }

  show() {
    const { list, current } = this.conversations;
    at("conversations").replaceChildren(...list.map((c) => new Option(titleOf(c), c.id, false, c === current)));
    this.views = current.messages.map((message) => new MessageView(message, () => this.retry()));
    at("messages").replaceChildren(...this.views.map((view) => view.element));
    this.views.forEach((view, i) => view.show(current.messages[i], this.isColouring));
    at("scale").hidden = !this.isColouring;
    at("send").textContent = this.answering ? "Stop" : "Send";
    at("chat").classList.toggle("empty", !current.messages.length);
    this.scroll(true);
  }

  // Asks again for an answer that failed.
  retry() {
    this.conversations.current.messages.pop();
    this.answer();
  }

  // Follows the text, unless the reader has scrolled up.
  scroll(isForced = false) {
    const list = at("messages");
    const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    if (isForced || isAtEnd) list.scrollTop = list.scrollHeight;
  }

  readSettings() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    } catch { /* somebody else's */ }
    for (const field of this.settings.elements) if (field.name) field.value = kept[field.name] ?? "";
    at("colouring").checked = kept.colouring ?? true;
  }

  writeSettings() {
    const fields = Object.fromEntries(new FormData(this.settings));
    localStorage.setItem(SETTINGS, JSON.stringify({ ...fields, colouring: this.isColouring }));
  }
}

// One message in the list.
class MessageView {
  constructor({ role }, retry) {
    this.element = document.createElement("li");
    this.element.className = role;
    const [who, thought, text, note] = ["h3", "div", "div", "p"].map((tag) => document.createElement(tag));
    who.textContent = role === "user" ? "You" : "Model";
    [thought.className, text.className, note.className] = ["thought", "text", "note"];
    this.element.append(who, thought, text, note);
    Object.assign(this, { thought, note, retry, text: new TokenText(text) });
  }

  show({ content, tokens, thought, note, error }, isColouring) {
    this.text.show(content, tokens, isColouring);
    this.thought.textContent = thought ?? "";
    this.thought.hidden = !thought;
    this.note.textContent = error ?? note ?? "";
    this.note.classList.toggle("error", Boolean(error));
    if (error) this.note.append(" ", button("Try again", this.retry));
  }
}

function button(text, onClick) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  made.addEventListener("click", onClick);
  return made;
}

// Times an answer as its reader sees it.
class Clock {
  constructor() {
    this.start = performance.now();
    this.first = null;
    this.usage = null;
    this.reason = "";
  }

  take(event) {
    if (event.choices?.length) this.first ??= performance.now();
    this.usage = event.usage ?? this.usage;
    this.reason = event.choices?.[0]?.finish_reason ?? this.reason;
  }

  words() {
    if (this.first === null) return "no token yet";
    const parts = [`first token after ${Math.round(this.first - this.start)} ms`];
    const n = this.usage?.completion_tokens;
    if (n > 1) {
      const seconds = Math.max((performance.now() - this.first) / 1000, 0.001);
      parts.unshift(`${n} tokens`, `${((n - 1) / seconds).toFixed(0)} tokens/s`);
    }
    if (this.reason === "length") parts.push("cut at the limit");
    return parts.join(" · ");
  }
}
