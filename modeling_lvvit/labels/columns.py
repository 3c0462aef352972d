"""How label maps lie in a table: column features, Arrow to NumPy and back, and checks of whole columns.

A map is a nested list of fixed lengths (K, rows, columns), so that the schema itself tells its shape. The fixed lengths
also make reading cheap: a batch of rows becomes one NumPy array without a Python list.
"""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


IDS_COLUMN, SCORES_COLUMN = "token_label_ids", "token_label_scores"
PALETTE_COLUMN, INDEX_COLUMN = "token_label_palette", "token_label_index"  # of label sets, see `storage`


class LabelMapError(ValueError):
    """A label map cannot be read; `row` counts from the start of the column."""

    def __init__(self, row: int, text: str):
        super().__init__(text)
        self.row = row


def label_map_features(k: int, rows: int, columns: int, id_type: str) -> datasets.Features:
    """Features of the two dense-label columns; `id_type` is `"int16"` or `"int32"`."""
    shape = (k, rows, columns)
    return datasets.Features(
        {IDS_COLUMN: nested_feature(shape, id_type), SCORES_COLUMN: nested_feature(shape, "float16")}
    )


def nested_feature(shape: tuple[int, ...], value_type: str) -> datasets.List:
    """A nested list of fixed lengths, `[K][rows][columns]` for a label map."""
    feature = datasets.Value(value_type)
    for length in reversed(shape):
        feature = datasets.List(feature, length=length)
    return feature


def to_arrow(maps: np.ndarray) -> pa.FixedSizeListArray:
    """`(num_images, K, rows, columns)` to a column of nested fixed-length lists."""
    array = pa.array(maps.reshape(-1))
    for length in reversed(maps.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array


def list_nesting(column_type: pa.DataType) -> tuple[int, list[int | None], pa.DataType]:
    """Depth, lengths (`None` where they vary) and value type of a nested list type; Array3D columns included."""
    if isinstance(column_type, pa.ExtensionType):
        depth, _, value_type = list_nesting(column_type.storage_type)
        return depth, list(getattr(column_type, "shape", ())) or [None] * depth, value_type
    lengths = []
    while isinstance(column_type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        lengths.append(column_type.list_size if pa.types.is_fixed_size_list(column_type) else None)
        column_type = column_type.value_type
    return len(lengths), lengths, column_type


def to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    """A dense-label column as `(num_rows, K, rows, columns)`; the value type is kept.

    Raises:
        LabelMapError: If a row is missing or has missing parts, or rows have different shapes; names the first such row.
    """
    array = column.combine_chunks()
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    shape, per_row = [len(array)], 1  # items of the present level that belong to one row
    while isinstance(array, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        _refuse_missing(array, per_row)
        if isinstance(array, pa.FixedSizeListArray):  # the type says that all lengths are equal
            length = array.type.list_size
        else:
            lengths = pc.list_value_length(array)
            length = lengths[0].as_py() if len(lengths) else 0
            odd = pc.index(pc.not_equal(lengths, length), True).as_py()
            if odd >= 0:
                difference = f"(a length of {lengths[odd]}, not {length})"
                text = f"its label map has another shape than that of the first row {difference}"
                raise LabelMapError(odd // per_row, text)
        shape.append(length)
        per_row *= length
        array = array.flatten()
    _refuse_missing(array, per_row)
    return array.to_numpy(zero_copy_only=False).reshape(shape)


def read_palettes(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Length of each palette, `(n,)`, and all their classes one after another; a `LabelMapError` if one is missing."""
    palettes = table[PALETTE_COLUMN].combine_chunks()
    if palettes.null_count:
        raise LabelMapError(palettes.is_null().to_pylist().index(True), "it has no palette")
    lengths = np.asarray(palettes.value_lengths()).astype(np.int64)
    return lengths, palettes.flatten().to_numpy(zero_copy_only=False)


def _refuse_missing(array: pa.Array, per_row: int) -> None:
    if array.null_count:
        missing = pc.index(array.is_null(), True).as_py()
        raise LabelMapError(missing // max(per_row, 1), "it has no label map, or one with missing parts")


def check_column_types(ids_type: pa.DataType, scores_type: pa.DataType) -> None:
    """Checks what the schema alone tells.

    Raises:
        ValueError: If a column is not a three-fold nested list, ids are not integers, scores are not floating point,
            or the fixed lengths of the two differ.
    """
    shapes = []
    for name, column_type, is_value in (
        (IDS_COLUMN, ids_type, pa.types.is_integer),
        (SCORES_COLUMN, scores_type, pa.types.is_floating),
    ):
        depth, lengths, value_type = list_nesting(column_type)
        if depth != 3:
            raise ValueError(
                f"`{name}` must be a nested list [K][rows][columns] (rank 3), got rank {depth}: {column_type}."
            )
        if not is_value(value_type):
            raise ValueError(f"`{name}` must hold {'integers' if name == IDS_COLUMN else 'floats'}, got {value_type}.")
        shapes.append(lengths)
    if any(a is not None and b is not None and a != b for a, b in zip(*shapes)):
        raise ValueError(
            f"`{IDS_COLUMN}` and `{SCORES_COLUMN}` must have the same [K, rows, columns], got {shapes[0]} and {shapes[1]}."
        )


def label_map_problems(ids: np.ndarray, scores: np.ndarray, num_classes: int) -> list[tuple[int, str]]:
    """Row offsets and descriptions of what is wrong in a batch of maps, `(num_rows, K, rows, columns)` each."""
    if ids.shape != scores.shape:
        return [(0, f"ids have [K, rows, columns] {list(ids.shape[1:])}, scores {list(scores.shape[1:])}")]
    if not 1 <= ids.shape[1] <= num_classes or ids[0].size == 0:
        return [
            (0, f"a map of [K, rows, columns] {list(ids.shape[1:])} needs 1 <= K <= {num_classes} classes and cells")
        ]
    outside, ranked = (ids < 0) | (ids >= num_classes), np.sort(ids, axis=1)
    flags = {
        f"class id {{}} is outside [0, {num_classes})": outside,
        "scores are NaN or infinite": ~np.isfinite(scores),
        "scores are beyond the float16 range (65504)": np.abs(scores, dtype=np.float32) > np.finfo(np.float16).max,
        "a cell names a class twice": ranked[:, 1:] == ranked[:, :-1],
    }
    return [
        (row, text.format(*ids[row][outside[row]][:1]))
        for text, flagged in flags.items()
        for row in np.flatnonzero(flagged.any(axis=(1, 2, 3))).tolist()
    ]


def scale_problems(scores: np.ndarray, num_classes: int) -> list[tuple[int, str]]:
    """Rows of maps `(num_rows, K, rows, columns)` in which no score exceeds 0, which classes have that a cell does not name; maps of zeros,
    which say nothing, are none of them."""
    if scores.shape[1] >= num_classes:
        return []
    text = (
        "no score of its map is above 0, the score of the classes that a cell does not name: name every class, or add a number to all scores "
        "(about 10 to logarithms of probabilities)"
    )
    highest, lowest = (ends(axis=(1, 2, 3)) for ends in (scores.max, scores.min))
    return [(row, text) for row in np.flatnonzero((highest <= 0) & (lowest < 0)).tolist()]
