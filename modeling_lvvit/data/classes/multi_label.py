"""The label column of image data whose images have several classes, or none: in the end always a list of `ClassLabel`.

The column holds lists of class names, of class ids, or of `ClassLabel`; or text that a separator divides into names ("cat;dog"); or there is one
column of 0 and 1 for each class. Functions of this file take columns with one class of each image as well (`with_labels`, ...), so that programs
for both kinds call them alone.
"""

from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers.utils import logging

from .class_labels import MAX_NAMED, class_counts, class_ids, describe_classes, is_text, read_column, with_class_ids


logger = logging.get_logger(__name__)
MULTI_LABEL = "multi_label_classification"  # a `problem_type` of a configuration
LABEL_COLUMN = "label"  # made of one column for each class
SEPARATOR_HELP = (
    'Several classes of each image: what stands between their names where the label column is text, for example ";" in "cat;dog" (an '
    "empty text is an image of no class). Lists of names or ids need no option."
)
COLUMNS_HELP = (
    "Several classes of each image: names of columns of 0 and 1, one for each class, in place of a label column."
)


def is_multi_label(config: Any) -> bool:
    """Whether a model with this configuration gives each class a probability of its own."""
    return getattr(config, "problem_type", None) == MULTI_LABEL


def is_list(column_type: pa.DataType) -> bool:
    """Whether the values of an Arrow column are lists."""
    types = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_type(column_type) for is_type in types)


def has_lists(rows: datasets.Dataset | datasets.IterableDataset, column: str) -> bool:
    """Whether a column holds several classes of each row."""
    return column in (rows.features or ()) and is_list(rows.features.arrow_schema.field(column).type)


def class_names(rows: datasets.Dataset | datasets.IterableDataset, column: str) -> list[str]:
    """Names of the classes, by id, of a column that `with_labels` made."""
    feature = rows.features[column]
    return feature.names if isinstance(feature, datasets.ClassLabel) else feature.feature.names


def are_lists_named(rows: datasets.Dataset, column: str) -> bool:
    """Whether lists name their classes, by text or as `ClassLabel`; plain integers do not."""
    feature = rows.features[column].feature
    return isinstance(feature, datasets.ClassLabel) or not pa.types.is_integer(feature.pa_type)


def multi_hot(lists: pa.ChunkedArray | pa.Array, num_classes: int) -> torch.Tensor:
    """1 for the classes of each row, else 0: float32 `(rows, num_classes)`, from lists of class ids."""
    rows, ids = flattened(lists)
    result = torch.zeros(len(lists), num_classes)
    result[torch.from_numpy(rows), torch.from_numpy(ids.to_numpy(zero_copy_only=False).astype(np.int64))] = 1
    return result


def flattened(lists: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Row of each value, int64, and the values."""
    array = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.repeat(np.arange(len(array)), lengths), pc.list_flatten(array)


def rarest_classes(lists: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Of each row the number of that of its classes which the fewest rows have, `(rows,)` int64, -1 for none. Subsets by these numbers
    leave rare classes in (the rule of iterative stratification, Sechidis et al. 2011)."""
    places, values = flattened(lists)
    classes = pd.factorize(values.to_pandas(), sort=True)[0]
    order = np.argsort(np.bincount(classes), kind="stable")  # the rarest first
    rank = np.argsort(order)
    best = np.full(len(lists), len(order))
    np.minimum.at(best, places, rank[classes])
    return np.append(order, -1)[best]


def with_labels(
    rows: datasets.Dataset,
    name: str,
    column: str,
    like: datasets.Dataset | None = None,
    class_names: list[str] | None = None,
    may_be_missing: bool = False,
) -> datasets.Dataset:
    """Turns a column of labels into a `ClassLabel` column (see `with_class_ids`), and one of lists into lists of `ClassLabel`.

    Args, Raises: See `with_class_ids`; a `ValueError` too if rows have one class where those of `like` have several, or the other way round.
    """
    if like is not None and has_lists(rows, column) != has_lists(like, column):
        several, one = ("it", "training") if has_lists(rows, column) else ("training", "it")
        raise ValueError(
            f"Split {rows.split} of {name}: in column {column!r} {several} has several classes of each image, {one} a single one. Write both "
            "as lists."
        )
    if not has_lists(rows, column):
        _note_separator(rows, name, column)
        return with_class_ids(rows, name, column, like, class_names, may_be_missing)
    if not len(rows):
        raise ValueError(f"{name} has no rows in split {rows.split}.")
    feature = rows.features[column]
    lists = read_column(rows, column)
    if lists.null_count:
        row = pc.index(lists.is_null().combine_chunks(), True).as_py()
        raise ValueError(
            f"Row {row} of {name}, split {rows.split}, has no label in column {column!r}. An image of no class has an empty list."
        )
    places, values = flattened(lists)
    _check_values(places, values, name, column, rows.split)
    flat = _flat_rows(values, feature.feature, column, rows.split)
    like_flat = None if like is None else _flat_rows(pa.array([], pa.int64()), like.features[column].feature, column)
    flat = with_class_ids(flat, name, column, like_flat, class_names) if len(flat) else like_flat
    if flat is None:
        raise ValueError(f"No image of {name}, split {rows.split}, has a class in column {column!r}.")
    ids = read_column(flat, column).to_numpy()
    places, ids = _without_repeated(places, ids, name, column, rows.split)
    offsets = np.concatenate([[0], np.bincount(places, minlength=len(rows)).cumsum()]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids, pa.int64()))
    new_feature = datasets.List(flat.features[column])
    return rows.remove_columns(column).add_column(column, lists, feature=new_feature)


