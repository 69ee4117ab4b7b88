// Puts the page together.

import { askForKey, hasKey } from "./api.js";
import { Chat } from "./chat.js";
import { EnginePanel } from "./engine.js";
import { Load } from "./load.js";

const health = document.getElementById("health");
const chat = new Chat();
let isMet = false;

const panel = new EnginePanel((phase, words) => {
  if (health.textContent !== words) health.textContent = words;
  health.dataset.phase = phase;
  document.getElementById("change-key").hidden = !hasKey();
  if (phase === "ready" && !isMet) {
    isMet = true;
    chat.meet().catch(() => (isMet = false));
  }
});
new Load(document.getElementById("load"));
document.getElementById("change-key").addEventListener("click", () => askForKey());

const views = document.querySelectorAll("[data-shows]");
for (const view of views) {
  view.addEventListener("click", () => {
    document.body.dataset.view = view.dataset.shows;
    for (const other of views) other.setAttribute("aria-pressed", other === view);
  });
}
panel.watch();
