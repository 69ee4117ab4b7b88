// Conversations, kept in this browser: the newest MAX_KEPT, in at most MAX_LENGTH characters. Tokens of old
// answers are dropped first, then the oldest conversations.

const KEY = "fastgen.conversations";
const MAX_KEPT = 50;
const MAX_LENGTH = 2_000_000;

export class Conversations {
  constructor() {
    this.list = read(); // the newest first
    if (!this.list.length) this.add();
    this.current = this.list[0];
  }

  // A new one; an empty one is used first.
  add() {
    const empty = this.list.find((conversation) => !conversation.messages.length);
    this.current = empty ?? { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), messages: [] };
    this.list = [this.current, ...this.list.filter((other) => other !== this.current)].slice(0, MAX_KEPT);
    return this.current;
  }

  select(id) {
    this.current = this.list.find((conversation) => conversation.id === id) ?? this.current;
  }

  remove() {
    this.list = this.list.filter((conversation) => conversation !== this.current);
    this.current = this.list[0] ?? this.add();
    this.save();
  }

  // Writes all of them down. Another tab's are kept, unless this one has deleted everything.
  save() {
    const list = this.list.filter((conversation) => conversation.messages.length);
    for (let text = JSON.stringify(list); ; text = JSON.stringify(list)) {
      if (text.length <= MAX_LENGTH && written(text)) return;
      if (!list.length) return;
      shorten(list);
    }
  }
}

export const titleOf = ({ messages }) => {
  const text = messages.find((message) => message.role === "user")?.content ?? "New conversation";
  return text.length > 48 ? text.slice(0, 47) + "…" : text;
};

// Takes away what will be missed least; what the tab shows stays as it is.
function shorten(list) {
  const withTokens = list.findLastIndex(({ messages }) => messages.some((message) => message.tokens));
  if (withTokens > 0 || (withTokens === 0 && list.length === 1)) {
    const { messages, ...rest } = list[withTokens];
    list[withTokens] = { ...rest, messages: messages.map(({ tokens, ...message }) => message) };
  } else {
    list.pop();
  }
}

function written(text) {
  try {
    localStorage.setItem(KEY, text);
    return true;
  } catch {
    return false; // the browser gives less
  }
}

function read() {
  try {
    const list = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return list.filter((c) => typeof c.id === "string" && Array.isArray(c.messages)).slice(0, MAX_KEPT);
  } catch {
    return [];
  }
}
