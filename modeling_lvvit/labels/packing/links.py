"""Classes of cells as links to those of the left and the upper cell (see the package)."""

import numpy as np


def link_classes(classes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Links of maps, and of each map its classes in the order in which links name them first.

    Args:
        classes: `(n, K, rows, columns)` int64 below 2^32, -1 for none; best first.

    Returns:
        Links of the same shape, uint16, and n arrays of classes.
    """
    k = classes.shape[1]
    around = np.pad(classes, ((0, 0), (0, 0), (1, 0), (1, 0)), constant_values=-1).swapaxes(0, 1)
    choices, free = _choices(around[:, :, 1:, :-1], around[:, :, :-1, 1:])
    links = np.zeros(classes.shape, dtype=np.uint16)
    for rank in range(k):
        hits = free & (choices == classes[:, rank])
        links[:, rank] = (np.cumsum(free, axis=0, dtype=np.uint8) * hits).sum(axis=0)
        free &= ~hits
    unlinked = np.flatnonzero((links == 0) & (classes >= 0))
    pairs = unlinked // classes[0].size << 32 | classes.reshape(-1)[unlinked]  # row, class
    pairs, first, which = np.unique(pairs, return_index=True, return_inverse=True)
    by_appearance = np.argsort(first)
    starts = np.searchsorted(pairs[by_appearance] >> 32, np.arange(len(classes) + 1))
    position = np.argsort(by_appearance) - starts[pairs >> 32]
    codes = 2 * k + 2 + position[which]
    codes[first] = 2 * k + 1
    links.reshape(-1)[unlinked] = codes
    return links, np.split(pairs[by_appearance] & 0xFFFFFFFF, starts[1:-1])


def follow_links(links: np.ndarray) -> np.ndarray:
    """Positions in the palette, the inverse of `link_classes`: `(n, K, rows, columns)` int32, -1 where there is none.

    Cells of a diagonal of the map depend on those of the diagonal before, and are followed together.
    """
    n, k, rows, columns = links.shape
    named = (links == 2 * k + 1).reshape(n, k * rows * columns)
    number = np.cumsum(named, axis=1, dtype=np.int32).reshape(links.shape) - 1
    unlinked = np.where(links == 2 * k + 1, number, links.astype(np.int32) - (2 * k + 2)).transpose(1, 2, 3, 0).copy()
    links = np.minimum(links, 2 * k + 1).astype(np.uint8).transpose(1, 2, 3, 0).copy()  # (K, rows, columns, n)
    cells = np.full((k, rows + 1, columns + 1, n), -1, dtype=np.int32)
    for diagonal in range(rows + columns - 1):
        row = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        column = diagonal - row
        choices, free = _choices(cells[:, row + 1, column], cells[:, row, column + 1])
        for rank in range(k):
            link = links[rank, row, column]
            hits = free & (np.cumsum(free, axis=0, dtype=np.uint8) == link)
            choice = np.where(hits, choices, -1).max(axis=0)
            cells[rank, row + 1, column + 1] = np.where(link > 2 * k, unlinked[rank, row, column], choice)
            free &= ~hits
    return cells[:, 1:, 1:].transpose(3, 0, 1, 2)


def _choices(left: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes of two neighbors in turn, `(K, ...)` each to `(2K, ...)`, and which of them are there and the first of their class."""
    choices = np.stack([left, upper], axis=1).reshape(2 * len(left), *left.shape[1:])
    free = choices >= 0
    for rank in range(len(left)):
        free[2 * rank] &= ~(upper[:rank] == left[rank]).any(axis=0)
        free[2 * rank + 1] &= ~(left[: rank + 1] == upper[rank]).any(axis=0)
    return choices, free
