"""Keys of images, and the join of a label set to the images it was made for.

The key of an image is, in this order: the value of a column that the user names; the last two parts of its path
("cat/1.jpg", which survives a move of the folder and the way through an archive or Parquet); its number, "row:17".
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .class_matching import same_classes
from .label_sets import HASH_COLUMN, KEY_COLUMN, PALETTE_COLUMN
from .label_source import LabelMapSource
from .pictures import content_hash, read_content


logger = logging.get_logger(__name__)
ROW_PREFIX = "row:"
PATH_TAIL = r"(?P<key>(?:[^/\\]+[/\\])?[^/\\]+)$"  # the last two parts
FILE_NAME = r"(?P<key>[^/\\]+)$"
MAX_NAMED = 10
HASHED_ROWS = 64  # compared when a label set is joined


def row_keys(start: int, stop: int) -> list[str]:
    """Keys of images that are known by their number only."""
    return [f"{ROW_PREFIX}{row}" for row in range(start, stop)]


def key_of_path(path: str) -> str:
    """Key of an image with a path; `zip://a/b/1.jpg::https://...` counts as `a/b/1.jpg`."""
    return re.search(PATH_TAIL, path.split("::")[0]).group("key").replace("\\", "/")


def image_keys(
    dataset: datasets.Dataset, image_column: str, key_column: str | None = None, number_rows: bool = False
) -> pa.Array:
    """Keys of all rows, strings.

    Args:
        dataset: Images.
        image_column: Name of the image column.
        key_column: Column whose values are the keys.
        number_rows: Whether rows are known by their number even where images have paths.

    Raises:
        ValueError: If `key_column` is missing or has empty values.
    """
    if number_rows:
        return pa.array(row_keys(0, len(dataset)), pa.string())
    if key_column is not None:
        if key_column not in dataset.column_names:
            raise ValueError(
                f"There is no column {key_column!r} to take keys from; the data has {dataset.column_names}."
            )
        keys = _column(dataset, key_column).cast(pa.string())
        if keys.null_count:
            raise ValueError(f"Column {key_column!r} has no value in row {keys.is_null().to_pylist().index(True)}.")
        return keys
    paths = image_paths(dataset, image_column)
    if paths is None:
        return pa.array(row_keys(0, len(dataset)), pa.string())
    return _tails(paths, PATH_TAIL)


def image_paths(dataset: datasets.Dataset, image_column: str) -> pa.Array | None:
    """Paths of all images; `None` if any has none."""
    column = _column(dataset, image_column)
    paths = column if pa.types.is_string(column.type) else column.field("path")
    return None if paths.null_count or not len(paths) else paths


def _column(dataset: datasets.Dataset, name: str) -> pa.Array:
    """A whole column. Rows in their stored order are mapped from the disk, not copied."""
    column = dataset.select_columns(name).with_format("arrow")[:][name]
    column = column.combine_chunks() if column.num_chunks <= 1 or not pa.types.is_struct(column.type) else column
    if isinstance(column, pa.ChunkedArray):  # pictures: only what keys need is put together
        paths = pa.chunked_array([chunk.field("path") for chunk in column.chunks]).combine_chunks()
        return pa.StructArray.from_arrays([paths], ["path"])
    return column


def _tails(paths: pa.Array, pattern: str) -> pa.Array:
    files = pc.replace_substring_regex(paths, "::.*$", "")
    keys = pc.extract_regex(files, pattern).field("key")
    return pc.replace_substring(keys, "\\", "/")


def duplicate_keys(keys: pa.Array) -> list[str]:
    """The first keys that come more than once."""
    counts = pc.value_counts(keys)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[:MAX_NAMED].to_pylist()


@dataclass
class JoinedLabels:
    """A label set joined to images.

    Args:
        label_maps: Maps of the images in `images`, in their order.
        images: Rows of the images that have a label, ascending; `None` for all.
        class_names: Classes that the label set counts; `None` if it does not name them.
    """

    label_maps: LabelMapSource
    images: np.ndarray | None
    class_names: list[str] | None


def join_label_set(
    labels: datasets.Dataset,
    dataset: datasets.Dataset,
    image_column: str = "image",
    key_column: str | None = None,
    key_pattern: str | None = None,
) -> JoinedLabels:
    """Finds the label map of every image, without copying images or maps.

    Where both have the same keys in the same order, image i has map i; else an index of keys is made. Images whose label
    is empty (they could not be read when the set was made) are left out with a warning. Some files are compared with the
    hashes of those that were annotated.

    Args:
        labels: Label set (see `label_sets`).
        dataset: Images, all rows of the split in their stored order.
        image_column: Name of the image column.
        key_column: Column of `dataset` that holds the keys; default: see the head of this module.
        key_pattern: Regular expression (RE2); its first group, or else what it matches, is the key on both sides.

    Raises:
        ValueError: If images have no label map, or keys are not unique; the message names them.
    """
    source = LabelMapSource(labels)
    if KEY_COLUMN not in labels.column_names:
        raise ValueError(f"The label set has no column {KEY_COLUMN!r}; it has {labels.column_names}.")
    label_keys = _column(labels, KEY_COLUMN)
    number_rows = bool(len(label_keys)) and label_keys[0].as_py().startswith(ROW_PREFIX)
    keys = image_keys(dataset, image_column, key_column, number_rows)
    if number_rows and len(keys) != len(label_keys):
        raise ValueError(
            f"The label set knows its {len(label_keys)} images by their number only, but there are {len(keys)} images."
        )
    if key_pattern is not None:
        keys, label_keys = (_matches(side, key_pattern) for side in (keys, label_keys))
    row_of = _rows_of(keys, label_keys)
    _compare_files(labels, dataset, image_column, row_of, strict=number_rows)
    return _without_empty(source, labels, keys, row_of)


def _rows_of(keys: pa.Array, label_keys: pa.Array) -> np.ndarray | None:
    """For each image the row of its label, `None` where the orders agree."""
    if keys.equals(label_keys) and not duplicate_keys(keys):
        return None
    found = pc.index_in(keys, value_set=label_keys)
    if found.null_count == len(keys):  # other folders around the same files
        names, label_names = (_tails(side, FILE_NAME) for side in (keys, label_keys))
        if not duplicate_keys(names) and not duplicate_keys(label_names):
            keys, label_keys = names, label_names
            found = pc.index_in(keys, value_set=label_keys)
    for side, name in ((label_keys, "label set"), (keys, "image data")):
        if duplicates := duplicate_keys(side):
            raise ValueError(f"Keys come more than once in the {name}: {', '.join(map(repr, duplicates))}.")
    if found.null_count:
        missing = keys.filter(found.is_null())
        raise ValueError(
            f"{len(missing):,} of {len(keys):,} images have no label map: "
            + ", ".join(map(repr, missing[:MAX_NAMED].to_pylist()))
            + (", ..." if len(missing) > MAX_NAMED else "")
            + f". The label set has {len(label_keys):,} keys like {label_keys[0].as_py()!r}. Other keys can be taken from a "
            "column (--key_column) or cut out of both by a regular expression (--key_pattern)."
        )
    return found.to_numpy().astype(np.int64)


def _matches(keys: pa.Array, pattern: str) -> pa.Array:
    """The part of each key that a pattern matches."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--key_pattern {pattern!r} is no regular expression: {error}.") from error
    # the library wants a named group; the user's first group, if there is one, is the key
    named = f"(?P<key>{pattern})" if not expression.groups else pattern.replace("(", "(?P<key>", 1)
    parts = pc.extract_regex(keys, named)
    if parts.null_count:
        raise ValueError(
            f"--key_pattern {pattern!r} does not match the key {keys.filter(parts.is_null())[0].as_py()!r}."
        )
    return parts.field("key")


