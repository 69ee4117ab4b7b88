// An answer token by token, coloured by probability; a token's alternatives are shown when it is pointed at or
// focused. Each answer is one stop of the Tab key, arrows go from token to token.

const tip = document.getElementById("tip");
const BOUNDS = [0.9, 0.5, 0.2, 0.05]; // of probability: classes p0 to p4, as in the page's scale

// Tokens of a streamed event: [text, logprob, [[text, logprob], ...]].
export class TokenReader {
  constructor() {
    this.decoder = new TextDecoder(); // a token may end within a character
  }

  chat(logprobs) {
    return (logprobs?.content ?? []).map((entry) => [
      this.decoder.decode(new Uint8Array(entry.bytes), { stream: true }),
      entry.logprob,
      entry.top_logprobs.map(({ token, logprob }) => [token, logprob]),
    ]);
  }

  completion(logprobs) {
    return (logprobs?.tokens ?? []).map((token, i) => [
      token, logprobs.token_logprobs[i], Object.entries(logprobs.top_logprobs?.[i] ?? {}),
    ]);
  }
}

// The tokens that make up the content, the last one cut where it ends; null if they do not.
export function aligned(tokens, content) {
  const start = tokens.map(([text]) => text).join("").indexOf(content);
  if (start < 0) return null;
  const parts = [];
  let at = -start;
  for (const token of tokens) {
    const end = at + token[0].length;
    if (end > 0 && at < content.length) {
      parts.push([token[0].slice(Math.max(-at, 0), content.length - at), token]);
    }
    at = end;
  }
  return parts;
}

// Shows an answer's text in an element, which it owns: plain, or token by token.
export class TokenText {
  constructor(element) {
    this.element = element;
    this.parts = []; // what each child shows; null: plain text
    element.addEventListener("keydown", (event) => this.onKey(event));
    element.addEventListener("pointerover", (event) => showTip(event.target));
    element.addEventListener("pointerleave", () => showTip(document.activeElement));
    element.addEventListener("focusin", (event) => showTip(event.target));
    element.addEventListener("focusout", () => showTip(null));
  }

  show(content, tokens, isColoured) {
    const parts = isColoured && tokens?.length && content ? aligned(tokens, content) : null;
    this.element.classList.toggle("coloured", parts !== null);
    if (!parts) {
      this.parts = null;
      this.element.removeAttribute("role");
      this.element.removeAttribute("aria-label");
      this.element.textContent = content;
      return;
    }
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", "Answer by tokens; arrows go from one to the next");
    if (!this.parts) this.element.replaceChildren();
    const old = this.parts ?? [];
    let same = 0;
    while (same < old.length && old[same] === parts[same]?.[0]) same++;
    while (this.element.childNodes.length > same) this.element.lastChild.remove();
    this.element.append(...parts.slice(same).map(([text, token]) => spanOf(text, token)));
    if (!this.element.querySelector("[tabindex='0']")) this.element.firstChild.tabIndex = 0;
    this.parts = parts.map(([text]) => text);
  }

  onKey(event) {
    const from = event.target;
    const to = {
      ArrowLeft: from.previousSibling, ArrowRight: from.nextSibling,
      Home: this.element.firstChild, End: this.element.lastChild,
    }[event.key];
    if (event.key === "Escape" && !tip.hidden) event.stopPropagation(), showTip(null);
    if (!to || !this.parts) return;
    event.preventDefault();
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  }
}

function spanOf(text, token) {
  const [span, word] = ["span", "span"].map((tag) => document.createElement(tag));
  const p = Math.exp(token[1]);
  const level = BOUNDS.findIndex((bound) => p >= bound);
  const start = text.search(/\S|$/); // blanks before a word stay as they are
  word.className = `p${level < 0 ? BOUNDS.length : level}`;
  word.textContent = text.slice(start);
  span.className = "token";
  span.append(text.slice(0, start), word);
  span.tabIndex = -1;
  span.token = token;
  return span;
}

function showTip(target) {
  target = target?.closest?.(".token");
  const token = target?.token;
  document.querySelector("[aria-describedby='tip']")?.removeAttribute("aria-describedby");
  tip.hidden = !token;
  if (!token) return;
  const [text, logprob, top] = token;
  const rows = top.some(([other]) => other === text) ? top : [...top, [text, logprob]];
  tip.replaceChildren(...rows.map(([other, value]) => rowOf(other, value, other === text)));
  target.setAttribute("aria-describedby", "tip");
  const { left, top: y, bottom } = target.getBoundingClientRect();
  const x = Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8));
  const isBelow = bottom + tip.offsetHeight + 8 < window.innerHeight;
  tip.style.left = `${x}px`;
  tip.style.top = `${isBelow ? bottom + 4 : y - tip.offsetHeight - 4}px`;
}

function rowOf(text, logprob, isChosen) {
  const row = document.createElement("div");
  const [name, share, bar] = ["code", "span", "i"].map((tag) => document.createElement(tag));
  const p = Math.exp(logprob);
  name.textContent = text.replaceAll(" ", "␣").replaceAll("\n", "↵") || "∅";
  share.textContent = p >= 0.001 ? `${(100 * p).toFixed(1)} %` : `e${logprob.toFixed(1)}`;
  bar.style.width = `${Math.max(100 * p, 1)}%`;
  row.className = isChosen ? "chosen" : "";
  row.append(name, share, bar);
  return row;
}
