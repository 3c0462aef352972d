"""Image datasets: open, decode, splits, classes, keys, masks, seeds and atomic files."""
