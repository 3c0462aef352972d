// What a model's outputs say: probabilities of classes, and the best classes of the cells of an image.

const BEST = 5; // classes of an image
const PER_CELL = 3; // classes of a cell
const MAX_SIDE = 480; // cells of the longer side of a segmentation, to which its scores are interpolated

/** Probabilities of scores: each class on its own where an image may have several, else such that they add up to 1. */
function probabilities(scores, isMultiLabel) {
  if (isMultiLabel) return scores.map((score) => 1 / (1 + Math.exp(-score)));
  const largest = scores.reduce((a, b) => Math.max(a, b));
  const powers = scores.map((score) => Math.exp(score - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** Indices of the largest values, the largest first. */
function largest(values, count) {
  const best = [];
  for (let index = 0; index < values.length; index += 1) {
    if (best.length === count && values[index] <= values[best[count - 1]]) continue;
    let place = best.length;
    while (place > 0 && values[best[place - 1]] < values[index]) place -= 1;
    best.splice(place, 0, index);
    best.length = Math.min(best.length, count);
  }
  return best;
}

/** The best classes of an image from its scores (classes). */
export function bestClasses(scores, isMultiLabel) {
  const shares = probabilities(scores, isMultiLabel);
  return largest(shares, BEST).map((index) => ({ index, share: shares[index] }));
}

/**
 * The best classes of cells.
 * @param {(cell: number) => Float32Array} scoresOf scores (classes) of a cell; cells are counted row by row
 * @param {number[]} box left, top, right, bottom of all cells in fractions of the image
 * @returns ids and shares are (rows, columns, depth), the best class first; strengths (rows, columns) are how far the share
 *     of the best class lies above chance, from 0 to 1
 */
function bestOfCells(scoresOf, rows, columns, classes, isMultiLabel, box) {
  const depth = Math.min(PER_CELL, classes);
  const count = rows * columns;
  const cells = { rows, columns, depth, box };
  cells.ids = new Int32Array(count * depth);
  cells.shares = new Float32Array(count * depth);
  cells.strengths = new Float32Array(count);
  const chance = isMultiLabel || classes === 1 ? 0 : 1 / classes;
  for (let cell = 0; cell < count; cell += 1) {
    const shares = probabilities(scoresOf(cell), isMultiLabel);
    largest(shares, depth).forEach((index, place) => {
      cells.ids[cell * depth + place] = index;
      cells.shares[cell * depth + place] = shares[index];
    });
    cells.strengths[cell] = Math.max(0, (cells.shares[cell * depth] - chance) / (1 - chance));
  }
  return cells;
}

/** Cells of a patch head from its scores (rows * columns, classes). */
export function patchCells(scores, [rows, columns], classes, isMultiLabel, box) {
  const scoresOf = (cell) => scores.subarray(cell * classes, (cell + 1) * classes);
  return bestOfCells(scoresOf, rows, columns, classes, isMultiLabel, box);
}

/** Cells of a segmentation from its scores (classes, h, w), interpolated to about the size at which they are shown. */
export function segmentCells(scores, [classes, h, w], height, width) {
  const factor = Math.min(1, MAX_SIDE / Math.max(height, width));
  const [rows, columns] = [height, width].map((side) => Math.max(1, Math.round(side * factor)));
  const [above, left] = [positions(rows, h), positions(columns, w)];
  const values = new Float32Array(classes);
  const scoresOf = (cell) => {
    const [y, x] = [above[Math.floor(cell / columns)], left[cell % columns]];
    for (let index = 0; index < classes; index += 1) {
      const [upper, lower] = [(index * h + y.low) * w, (index * h + y.high) * w];
      const first = scores[upper + x.low] * (1 - x.part) + scores[upper + x.high] * x.part;
      const second = scores[lower + x.low] * (1 - x.part) + scores[lower + x.high] * x.part;
      values[index] = first * (1 - y.part) + second * y.part;
    }
    return values;
  };
  return bestOfCells(scoresOf, rows, columns, classes, false, [0, 0, 1, 1]);
}

/** Between which of `length` values each of `count` lies, and how far from the lower one; both cover the same side. */
function positions(count, length) {
  return Array.from({ length: count }, (_, index) => {
    const exact = Math.min(Math.max(((index + 0.5) * length) / count - 0.5, 0), length - 1);
    const low = Math.floor(exact);
    return { low, high: Math.min(low + 1, length - 1), part: exact - low };
  });
}