def _flat_rows(values: pa.Array, feature: Any, column: str, split: Any = None) -> datasets.Dataset:
    """One row for each value, so that they are read as those of single classes are; a second column, as rows need one."""
    features = datasets.Features({column: feature, f"{column}_place": datasets.Value("int64")})
    table = pa.table(
        [values.cast(features.arrow_schema.field(0).type), np.arange(len(values))], schema=features.arrow_schema
    )
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), split=split)


def _check_values(places: np.ndarray, values: pa.Array, name: str, column: str, split: Any) -> None:
    """Raises a `ValueError` if lists hold neither names nor ids, or look like one value of 0 or 1 for each class."""
    about = f"Column {column!r} of {name}, split {split},"
    if not (is_text(values.type) or pa.types.is_integer(values.type) or not len(values)):
        raise ValueError(f"{about} must hold lists of class names or of class ids, got lists of {values.type}.")
    if values.null_count:
        row = places[pc.index(values.is_null(), True).as_py()]
        raise ValueError(f"{about} has an empty value in the list of row {row}.")
    if is_text(values.type) or not len(values):
        return
    lengths = np.bincount(places)
    ids = values.to_numpy(zero_copy_only=False)
    if len(set(lengths.tolist())) == 1 and lengths[0] > 2 and set(np.unique(ids).tolist()) <= {0, 1}:
        raise ValueError(
            f"{about} holds {lengths[0]} values of 0 and 1 in every list, as if there were one for each class. Lists name the classes that an "
            "image has: [1, 3] for [0, 1, 0, 1]."
        )


