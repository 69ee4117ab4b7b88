// Requests to the server that this page came from, and the API key, if it wants one.
//
// The key lives in sessionStorage: it survives a reload and ends with the tab. What is in localStorage stays
// for whoever listens on this address next, and addresses like 127.0.0.1:8000 change hands.

const dialog = document.getElementById("key-dialog");
const form = document.getElementById("key-form");
let asking = null; // one question at a time, whoever asks

export class Refused extends Error {}

export const hasKey = () => sessionStorage.getItem("fastgen.key") !== null;

// Resolves to whether there is a key now.
export function askForKey(problem = "") {
  asking ??= new Promise((resolve) => {
    document.getElementById("key-problem").textContent = problem;
    form.reset();
    dialog.onclose = () => {
      asking = null;
      resolve(dialog.returnValue === "given");
    };
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("fastgen.key", form.elements.key.value.trim());
  document.dispatchEvent(new Event("key"));
  dialog.close("given");
});
document.getElementById("no-key").addEventListener("click", () => dialog.close());

// An answer of status 200. Throws Refused, with what the server says, for any other.
export async function ask(path, { body, signal } = {}) {
  const key = sessionStorage.getItem("fastgen.key");
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body),
  });
  if (answer.ok) return answer;
  const message = await messageOf(answer);
  if (answer.status === 401) {
    const isStale = sessionStorage.getItem("fastgen.key") !== key; // it was given meanwhile
    if (isStale || (await askForKey(key === null ? "" : message))) return ask(path, { body, signal });
  }
  throw new Refused(message);
}

async function messageOf(answer) {
  const said = await answer.json().catch(() => null);
  return said?.error?.message ?? `the server answered ${answer.status} ${answer.statusText}`;
}

// The events of a stream, parsed; ends at [DONE]. Throws Refused for an event that is an error.
export async function* stream(path, options) {
  const answer = await ask(path, options);
  for await (const text of messages(answer.body)) {
    if (text === "[DONE]") return;
    const event = JSON.parse(text);
    if (event.error) throw new Refused(event.error.message);
    yield event;
  }
  throw new Refused("the stream was cut off");
}

async function* messages(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}
