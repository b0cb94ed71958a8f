// Which blocks of the context the sparse layers selected for the newest token.

const figure = document.getElementById("strip");
const canvas = document.getElementById("strip-canvas");
const caption = document.getElementById("strip-caption");

let last = null;

/** Shows a report `{blocks: [selections per block], block_size}`; hides the strip without one. */
export function showBlocks(report) {
  const usable = Array.isArray(report?.blocks) && report.blocks.length > 0;
  if (report && !usable) return;
  last = report ?? null;
  figure.hidden = !usable;
  if (!usable) return;
  const chosen = report.blocks.filter((count) => count > 0).length;
  caption.textContent =
    `Attention for the newest token: ${chosen} of ${report.blocks.length} blocks` +
    ` of ${report.block_size} tokens, oldest on the left`;
  draw(report.blocks);
}

function draw(blocks) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * scale));
  const height = Math.round(18 * scale);
  canvas.width = width;
  canvas.height = height;
  const styles = getComputedStyle(figure);
  const context = canvas.getContext("2d");
  const most = Math.max(...blocks, 1);
  const columns = Math.min(blocks.length, width); // more blocks than pixels: a column shows its busiest one
  const gap = width / columns >= 4 * scale ? scale : 0;
  for (let column = 0; column < columns; column += 1) {
    const from = Math.floor((column * blocks.length) / columns);
    const to = Math.max(from + 1, Math.floor(((column + 1) * blocks.length) / columns));
    const count = Math.max(...blocks.slice(from, to));
    const left = (column * width) / columns;
    context.globalAlpha = count > 0 ? 0.35 + (0.65 * count) / most : 1;
    context.fillStyle = styles.getPropertyValue(count > 0 ? "--hot" : "--cold");
    context.fillRect(left, 0, width / columns - gap, height);
  }
}

const redraw = () => last && draw(last.blocks);
window.addEventListener("resize", redraw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
