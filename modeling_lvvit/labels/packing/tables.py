"""Rows of label sets with their maps packed, and unpacked again."""

from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa

from ..columns import (
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
from .links import follow_links, link_classes
from .steps import ascending, climb_steps, from_ascending, score_steps


LINKS_COLUMN, STEPS_COLUMN = "token_label_links", "token_label_steps"
PLAIN, PACKED = (INDEX_COLUMN, SCORES_COLUMN), (LINKS_COLUMN, STEPS_COLUMN)
MAX_K = 16  # classes of a cell: the work grows with their square
MIN_CLASSES = 17  # of the set: where cells name most of few classes, their positions take little room as they are
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


def is_worth_packing(k: int, num_classes: int) -> bool:
    """Whether files of a set whose cells name k of the classes have packed maps."""
    return k <= MAX_K and num_classes >= MIN_CLASSES


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
    if list_nesting(schema.field(PALETTE_COLUMN).type) != (1, [None], pa.int64()):
        return False
    depth, lengths, value_type = list_nesting(schema.field(SCORES_COLUMN).type)
    if depth != 3 or None in lengths or value_type not in (pa.float16(), pa.uint8()):
        return False
    palette = datasets.Features.from_arrow_schema(schema)[PALETTE_COLUMN].feature
    return is_worth_packing(lengths[0], getattr(palette, "num_classes", MIN_CLASSES))


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
    features = {rank: _map_feature(plane) for rank, plane in ranks.items()}
    return pa.StructArray.from_arrays(arrays, list(ranks)), features


def _read_planes(column: pa.ChunkedArray) -> np.ndarray:
    """The inverse of `_planes`; also of `columns.to_arrow`."""
    if not pa.types.is_struct(column.type):
        return to_numpy(column)
    array = column.combine_chunks()
    return np.stack([to_numpy(pa.chunked_array([plane])) for plane in array.flatten()], axis=1)


def _pack_rows(
    lengths: np.ndarray, classes: np.ndarray, index: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    places, values = _places(lengths, index.astype(np.int64)), ascending(scores)
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
    return lengths, classes[order], (both >> 16).astype(np.uint16), from_ascending(both.astype(steps.dtype))


def _places(lengths: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Where positions in palettes `(n, K, rows, columns)` lie among all classes of all palettes; -1 if outside their own."""
    lengths = lengths[:, None, None, None]
    return np.where(
        (positions >= 0) & (positions < lengths), positions + np.cumsum(lengths).reshape(lengths.shape) - lengths, -1
    )
