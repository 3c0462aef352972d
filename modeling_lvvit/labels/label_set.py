"""A label set: dense labels of images, stored apart from them and found by their keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from ..data.files.digests import damaged_files
from ..data.image_keys import (
    MAX_NAMED,
    ROW_PREFIX,
    Strings,
    cut_keys,
    file_names,
    find_keys,
    hash_keys,
    have_equal_keys,
    read_keys,
    repeated_keys,
)
from ..data.images import content_hash, read_content
from ..data.reduced_copy.record import SOURCE_HASH
from ..data.sources import looks_local, open_parquet, open_splits
from ..finite import listed
from ..hub.file_checks import CARD
from .packing import unpacked_rows
from .reader import LabelMapReader, label_class_names
from .storage import EPOCH_COLUMN, HASH_COLUMN, KEY_COLUMN, PALETTE_COLUMN
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


class LabelSet:
    """Label maps of the images of one split, rows of the stored form (see `storage`), each with the key of its image."""

    def __init__(self, rows: datasets.Dataset):
        if KEY_COLUMN not in rows.column_names:
            raise ValueError(f"The label set has no column {KEY_COLUMN!r}; it has {rows.column_names}.")
        self.rows = unpacked_rows(rows)
        self.class_names = label_class_names(rows)

    @classmethod
    def open(cls, name: str, split: str, revision: str | None = None) -> "LabelSet":
        """The part of a label set, a folder or Hub name, that belongs to a split of the images.

        Raises:
            FileNotFoundError, ValueError: If it does not exist, is unfinished or damaged, or has no such split.
        """
        folder = Path(name).expanduser()
        if looks_local(name) and not folder.exists():
            raise FileNotFoundError(f"There is no label set at {folder.resolve()}.")
        if (folder / RECORD).is_file() and not (folder / CARD).is_file():
            raise ValueError(f"The label set in {folder} is not finished. Start the program that writes it again.")
        shards = sorted(str(path) for path in (folder / DATA).glob(f"{split}-*.parquet"))
        if problems := damaged_files(folder):
            raise ValueError(
                f"The label set in {folder} is not as it was written: {listed(problems)}. Start the program that wrote it again: it makes "
                "what is damaged anew."
            )
        if shards:
            # named one by one: files that a card names by a pattern share a cache entry with those of any other folder of
            # the same name (datasets 5.2), and labels that were made again would not be noticed
            return cls(open_parquet(shards, split))
        splits = open_splits(name, revision=revision, split=split)
        if split not in splits:
            raise ValueError(f"The label set {name} has no split {split!r}; it has {list(splits)}.")
        return cls(splits[split])

    @cached_property
    def keys(self) -> Strings:
        """Keys of the images, in the order of the rows."""
        return read_keys(self.rows, key_column=KEY_COLUMN)

    @property
    def is_of_crops(self) -> bool:
        """Whether the maps are of training crops (`crops.join_crops`), not of whole images."""
        return EPOCH_COLUMN in self.rows.column_names

    @property
    def knows_numbers_only(self) -> bool:
        """Whether the keys are numbers of images."""
        return bool(len(self.keys)) and self.keys[0].as_py().startswith(ROW_PREFIX)

    @property
    def is_empty(self) -> np.ndarray:
        """Which rows have an empty label, bool `(n,)`."""
        palettes = self.rows.select_columns(PALETTE_COLUMN).with_format("arrow")[:][PALETTE_COLUMN]
        return pc.fill_null(pc.equal(pc.list_value_length(palettes), 0), False).to_numpy()

    def join(
        self,
        dataset: datasets.Dataset,
        image_column: str = "image",
        key_column: str | None = None,
        key_pattern: str | None = None,
    ) -> JoinedLabels:
        """Finds the label map of every image, without copying images or maps.

        Where both have the same keys in the same order, image i has map i. Images whose label is empty (they could not be
        read when the set was made) are left out with a warning. Some files are compared with the hashes of those that were
        annotated.

        Args:
            dataset: Images, all rows of the split in their stored order.
            key_column: Column of `dataset` that holds the keys; default: see `image_keys`.
            key_pattern: Regular expression; its first group, or else what it matches, is the key on both sides.

        Raises:
            ValueError: If images have no label map, or keys are not unique; the message names them.
        """
        if self.is_of_crops:
            raise ValueError(
                "This label set has labels of training crops, which belong to the rows of one training run."
            )
        has_numbers, label_keys = self.knows_numbers_only, self.keys
        keys = read_keys(dataset, image_column, None if has_numbers else key_column, has_numbers)
        if has_numbers and len(keys) != len(label_keys):
            raise ValueError(
                f"The label set knows its {len(label_keys)} images by their number only, but there are {len(keys)} images."
            )
        if key_pattern is not None:
            keys, label_keys = (cut_keys(side, key_pattern) for side in (keys, label_keys))
        row_of = _find_rows(keys, label_keys)
        self.compare_files(dataset, image_column, row_of, is_strict=has_numbers)
        label_maps, is_empty = LabelMapReader(self.rows, row_of=row_of), self.is_empty
        is_empty = is_empty if row_of is None else is_empty[row_of]
        if not is_empty.any():
            return JoinedLabels(label_maps, None, self.class_names)
        _check_some_labels(is_empty)
        names = [repr(keys[row].as_py()) for row in np.flatnonzero(is_empty)[:MAX_NAMED].tolist()]
        logger.warning("%d images have an empty label and are left out: %s", is_empty.sum(), ", ".join(names))
        images = np.flatnonzero(~is_empty)
        return JoinedLabels(label_maps.select(images), images, self.class_names)

    def compare_files(
        self, dataset: datasets.Dataset, image_column: str, row_of: np.ndarray | None, is_strict: bool
    ) -> None:
        """Compares some files with the hashes of those that were annotated.

        Args:
            row_of: For each image the row of its label; `None` where the orders agree.
            is_strict: Whether other files are refused; else they are warned of. Reduced copies of the files that were annotated are
                these files, too.

        Raises:
            ValueError: If they are.
        """
        others, number = self.other_files(dataset, image_column, row_of), min(len(dataset), HASHED_ROWS)
        if others and is_strict:
            raise ValueError(
                f"The label set knows images by their number only, and {len(others)} of {number} images looked at are "
                f"not those that were annotated, first row {others[0]}. Was the data reordered or changed?"
            )
        if others:
            text = (
                "%d of %d image files looked at are not byte for byte those that were annotated (first row %d). That is fine "
                "for resized copies, and wrong if other images have the same names."
            )
            logger.warning(text, len(others), number, others[0])

    def other_files(
        self, dataset: datasets.Dataset, image_column: str, row_of: np.ndarray | None, may_be_copies: bool = True
    ) -> list[int]:
        """Rows of some images, spread over the data, that are not those that were annotated.

        Args:
            row_of: As in `compare_files`.
            may_be_copies: Whether an image counts by the file that `lvvit cache` has made it of, too.
        """
        if HASH_COLUMN not in self.rows.column_names or not len(dataset):
            return []
        images = np.unique(np.linspace(0, len(dataset) - 1, HASHED_ROWS).astype(np.int64)).tolist()
        rows = images if row_of is None else row_of[images].tolist()
        hashes = self.rows.select_columns(HASH_COLUMN).with_format("arrow")[rows][HASH_COLUMN].to_pylist()
        names = [image_column, *([SOURCE_HASH] if may_be_copies and SOURCE_HASH in dataset.column_names else [])]
        table = dataset.select_columns(names).with_format("arrow")[images]
        sources = table[SOURCE_HASH].to_pylist() if len(names) > 1 else [None] * len(images)
        others = []
        for image, value, source, expected in zip(images, table[image_column], sources, hashes):
            value = value.as_py() if isinstance(value, pa.StructScalar) else {"bytes": None, "path": value.as_py()}
            is_remote = value is not None and value["bytes"] is None and "://" in (value["path"] or "")
            if expected in (None, source) or value is None or is_remote:
                continue
            try:
                if content_hash(read_content(value)) != expected:
                    others.append(image)
            except (OSError, ValueError):  # the check of all rows names it
                continue
        return others


class LabelLookup:
    """Finds the label maps of images that come one after another; `key_pattern` as in `LabelSet.join`.

    Raises:
        ValueError: If keys come more than once, or are row numbers, which a stream does not know.
    """

    def __init__(self, labels: LabelSet, key_pattern: str | None = None):
        if labels.is_of_crops:
            raise ValueError(
                "The label set has labels of training crops, which belong to numbered rows, and a stream does not number its images. Train "
                "without `streaming`."
            )
        if labels.knows_numbers_only:
            raise ValueError(
                "The label set knows images by their row number, which a stream does not tell. Annotate with keys from a column "
                "(`key_column`), or train without `streaming`."
            )
        self.label_maps, self.key_pattern = LabelMapReader(labels.rows), key_pattern
        keys = self._cut(labels.keys)
        _check_distinct(keys, "label set")
        self.rows, self.is_empty = pd.Index(hash_keys(keys)), labels.is_empty
        _check_some_labels(self.is_empty)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Rows of the maps of images, `(n,)` int64; -1 for a key that is not there."""
        return self.rows.get_indexer(hash_keys(self._cut(pa.array(keys, pa.string()))))

    def _cut(self, keys: Strings) -> Strings:
        return keys if self.key_pattern is None else cut_keys(keys, self.key_pattern)