def _without_repeated(
    places: np.ndarray, ids: np.ndarray, name: str, column: str, split: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and ids without those that a row has twice, which is said; ids of a row in their order."""
    pairs = np.unique(np.stack([places, ids]), axis=1)
    if repeated := len(places) - pairs.shape[1]:
        logger.warning(
            "Column %r of %s, split %s: lists name classes of their image more than once (%d times); each counts once.",
            column, name, split, repeated,
        )  # fmt: skip
    return pairs[0], pairs[1]


def _note_separator(rows: datasets.Dataset, name: str, column: str) -> None:
    """Warns if texts of a label column look like several names: "cat;dog" next to "cat"."""
    if not is_text(rows.features.arrow_schema.field(column).type):
        return
    names = set(read_column(rows, column).unique().drop_null().to_pylist())
    for separator in (";", "|", ","):
        parts = {part.strip() for text in names for part in text.split(separator)}
        if len(parts) < len(names):
            logger.warning(
                "Classes of %s like %r look like several names. They are taken for one class each; `label_separator` %r would divide them.",
                name, next(text for text in sorted(names) if separator in text), separator,
            )  # fmt: skip
            return


def labelled(
    rows: datasets.Dataset, name: str, column: str, separator: str | None, columns: list[str] | None
) -> datasets.Dataset:
    """Rows whose classes a separator divides (`divided`), or that have a column for each class (`joined`); else as they are."""
    return divided(joined(rows, name, columns), name, column, separator)


def check_label_options(column: str, separator: str | None, columns: list[str] | None) -> None:
    """Raises a `ValueError` if the options of labels exclude each other, or name a column twice."""
    if separator is not None and (not separator or columns is not None):
        raise ValueError(
            f"`label_separator` is a text between names in one label column, got {separator!r}"
            + (" and `label_column_names`, a column for each class: give one of them." if separator else ".")
        )
    if columns is None:
        return
    if column != LABEL_COLUMN:
        raise ValueError(f"Give `label_column_name` {column} or `label_column_names`, one column for each class.")
    if len(set(columns)) != len(columns) or len(columns) < 2:
        raise ValueError(f"`label_column_names` are at least two different columns, got {', '.join(columns)}.")


def divided(rows: datasets.Dataset, name: str, column: str, separator: str | None) -> datasets.Dataset:
    """Rows whose label column holds lists of the names that a separator divides; an empty or missing text becomes an empty list.

    Raises:
        ValueError: If the column holds no text.
    """
    if separator is None or column not in rows.column_names:
        return rows
    texts = read_column(rows, column)
    if not is_text(texts.type):
        raise ValueError(
            f"`label_separator` {separator!r} divides text, and column {column!r} of {name} holds {texts.type}. Leave it out."
        )
    lists = [[part for word in (text or "").split(separator) if (part := word.strip())] for text in texts.to_pylist()]
    feature = datasets.List(datasets.Value("string"))
    return rows.remove_columns(column).add_column(column, pa.array(lists, pa.list_(pa.string())), feature=feature)


def joined(rows: datasets.Dataset, name: str, columns: list[str] | None) -> datasets.Dataset:
    """Rows with a column `LABEL_COLUMN` of lists in place of one column of 0 and 1 for each class; `None` for rows as they are.

    Raises:
        ValueError: If a column is not there, or holds something else.
    """
    if columns is None:
        return rows
    if missing := [column for column in columns if column not in rows.column_names]:
        raise ValueError(
            f"{name} has no columns {', '.join(missing)} (`label_column_names`); it has {rows.column_names}."
        )
    table = rows.select_columns(columns).with_format("arrow")[:]
    is_shown = np.zeros((len(rows), len(columns)), dtype=bool)
    for index, column in enumerate(columns):
        values = table[column].to_pandas()
        numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
        if len(bad := np.flatnonzero((numbers != 0) & (numbers != 1))):
            raise ValueError(
                f"Column {column!r} of {name}, split {rows.split}, must hold 0 and 1 (`label_column_names`), got {values.iloc[bad[0]]} in row {bad[0]}."
            )
        is_shown[:, index] = numbers == 1
    offsets = np.concatenate([[0], is_shown.sum(axis=1).cumsum()]).astype(np.int32)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.nonzero(is_shown)[1]))
    rows = rows.remove_columns([column for column in (*columns, LABEL_COLUMN) if column in rows.column_names])
    return rows.add_column(LABEL_COLUMN, lists, feature=datasets.List(datasets.ClassLabel(names=columns)))


def label_counts(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Rows of each class, `(classes,)` int64, of a column that `with_labels` made."""
    if not has_lists(rows, column):
        return class_counts(rows, column)
    ids = flattened(read_column(rows, column))[1].to_numpy(zero_copy_only=False)
    return np.bincount(ids.astype(np.int64), minlength=len(class_names(rows, column)))


def is_unlabeled(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Which rows have no human label, bool `(n,)`, by a column that `with_labels` made: those of class -1. A list of no class is a label."""
    return np.zeros(len(rows), dtype=bool) if has_lists(rows, column) else class_ids(rows, column) < 0


def describe_labels(rows: datasets.Dataset, split: str, column: str) -> str:
    """One line about a split: images, classes, smallest and largest class; with several classes of each image also how many those are."""
    if not has_lists(rows, column):
        return describe_classes(rows, split, column)
    names, counts = class_names(rows, column), label_counts(rows, column)
    numbers = pc.list_value_length(read_column(rows, column)).to_numpy()
    present = np.flatnonzero(counts)
    if not len(numbers) or not len(present):
        return f"{split}: {len(rows):,} images, none of which has a class"
    least, most = present[counts[present].argmin()], present[counts[present].argmax()]
    without = int((numbers == 0).sum())
    text = (
        f"{split}: {len(rows):,} images, multi-label: {numbers.mean():.2f} of {len(names):,} classes an image ({numbers.min()} to "
        f"{numbers.max()}), from {counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]})"
    )
    if len(names) <= MAX_NAMED:
        text += f"; {', '.join(f'{name} {count:,}' for name, count in zip(names, counts))}"
    return f"{text}; {without:,} without any class"