def _compare_files(
    labels: datasets.Dataset, dataset: datasets.Dataset, image_column: str, row_of: np.ndarray | None, strict: bool
) -> None:
    """Compares some files with the hashes of those that were annotated."""
    if HASH_COLUMN not in labels.column_names or not len(dataset):
        return
    images = np.unique(np.linspace(0, len(dataset) - 1, HASHED_ROWS).astype(np.int64))
    rows = images if row_of is None else row_of[images]
    hashes = labels.select_columns(HASH_COLUMN).with_format("arrow")[rows.tolist()][HASH_COLUMN].to_pylist()
    values = dataset.select_columns(image_column).with_format("arrow")[images.tolist()][image_column]
    other = []
    for image, value, expected in zip(images.tolist(), values, hashes):
        value = value.as_py() if isinstance(value, pa.StructScalar) else {"bytes": None, "path": value.as_py()}
        is_remote = value is not None and value["bytes"] is None and "://" in (value["path"] or "")
        if expected is None or value is None or is_remote:
            continue
        try:
            if content_hash(read_content(value)) != expected:
                other.append(image)
        except (OSError, ValueError):  # the check of all rows names it
            continue
    if other and strict:
        raise ValueError(
            f"The label set knows images by their number only, and {len(other)} of {len(images)} images looked at are not "
            f"those that were annotated, first row {other[0]}. Was the data reordered or changed?"
        )
    if other:
        logger.warning(
            "%d of %d image files looked at are not byte for byte those that were annotated (first row %d). That is fine for "
            "resized copies, and wrong if other pictures have the same names.",
            len(other),
            len(images),
            other[0],
        )


def _without_empty(
    source: LabelMapSource, labels: datasets.Dataset, keys: pa.Array, row_of: np.ndarray | None
) -> JoinedLabels:
    """Leaves out images whose label is empty."""
    lengths = pc.list_value_length(_column(labels, PALETTE_COLUMN))
    empty = np.asarray(pc.fill_null(pc.equal(lengths, 0), False))
    empty = empty if row_of is None else empty[row_of]
    if not empty.any():
        return JoinedLabels(source if row_of is None else source.select(row_of), None, source.class_names)
    names = keys.take(pa.array(np.flatnonzero(empty)[:MAX_NAMED])).to_pylist()
    logger.warning("%d images have an empty label and are left out: %s", empty.sum(), ", ".join(map(repr, names)))
    images = np.flatnonzero(~empty)
    rows = images if row_of is None else row_of[images]
    return JoinedLabels(source.select(rows), images, source.class_names)


def check_class_names(label_names: Sequence[str] | None, dataset_names: Sequence[str]) -> None:
    """Makes sure that ids of a label set and of image data mean the same classes.

    Raises:
        ValueError: If their class names differ; the message names where.
    """
    if label_names is None or same_classes(label_names, dataset_names):
        return
    differing = [
        f"{index}: {label_name!r} in the label set, {name!r} in the data"
        for index, (label_name, name) in enumerate(zip(label_names, dataset_names))
        if label_name != name
    ]
    raise ValueError(
        f"The label set has {len(label_names)} classes, the data has {len(dataset_names)}, and they are not the same ones"
        + (": " + "; ".join(differing[:MAX_NAMED]) if differing else "")
        + ". Annotate these images again, or use the data set that the labels were made for."
    )
