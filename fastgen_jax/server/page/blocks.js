// KV blocks as a map: a cell is a block, or several of a large pool.

import { fit, styled } from "./palette.js";

export const CLASSES = ["free", "held", "shared", "evictable"]; // in the order of the server's digits
const WORDS = ["free", "used by one sequence", "shared by several", "evictable"];

export class Blocks {
  constructor(canvas) {
    this.canvas = canvas;
    this.cells = "";
  }

  set(blocks) {
    this.cells = blocks.cells;
    const counts = blocks.counts.map((n, i) => `${n} ${WORDS[i]}`).join(", ");
    this.canvas.setAttribute("aria-label", `KV blocks: ${counts}`);
  }

  draw() {
    const { context, width, height, ratio } = fit(this.canvas);
    if (!this.cells || !width) return;
    const snap = (value) => Math.round(value * ratio) / ratio;
    const { size, columns } = layout(this.cells.length, width, height);
    const gap = size >= 4 ? 1 : 0;
    const colours = CLASSES.map((name) => styled(`--${name}`));
    for (let i = 0; i < this.cells.length; i++) {
      const [x, y] = [snap((i % columns) * size), snap(Math.floor(i / columns) * size)];
      context.fillStyle = colours[this.cells[i]];
      context.fillRect(x, y, snap(size - gap), snap(size - gap));
    }
  }
}

// The largest square cells, up to 14 pixels, of which n fill rows of the width within the height.
function layout(n, width, height) {
  let columns = Math.ceil(width / 14);
  while (Math.ceil(n / columns) * (width / columns) > height) columns++;
  return { size: width / columns, columns };
}
