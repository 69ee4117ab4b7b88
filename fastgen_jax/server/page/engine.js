// The engine, live: what /debug/steps tells, shown. The stream is read while the page is in sight.

import { Refused, stream } from "./api.js";
import { Bars, stepOf, words } from "./bars.js";
import { Blocks, CLASSES } from "./blocks.js";

const WINDOW = 2; // seconds over which rates are taken
const at = (id) => document.getElementById(id);
const isStill = window.matchMedia("(prefers-reduced-motion: reduce)");

export class EnginePanel {
  constructor(onHealth) {
    this.onHealth = onHealth;
    this.bars = new Bars(at("bars"));
    this.blocks = new Blocks(at("blocks"));
    this.counters = []; // of the last WINDOW seconds
    this.state = {}; // all that was told of what is not a step
    this.isDirty = true;
    this.lastWords = 0;
    this.listen();
    this.draw();
  }

  listen() {
    const canvas = this.bars.canvas;
    canvas.addEventListener("pointermove", (event) => this.mark(this.bars.at(event.offsetX)));
    canvas.addEventListener("pointerleave", () => this.unmark());
    canvas.addEventListener("blur", () => this.unmark());
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    at("pause").addEventListener("click", () => this.setPaused(!this.bars.isPaused));
    at("linear").addEventListener("click", (event) => {
      this.bars.isLinear = !this.bars.isLinear;
      event.currentTarget.setAttribute("aria-pressed", this.bars.isLinear);
      this.isDirty = true;
    });
    for (const canvas of [at("bars"), at("blocks")]) {
      new ResizeObserver(() => (this.isDirty = true)).observe(canvas);
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (this.isDirty = true));
  }

  onKey(event) {
    const offset = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (offset) this.mark(this.bars.beside(offset));
    else if (event.key === "Escape") this.unmark();
    else if (event.key === " ") this.setPaused(!this.bars.isPaused);
    else return;
    event.preventDefault();
  }

  mark(step) {
    if (!step) return;
    this.bars.hold(true);
    this.bars.marked = step.number;
    this.say(step);
    this.isDirty = true;
  }

  unmark() {
    this.bars.marked = null;
    this.bars.hold(this.bars.isPaused);
    this.isDirty = true;
  }

  setPaused(isPaused) {
    this.bars.isPaused = isPaused;
    this.bars.hold(isPaused);
    at("pause").setAttribute("aria-pressed", isPaused);
    this.isDirty = true;
  }

  // Reads the stream, again and again while the page is in sight.
  async watch() {
    let pause = 1;
    for (;;) {
      await visible();
      const leaving = new AbortController();
      const leave = () => document.hidden && leaving.abort();
      document.addEventListener("visibilitychange", leave);
      try {
        for await (const event of stream("debug/steps", { signal: leaving.signal })) {
          this.take(event);
          pause = 1;
        }
      } catch (error) {
        if (error.name !== "AbortError") this.lost(error);
      } finally {
        document.removeEventListener("visibilitychange", leave);
      }
      if (!document.hidden) await keyOr(pause);
      pause = Math.min(pause * 2, 15);
    }
  }

  lost(error) {
    this.onHealth("lost", error instanceof Refused ? error.message : "the server cannot be reached");
  }

  take(event) {
    if (event.step_fields) this.begin();
    const state = (this.state = { ...this.state, ...event });
    if (event.engine) document.dispatchEvent(new CustomEvent("limits", { detail: event.engine }));
    this.onHealth(state.health.phase, describe(state.health));
    if (!state.engine) return;
    this.bars.budget = state.engine.max_num_batched_tokens;
    this.bars.add(event.steps.map(stepOf));
    this.counters = this.counters.filter((c) => state.time - c.time <= WINDOW).concat(state);
    this.showNumbers(state);
    if (event.blocks) this.showBlocks(event.blocks);
    this.isDirty = true;
  }

  begin() {
    this.counters = [];
    this.state = {};
    this.bars.clear();
  }

  showNumbers(event) {
    at("generated-rate").textContent = this.rate("n_generated_tokens");
    at("prompt-rate").textContent = this.rate("n_prompt_tokens");
    at("running").textContent = event.n_running;
    at("waiting").textContent = event.n_waiting;
    at("preemptions").textContent = event.n_preemptions.toLocaleString("en");
    const share = event.n_prefix_hits / event.n_prefix_queries;
    at("hits").textContent = event.n_prefix_queries ? `${Math.round(100 * share)} %` : "–";
    for (const name of ["ttft", "itl"]) {
      const values = at(name).querySelectorAll("td");
      event.latency[name].forEach((seconds, i) => (values[i].textContent = duration(seconds)));
    }
  }

  rate(counter) {
    const [first, last] = [this.counters[0], this.counters.at(-1)];
    const seconds = last.time - first.time;
    if (seconds < 0.2) return "–";
    return Math.round((last[counter] - first[counter]) / seconds).toLocaleString("en");
  }

  showBlocks(blocks) {
    this.blocks.set(blocks);
    CLASSES.forEach((name, i) => {
      at("classes").querySelector(`.${name} b`).textContent = blocks.counts[i].toLocaleString("en");
    });
    const several = blocks.cell_size > 1 ? `, ${blocks.cell_size} blocks a cell` : "";
    at("block-size").textContent = `${this.state.engine.block_size} tokens a block${several}`;
  }

  say(step) {
    at("step").textContent = words(step, this.bars.budget);
    this.bars.canvas.setAttribute("aria-label", `Newest steps. ${words(step, this.bars.budget)}`);
    this.lastWords = performance.now();
  }

  draw() {
    const isNow = !isStill.matches || performance.now() - this.lastWords > 1000;
    if (this.isDirty && (isNow || this.bars.marked)) {
      this.isDirty = false;
      this.bars.draw();
      this.blocks.draw();
      const isReadable = performance.now() - this.lastWords > 250;
      if (this.bars.newest && !this.bars.marked && isReadable) this.say(this.bars.newest);
    }
    requestAnimationFrame(() => this.draw());
  }
}

function describe({ phase, done, of, reason }) {
  if (reason) return `${phase}: ${reason}`;
  return of ? `${phase} ${done}/${of}` : phase;
}

function duration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  const ms = seconds * 1000;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

async function visible() {
  while (document.hidden) await once(document, "visibilitychange");
}

const once = (target, name) =>
  new Promise((resolve) => target.addEventListener(name, resolve, { once: true }));

const keyOr = (seconds) =>
  Promise.race([once(document, "key"), new Promise((resolve) => setTimeout(resolve, seconds * 1000))]);
