"""How label maps are packed in Parquet files: classes as links to neighboring cells, scores as steps.

The columns of positions and scores (see `storage`) become two columns of K maps `[rows][columns]` each, for the K classes of a cell in
the order of their scores, best first:

    token_label_links  uint16         1 to 2K: the first, second, ... of the classes of the left and the upper cell (first of the left,
                                      first of the upper, second of the left, ...; each class once) that the cell has not named yet.
                                      2K + 1: the next class of the palette that no link has named. 2K + 2 + p: position p of the palette.
                                      0: none, in an empty label
    token_label_steps  uint16, uint8  scores as integers that ascend with them: of the last class the difference to what its neighbors let
                                      expect (`_expected`), of every other one the step up from the class after it; modulo 2^16 (2^8)

The palette has the order in which links name its classes: in the map of first classes row after row, then in that of second classes, and
so on. Small numbers that come often are what an entropy coder shortens. No bit is lost. Opening a set undoes it: training pays nothing.
"""

from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa

from .columns import (
    INDEX_COLUMN,
    PALETTE_COLUMN,
    SCORES_COLUMN,
    LabelMapError,
    list_nesting,
    nested_feature,
    read_palettes,
    to_arrow,
    to_numpy,
)


LINKS_COLUMN, STEPS_COLUMN = "token_label_links", "token_label_steps"
PLAIN, PACKED = (INDEX_COLUMN, SCORES_COLUMN), (LINKS_COLUMN, STEPS_COLUMN)
MAX_K = 16  # the work grows with its square: maps with more classes a cell are stored as they are
ROWS_AT_ONCE = 512
DAMAGED = 2**16 - 1  # position of a class that cannot be found


def pack(table: pa.Table) -> pa.Table:
    """Rows of the stored form with packed maps; the same rows if these would not give back all of them."""
    if not len(table) or not _can_be_packed(table.schema):
        return table
    try:
        packed = _exchange(table, PLAIN, PACKED, _pack_rows)
        return packed if _have_equal_maps(unpack(packed), table) else table
    except (LabelMapError, IndexError):  # damaged
        return table


def unpack(table: pa.Table) -> pa.Table:
    """The inverse of `pack`; rows that are not packed stay as they are. Damaged links become positions outside the palette.

    Raises:
        LabelMapError: If a map is missing.
    """
    return _exchange(table, PACKED, PLAIN, _unpack_rows) if is_packed(table.column_names) else table


def is_packed(column_names: list[str]) -> bool:
    """Whether columns are those of packed maps."""
    return {*PACKED, PALETTE_COLUMN} <= set(column_names)


def unpacked_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """A dataset with its maps unpacked, which lie in the cache of the datasets library."""
    if not is_packed(rows.column_names):
        return rows
    features = datasets.Features.from_arrow_schema(unpack(rows.features.arrow_schema.empty_table()).schema)
    unpacked = rows.with_format("arrow").map(
        unpack, batched=True, features=features, remove_columns=list(PACKED), desc="Unpacking label maps"
    )
    return unpacked.with_format(None)


def packed_leaves(schema: pa.Schema) -> list[str]:
    """What the columns of packed maps are called within a Parquet file."""
    names = [name for name in PACKED if name in schema.names]
    return [f"{name}.{field.name}.list.element.list.element" for name in names for field in schema.field(name).type]


def _have_equal_maps(table: pa.Table, other: pa.Table) -> bool:
    """Whether maps are equal bit for bit: also where scores are NaN."""
    first, second = (to_numpy(rows[SCORES_COLUMN]).tobytes() for rows in (table, other))
    return first == second and all(table[name].equals(other[name]) for name in (INDEX_COLUMN, PALETTE_COLUMN))


def _can_be_packed(schema: pa.Schema) -> bool:
    if not {*PLAIN, PALETTE_COLUMN} <= set(schema.names):
        return False
    depth, lengths, value_type = list_nesting(schema.field(SCORES_COLUMN).type)
    return depth == 3 and None not in lengths and lengths[0] <= MAX_K and value_type in (pa.float16(), pa.uint8())


def _exchange(table: pa.Table, names: tuple[str, str], new_names: tuple[str, str], change: Callable) -> pa.Table:
    """The table with other palettes and two columns of maps in place of two. `change` gets of some rows the lengths of their palettes, the
    classes of all palettes, and the maps of both columns `(n, K, rows, columns)`, and returns the like."""
    lengths, classes = read_palettes(table)
    first, second = (_read_planes(table[name]) for name in names)
    borders, parts = np.concatenate([[0], np.cumsum(lengths)]), []
    for start in range(0, max(1, len(table)), ROWS_AT_ONCE):
        part = slice(start, min(start + ROWS_AT_ONCE, len(table)))
        some_classes = classes[borders[part.start] : borders[part.stop]]
        parts.append(change(lengths[part], some_classes, first[part], second[part]))
    lengths, classes, *maps = (np.concatenate(values) for values in zip(*parts))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    arrays = {PALETTE_COLUMN: pa.ListArray.from_arrays(offsets, pa.array(classes.astype(np.int64)))}
    old_features, features, columns = datasets.Features.from_arrow_schema(table.schema), {}, []
    for name in table.column_names:
        column, feature, new_name = arrays.get(name, table[name]), old_features[name], name
        if name in names:
            new_name, values = new_names[names.index(name)], maps[names.index(name)]
            column, feature = _planes(values) if new_names == PACKED else (to_arrow(values), _map_feature(values))
        features[new_name] = feature
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=datasets.Features(features).arrow_schema)


