// Each step as a bar of its token budget: at the bottom one token of each running sequence, above them chunks
// of prompts, a sequence in the same colour all its life. The newest step is on the right.

import { colourOf, fit, styled } from "./palette.js";

const BAR = 5, GAP = 1, MAX_STEPS = 600;
const AXIS = 34; // pixels for the labels

export class Bars {
  constructor(canvas) {
    this.canvas = canvas;
    this.budget = 0;
    this.steps = [];
    this.isLinear = false;
    this.isPaused = false;
    this.marked = null; // the number of the step that the user points at
  }

  get newest() { return this.shown.at(-1); }
  get shown() { return this.held ?? this.steps; }

  add(steps) {
    this.steps.push(...steps);
    this.steps.splice(0, this.steps.length - MAX_STEPS);
  }

  clear() { this.steps = []; }

  // What is held does not move, though steps go on.
  hold(isHeld) { this.held = isHeld ? this.held ?? [...this.steps] : null; }

  get n_bars() { return Math.max(1, Math.floor((this.canvas.clientWidth - AXIS) / (BAR + GAP))); }
  get visible() { return this.shown.slice(-this.n_bars); }

  // The step under a pixel.
  at(x) {
    const visible = this.visible;
    const fromRight = Math.floor((this.canvas.clientWidth - x) / (BAR + GAP));
    return visible[visible.length - 1 - fromRight] ?? null;
  }

  // The step to the left or right of the marked one.
  beside(offset) {
    const visible = this.visible;
    const i = visible.findIndex((step) => step.number === this.marked);
    return visible[Math.min(Math.max((i < 0 ? visible.length - 1 : i) + offset, 0), visible.length - 1)];
  }

  share(n_tokens) {
    const share = Math.min(n_tokens / this.budget, 1);
    return this.isLinear ? share : Math.sqrt(share);
  }

  draw() {
    const { context, width, height, ratio } = fit(this.canvas);
    if (!this.budget || !width) return;
    const top = 8, bottom = height - 1;
    const y = (n) => Math.round((bottom - this.share(n) * (bottom - top)) * ratio) / ratio;
    this.drawAxis(context, width, y);
    const visible = this.visible;
    visible.forEach((step, i) => {
      const x = width - (visible.length - i) * (BAR + GAP);
      this.drawStep(context, step, x, y);
    });
  }

  drawAxis(context, width, y) {
    context.font = "11px " + styled("--sans");
    context.textBaseline = "middle";
    context.fillStyle = styled("--muted");
    const marks = this.isLinear ? [0.25, 0.5, 0.75, 1] : [1 / 64, 1 / 16, 1 / 4, 1];
    for (const mark of marks) {
      const n = Math.round(this.budget * mark);
      context.fillText(String(n), 0, Math.max(y(n), 6));
      context.globalAlpha = mark === 1 ? 0.9 : 0.25;
      context.fillRect(AXIS, y(n), width - AXIS, 1);
      context.globalAlpha = 1;
    }
  }

  drawStep(context, step, x, y) {
    let n = 0;
    for (const chunk of step.chunks) {
      const from = y(n), to = y((n += chunk.n_new));
      if (from === to) continue;
      context.fillStyle = colourOf(chunk.sequence);
      context.globalAlpha = chunk.isDecode ? 1 : 0.55;
      context.fillRect(x, to, BAR, from - to);
      if (!chunk.isDecode) {
        context.globalAlpha = 1;
        context.fillRect(x, to, BAR, Math.min(1.5, from - to)); // where the chunk ends
      }
    }
    context.globalAlpha = 1;
    if (step.n_padded > n) {
      context.fillStyle = styled("--padding");
      context.fillRect(x, y(step.n_padded), BAR, y(n) - y(step.n_padded));
    }
    if (step.number === this.marked) {
      context.strokeStyle = styled("--ink");
      context.strokeRect(x - 0.5, y(this.budget) - 3.5, BAR + 1, y(0) - y(this.budget) + 4);
    }
  }
}

// As the server's STEP_FIELDS have it.
export function stepOf([number, time, seconds, n_padded, n_running, n_waiting, n_preempted, flat]) {
  const chunks = [];
  for (let i = 0; i < flat.length; i += 4) {
    const [sequence, n_new, n_cached, n_tokens] = flat.slice(i, i + 4);
    chunks.push({ sequence, n_new, n_cached, n_tokens, isDecode: n_new === 1 && n_cached === n_tokens });
  }
  return { number, time, seconds, n_padded, n_running, n_waiting, n_preempted, chunks };
}

// A step in words.
export function words(step, budget) {
  const decodes = step.chunks.filter((chunk) => chunk.isDecode).length;
  const prompts = step.chunks.length - decodes;
  const n = step.chunks.reduce((sum, chunk) => sum + chunk.n_new, 0);
  const parts = [
    `step ${step.number.toLocaleString("en")}`,
    `${n} of ${budget} tokens`,
    plural(decodes, "decode"),
    plural(prompts, "prompt chunk") + (prompts ? ` of ${n - decodes}` : ""),
    `${(step.seconds * 1000).toFixed(1)} ms`,
  ];
  if (step.n_preempted) parts.push(`${step.n_preempted} preempted`);
  return parts.join(" · ");
}

const plural = (n, noun) => `${n || "no"} ${noun}${n === 1 ? "" : "s"}`;
