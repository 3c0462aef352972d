"""The join of a label set to the images it was made for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from transformers.utils import logging

from ..data.class_matching import same_classes
from ..data.image_keys import FILE_NAME, MAX_NAMED, ROW_PREFIX, ROWS_PER_BLOCK, ImageKeys, KeyIndex, compiled_pattern
from ..data.images import content_hash, read_content
from ..data.sources import looks_local, open_parquet, open_splits
from ..hub.file_checks import CARD
from .reader import LabelMapReader
from .storage import HASH_COLUMN, KEY_COLUMN, PALETTE_COLUMN
from .writer import DATA, RECORD


logger = logging.get_logger(__name__)
HASHED_ROWS = 64  # compared when a label set is joined


@dataclass
class JoinedLabels:
    """A label set joined to images.

    Args:
        label_maps: Maps of the images in `images`, in their order.
        images: Rows of the images that have a label, ascending; `None` for all.
        class_names: Classes that the label set counts; `None` if it does not name them.
    """

    label_maps: LabelMapReader
    images: np.ndarray | None
    class_names: list[str] | None


def read_label_keys(labels: datasets.Dataset) -> ImageKeys:
    """Keys of a label set.

    Raises:
        ValueError: If it has no column of keys.
    """
    if KEY_COLUMN not in labels.column_names:
        raise ValueError(f"The label set has no column {KEY_COLUMN!r}; it has {labels.column_names}.")
    return ImageKeys(labels, key_column=KEY_COLUMN)


def empty_labels(labels: datasets.Dataset) -> np.ndarray:
    """Which rows of a label set have an empty label, bool `(n,)`."""
    palettes = labels.select_columns(PALETTE_COLUMN).with_format("arrow")
    found = [np.zeros(0, dtype=bool)]
    for start in range(0, len(palettes), ROWS_PER_BLOCK):
        for chunk in palettes[start : start + ROWS_PER_BLOCK][PALETTE_COLUMN].chunks:
            found.append(np.asarray(chunk.value_lengths().fill_null(-1)) == 0)
    return np.concatenate(found)


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
        key_column: Column of `dataset` that holds the keys; default: see `image_keys`.
        key_pattern: Regular expression; its first group, or else what it matches, is the key on both sides.

    Raises:
        ValueError: If images have no label map, or keys are not unique; the message names them.
    """
    source = LabelMapReader(labels)
    label_keys = read_label_keys(labels)
    number_rows = bool(len(label_keys)) and label_keys[0].startswith(ROW_PREFIX)
    keys = ImageKeys(dataset, image_column, None if number_rows else key_column, number_rows)
    if number_rows and len(keys) != len(label_keys):
        raise ValueError(
            f"The label set knows its {len(label_keys)} images by their number only, but there are {len(keys)} images."
        )
    if key_pattern is not None:
        keys, label_keys = (side.cut(compiled_pattern(key_pattern)) for side in (keys, label_keys))
    row_of = _rows_of(keys, label_keys)
    _compare_files(labels, dataset, image_column, row_of, strict=number_rows)
    return _without_empty(source, labels, keys, row_of)


def _rows_of(keys: ImageKeys, label_keys: ImageKeys) -> np.ndarray | None:
    """For each image the row of its label, `None` where the orders agree."""
    hashes, label_hashes = keys.hashes(), label_keys.hashes()
    index = KeyIndex(label_keys, label_hashes)
    if duplicates := keys.duplicates(hashes):
        raise ValueError(f"Keys come more than once in the image data: {', '.join(map(repr, duplicates))}.")
    if np.array_equal(hashes, label_hashes):
        return None
    rows = index(hashes)
    if (rows == -1).all():
        rows = _rows_of_file_names(keys, label_keys, rows)
    missing = np.flatnonzero(rows == -1)
    if len(missing):
        names = ", ".join(repr(keys[int(row)]) for row in missing[:MAX_NAMED])
        example = f" like {label_keys[0]!r}" if len(label_keys) else ""
        raise ValueError(
            f"{len(missing):,} of {len(keys):,} images have no label map: {names}"
            + (", ..." if len(missing) > MAX_NAMED else "")
            + f". The label set has {len(label_keys):,} keys{example}. Other keys can be taken from a column (--key_column) "
            "or cut out of both by a regular expression (--key_pattern)."
        )
    return rows


def _rows_of_file_names(keys: ImageKeys, label_keys: ImageKeys, otherwise: np.ndarray) -> np.ndarray:
    """Rows found by file names alone, for other folders around the same files; `otherwise` if names are not unique."""
    names, label_names = keys.cut(FILE_NAME), label_keys.cut(FILE_NAME)
    hashes, label_hashes = names.hashes(), label_names.hashes()
    if len(np.unique(hashes)) < len(hashes) or len(np.unique(label_hashes)) < len(label_hashes):
        return otherwise
    return KeyIndex(label_names, label_hashes)(hashes)


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
            "resized copies, and wrong if other images have the same names.",
            len(other),
            len(images),
            other[0],
        )


def _without_empty(
    source: LabelMapReader, labels: datasets.Dataset, keys: ImageKeys, row_of: np.ndarray | None
) -> JoinedLabels:
    """Leaves out images whose label is empty."""
    empty = empty_labels(labels)
    empty = empty if row_of is None else empty[row_of]
    if not empty.any():
        return JoinedLabels(source if row_of is None else source.select(row_of), None, source.class_names)
    if empty.all():
        raise ValueError("All images have an empty label; there is nothing to train on.")
    names = [repr(keys[int(row)]) for row in np.flatnonzero(empty)[:MAX_NAMED]]
    logger.warning("%d images have an empty label and are left out: %s", empty.sum(), ", ".join(names))
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
        + ". Annotate these images again, or use the dataset that the labels were made for."
    )


def open_label_set(name: str, split: str, revision: str | None = None) -> datasets.Dataset:
    """The rows of a label set that belong to a split.

    Args:
        name: Folder or Hub name.
        split: The split of the images.
        revision: On the Hub.

    Raises:
        FileNotFoundError, ValueError: If it does not exist, is unfinished, or has no such split.
    """
    folder = Path(name).expanduser()
    if looks_local(name) and not folder.exists():
        raise FileNotFoundError(f"There is no label set at {folder.resolve()}.")
    if (folder / RECORD).is_file() and not (folder / CARD).is_file():
        raise ValueError(f"The label set in {folder} is not finished. Start the program that writes it again.")
    shards = sorted(str(path) for path in (folder / DATA).glob(f"{split}-*.parquet"))
    if shards:
        # named one by one: files that a card names by a pattern share a cache entry with those of any other folder of the
        # same name (datasets 5.2), and labels that were made again would not be noticed
        return open_parquet(shards, split)
    splits = open_splits(name, revision=revision, split=split)
    if split not in splits:
        raise ValueError(f"The label set {name} has no split {split!r}; it has {list(splits)}.")
    return splits[split]