def _find_rows(keys: Strings, label_keys: Strings) -> np.ndarray | None:
    """For each image the row of its label, `None` where the orders agree."""
    _check_distinct(label_keys, "label set")
    if have_equal_keys(keys, label_keys):
        return None
    _check_distinct(keys, "image data")
    rows = find_keys(keys, label_keys)
    if (rows == -1).all():  # perhaps there are other folders around the same files
        names, label_names = file_names(keys), file_names(label_keys)
        if not repeated_keys(names) and not repeated_keys(label_names):
            rows = find_keys(names, label_names)
    missing = np.flatnonzero(rows == -1)
    if len(missing):
        names = ", ".join(repr(keys[row].as_py()) for row in missing[:MAX_NAMED].tolist())
        example = f" like {label_keys[0].as_py()!r}" if len(label_keys) else ""
        raise ValueError(
            f"{len(missing):,} of {len(keys):,} images have no label map: {names}"
            + (", ..." if len(missing) > MAX_NAMED else "")
            + f". The label set has {len(label_keys):,} keys{example}. Other keys can be taken from a column (`key_column`) "
            "or cut out of both by a regular expression (`key_pattern`)."
        )
    return rows


def _check_distinct(keys: Strings, name: str) -> None:
    if duplicates := repeated_keys(keys):
        raise ValueError(f"Keys come more than once in the {name}: {', '.join(map(repr, duplicates))}.")


def _check_some_labels(is_empty: np.ndarray) -> None:
    if is_empty.all():
        raise ValueError("All images have an empty label; there is nothing to train on.")
