// The cells of an image, painted over it: each in the color of its best class, more opaque the surer it is.

const PALETTE = [
  "#3b82f6", "#f97316", "#22c55e", "#e11d48", "#a855f7", "#facc15",
  "#06b6d4", "#f472b6", "#84cc16", "#b45309", "#14b8a6", "#c4b5fd",
];
const OTHER = "#d4d4d8"; // of classes beyond those of the palette
const MIN_STRENGTH = 0.1; // below it cells are about at chance, and stay bare
const OPACITY = 0.85;
const FLAT_OPACITY = 0.65;
const MAX_ROWS_OF_CURSOR = 64; // smaller cells have no frame

/**
 * The classes of cells, those that cover most cells first: index, color, and the share of the cells that they cover.
 * @param {boolean} isFlat whether all cells count alike, however sure they are: those of a segmentation
 */
export function coveringClasses(cells, classCount, isFlat) {
  const counts = new Map();
  cells.strengths.forEach((strength, cell) => {
    if (!isFlat && strength < MIN_STRENGTH) return;
    const index = cells.ids[cell * cells.depth];
    counts.set(index, (counts.get(index) ?? 0) + 1);
  });
  const order = [...counts].sort(([a, countA], [b, countB]) => countB - countA || a - b);
  const hasOwnColors = classCount <= PALETTE.length; // then a class looks the same in all images
  return order.map(([index, count], place) => ({
    index,
    color: (hasOwnColors ? PALETTE[index] : PALETTE[place]) ?? OTHER,
    share: count / cells.strengths.length,
    isNamed: hasOwnColors || place < PALETTE.length,
  }));
}

/** Places an element over a part of the picture: left, top, right, bottom in fractions. */
export function place(element, [left, top, right, bottom]) {
  element.style.left = `${100 * left}%`;
  element.style.top = `${100 * top}%`;
  element.style.width = `${100 * (right - left)}%`;
  element.style.height = `${100 * (bottom - top)}%`;
}

/**
 * Paints cells on a canvas that lies over their part of the image.
 * @param {number | null} only a class that is shown alone
 * @param {boolean} isFlat see `coveringClasses`
 */
export function paint(canvas, cells, classes, only, isFlat) {
  const colors = new Map(classes.map(({ index, color }) => [index, channels(color)]));
  canvas.width = cells.columns;
  canvas.height = cells.rows;
  place(canvas, cells.box);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(cells.columns, cells.rows);
  cells.strengths.forEach((strength, cell) => {
    const index = cells.ids[cell * cells.depth];
    if (!colors.has(index) || (!isFlat && strength < MIN_STRENGTH) || (only !== null && index !== only)) return;
    pixels.data.set([...colors.get(index), 255 * (isFlat ? FLAT_OPACITY : OPACITY * strength)], 4 * cell);
  });
  context.putImageData(pixels, 0, 0);
}

/** Frames a cell. */
export function frame(element, cells, cell) {
  element.hidden = cells.rows > MAX_ROWS_OF_CURSOR;
  const [left, top, right, bottom] = cells.box;
  const [width, height] = [(right - left) / cells.columns, (bottom - top) / cells.rows];
  const [x, y] = [left + (cell % cells.columns) * width, top + Math.floor(cell / cells.columns) * height];
  place(element, [x, y, x + width, y + height]);
}

/** The classes of a cell with their probabilities. */
export function classesOfCell({ ids, shares, depth }, cell) {
  return Array.from({ length: depth }, (_, place) => ({
    index: ids[cell * depth + place],
    share: shares[cell * depth + place],
  }));
}

function channels(color) {
  return [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
}