def _map_feature(values: np.ndarray) -> datasets.List:
    return nested_feature(values.shape[1:], str(values.dtype))


def _planes(values: np.ndarray) -> tuple[pa.StructArray, dict[str, datasets.List]]:
    """Maps `(n, K, rows, columns)` as a column of K maps, so that each of the K is compressed by itself, and its feature."""
    ranks = {str(rank): values[:, rank] for rank in range(values.shape[1])}
    arrays = [to_arrow(np.ascontiguousarray(plane)) for plane in ranks.values()]
    return pa.StructArray.from_arrays(arrays, list(ranks)), {
        rank: _map_feature(plane) for rank, plane in ranks.items()
    }


def _read_planes(column: pa.ChunkedArray) -> np.ndarray:
    """The inverse of `_planes`; also of `columns.to_arrow`."""
    if not pa.types.is_struct(column.type):
        return to_numpy(column)
    array = column.combine_chunks()
    return np.stack([to_numpy(pa.chunked_array([plane])) for plane in array.flatten()], axis=1)


def _pack_rows(
    lengths: np.ndarray, classes: np.ndarray, index: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    places, values = _places(lengths, index.astype(np.int64)), _ascending(scores)
    frequency = np.bincount(places.reshape(-1) + 1)[places + 1]  # what is named often comes first among equal scores
    order = np.argsort(-(values.astype(np.int64) << 32 | frequency), axis=1, kind="stable")
    named = np.append(classes, -1)[np.take_along_axis(places, order, axis=1)]  # -1 for none
    values = np.take_along_axis(values, order, axis=1)
    links, palettes = link_classes(named)
    return np.array([len(palette) for palette in palettes]), np.concatenate(palettes), links, score_steps(values)


def _unpack_rows(
    lengths: np.ndarray, classes: np.ndarray, links: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    order = np.lexsort((classes, np.repeat(np.arange(len(lengths)), lengths)))  # ascending in each palette
    rank = np.full(len(order) + 1, DAMAGED, dtype=np.uint32)
    rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    index = rank[_places(lengths, follow_links(links))]
    index[lengths == 0] = 0
    both = np.sort(index << 16 | climb_steps(steps), axis=1)  # the classes of a cell ascend
    return lengths, classes[order], (both >> 16).astype(np.uint16), _from_ascending(both.astype(steps.dtype))


def _places(lengths: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where positions in palettes `(n, K, rows, columns)` lie among all classes of all palettes; -1 if outside their own."""
    lengths = lengths[:, None, None, None]
    return np.where(
        (positions >= 0) & (positions < lengths), positions + np.cumsum(lengths).reshape(lengths.shape) - lengths, -1
    )


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


def score_steps(values: np.ndarray) -> np.ndarray:
    """Steps of values `(n, K, rows, columns)`, uint16 or uint8, best first."""
    steps = values.copy()
    steps[:, :-1] -= values[:, 1:]
    last = values[:, -1].transpose(1, 2, 0).astype(np.int32)  # (rows, columns, n)
    expected = np.zeros_like(last)
    expected[0, 1:], expected[1:, 0] = last[0, :-1], last[:-1, 0]
    expected[1:, 1:] = _expected(last[1:, :-1], last[:-1, 1:], last[:-1, :-1])
    steps[:, -1] -= expected.transpose(2, 0, 1).astype(values.dtype)
    return steps


def climb_steps(steps: np.ndarray) -> np.ndarray:
    """The inverse of `score_steps`."""
    values, (rows, columns) = steps.copy(), steps.shape[2:]
    last = steps[:, -1].transpose(1, 2, 0).copy()
    last[0] = last[0].cumsum(axis=0, dtype=steps.dtype)
    last[:, 0] = last[:, 0].cumsum(axis=0, dtype=steps.dtype)
    for diagonal in range(2, rows + columns - 1):
        row = np.arange(max(1, diagonal - columns + 1), min(rows, diagonal))
        column = diagonal - row
        around = last[row, column - 1], last[row - 1, column], last[row - 1, column - 1]
        last[row, column] += _expected(*(cells.astype(np.int32) for cells in around)).astype(steps.dtype)
    values[:, -1] = last.transpose(2, 0, 1)
    for rank in reversed(range(steps.shape[1] - 1)):
        values[:, rank] += values[:, rank + 1]
    return values


def _expected(left: np.ndarray, upper: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """What three neighbors let expect: of the forms tried, this left the least on maps of two ImageNet classifiers."""
    return (3 * (left + upper) - 2 * corner) >> 2


def _ascending(scores: np.ndarray) -> np.ndarray:
    """Scores as unsigned integers that ascend with them: uint8 as they are, float16 by their bits."""
    if scores.dtype == np.uint8:
        return scores
    bits = scores.view(np.uint16)
    return np.where(bits >> 15, ~bits, bits | 0x8000)


def _from_ascending(values: np.ndarray) -> np.ndarray:
    """The inverse of `_ascending`."""
    if values.dtype == np.uint8:
        return values
    return np.where(values >> 15, values & 0x7FFF, ~values).view(np.float16)
