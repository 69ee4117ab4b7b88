// Colours of sequences: hues that people with any kind of colour vision tell apart (after Okabe and Ito),
// neighbours far from each other in lightness too. The rest is the style sheet's.

const HUES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#a3a136"];

export const colourOf = (sequence) => HUES[sequence % HUES.length];

// A custom property of the style sheet, as it is now: dark mode changes them.
export const styled = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Makes a canvas as sharp as the screen; returns its context, in CSS pixels, and its size.
export function fit(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height, ratio };
}
