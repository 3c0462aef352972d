"""Rows with an image and a mask that become samples, and the look at all of them before training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers.utils import logging

from ..data.decoding import EncodedImage
from ..data.image_dataset import ImageDataset, with_image_column
from ..data.images import IMAGE_ERRORS, SampleError
from ..data.masks import (
    MAX_VALUE,
    UNKNOWN,
    FileFacts,
    MaskEncoding,
    is_turning_unclear,
    read_file_facts,
    read_mask,
    size_problem,
    unknown_values_problem,
)


logger = logging.get_logger(__name__)


@dataclass
class ClassCounts:
    """Pixels of each class over a dataset.

    Args:
        pixels: Of each class, int64 `(C,)`.
        pixels_where_present: All labelled pixels of the masks in which a class is, int64 `(C,)`.
        num_masks: Masks in which a class is, int64 `(C,)`.
        ignored: Pixels that do not count.
    """

    pixels: np.ndarray
    pixels_where_present: np.ndarray = field(init=False)
    num_masks: np.ndarray = field(init=False)
    ignored: int = 0

    def __post_init__(self):
        self.pixels_where_present, self.num_masks = np.zeros_like(self.pixels), np.zeros_like(self.pixels)

    def add(self, mask_pixels: np.ndarray, ignored: int) -> None:
        """Counts the pixels of each class in one mask, `(C,)`."""
        self.pixels += mask_pixels
        self.pixels_where_present += np.where(mask_pixels > 0, mask_pixels.sum(), 0)
        self.num_masks += mask_pixels > 0
        self.ignored += ignored

    @property
    def ignored_share(self) -> float:
        """Share of all pixels that do not count, in [0, 1]."""
        return self.ignored / max(1, self.ignored + int(self.pixels.sum()))

    def median_frequency_weights(self) -> list[float]:
        """Weights of the classes that make up for their frequencies: the median frequency divided by that of the class, which is its
        share of the pixels of the masks in which it is (Eigen and Fergus 2015, arXiv:1411.4734, section 6.3.2). A class that is
        nowhere has weight 1."""
        frequency = self.pixels / np.maximum(self.pixels_where_present, 1)
        is_present = self.pixels > 0
        weights = np.ones(len(frequency))
        weights[is_present] = np.median(frequency[is_present]) / frequency[is_present]
        return weights.tolist()


class MaskSurvey:
    """What is legal in masks but mostly a mistake, gathered over the rows of a dataset."""

    def __init__(self):
        self.jpegs, self.unclear, self.recolored = [], [], []  # rows
        self.colors: dict[
            int, tuple[int, list[int]]
        ] = {}  # value -> row of the first mask with a palette that has it, and its color

    def add(self, row: int, image: FileFacts, mask: FileFacts, values: np.ndarray) -> None:
        """Looks at the files of a row and the values `(height, width)` of its mask."""
        if mask.is_jpeg:
            self.jpegs.append(row)
        if is_turning_unclear(image, mask, values.shape):
            self.unclear.append(row)
        if mask.palette is None:
            return
        shown = {value: list(mask.palette[3 * value : 3 * value + 3]) for value in np.unique(values).tolist()}
        for value, color in shown.items():
            first = self.colors.setdefault(value, (row, color))
            if first[1] != color:
                self.recolored.append((row, value, color, *first))
                break

    def warn(self, name: str, num_rows: int) -> None:
        """Says what there was in the dataset `name`."""
        if self.jpegs:
            logger.warning(
                "%d of the %d %s masks are JPEG files (row %d is the first), whose compression changes class ids along borders: make "
                "them anew as PNG.", len(self.jpegs), num_rows, name, self.jpegs[0],
            )  # fmt: skip
        if self.unclear:
            logger.warning(
                "Exif turns %d of the %d %s images otherwise than their masks (row %d is the first), and sizes do not tell which masks "
                "were made of the image as it is stored. They are taken to fit the upright image: look at some of them.",
                len(self.unclear), num_rows, name, self.unclear[0],
            )  # fmt: skip
        if self.recolored:
            row, value, color, first_row, first_color = self.recolored[0]
            logger.warning(
                "%d of the %d %s masks have a palette in which a value has another color than in those before: %d is %s in row %d and %s "
                "in row %d. Do values mean the same everywhere? lvvit masks --colors goes by the colors.",
                len(self.recolored), num_rows, name, value, first_color, first_row, color, row,
            )  # fmt: skip


class SegmentationDataset(ImageDataset):
    """Decodes images and masks of a `datasets.Dataset` and transforms them together.

    Args:
        transform: Called with an image and the class ids of its pixels `(height, width)`; returns a dict of tensors.
        encoding: How mask values stand for classes.
        name: What messages call the dataset.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable,
        encoding: MaskEncoding,
        image_column: str = "image",
        mask_column: str = "mask",
        name: str = "training",
    ):
        for column in (image_column, mask_column):
            dataset = with_image_column(dataset, column)
        super().__init__(dataset, [image_column, mask_column], name)
        self.transform, self.encoding, self.mask_column = transform, encoding, mask_column
        self._table = encoding.table()

    def fetch(self, table: pa.Table, indices: list[int]) -> pa.ChunkedArray:
        """The masks, undecoded."""
        return table[self.mask_column]

    def sample(self, image: EncodedImage, fetched: pa.ChunkedArray, offset: int, index: int) -> dict[str, Any]:
        """What the transform makes of an image and its mask."""
        _, mask, problem = self._read(fetched[offset].as_py(), image.size[::-1])
        if problem:
            raise SampleError(f"Row {index} of the {self.name} data: {problem}")
        return self.transform(image.read_by(self.transform), mask)

    def mask(self, index: int) -> np.ndarray:
        """Class ids of a row, int32 `(height, width)`."""
        return self._table[read_mask(self.rows[index][self.mask_column][0].as_py())]

    def check_rows(self, decode: bool = False) -> ClassCounts:
        """Looks at every row before training: masks wholly, images as `check_all_rows` does; counts the pixels of the classes. Warns of
        what is doubtful (`MaskSurvey`). Raises a `ValueError` with the first problems found, each with its row, or if no pixel has a
        class."""
        counts, survey = ClassCounts(np.zeros(self.encoding.num_labels, dtype=np.int64)), MaskSurvey()

        def find_problems(table: pa.Table, start: int) -> list[tuple[int, str]]:
            problems = []
            for offset, (image, mask) in enumerate(zip(table[self.image_column], table[self.mask_column])):
                facts = read_file_facts(image.as_py()) if image.is_valid else FileFacts()
                values, ids, problem = self._read(mask.as_py(), facts.size, facts.orientation)
                if problem:
                    problems.append((offset, problem))
                    continue
                survey.add(start + offset, facts, read_file_facts(mask.as_py()), values)
                counted = ids[ids != self.encoding.label_ignore_index]
                counts.add(np.bincount(counted, minlength=len(counts.pixels)), ids.size - len(counted))
            return problems

        self.check_all_rows(find_problems, decode)
        if not counts.pixels.any():
            raise ValueError(
                f"No pixel of the {self.name} masks has a class: all are ignored. Masks may hold {self.encoding.describe()}; "
                "`mask_values` names others."
            )
        survey.warn(self.name, len(self))
        return counts

    def _read(
        self, value: dict[str, Any] | None, size: tuple[int, int] | None, orientation: int = 1
    ) -> tuple[np.ndarray | None, np.ndarray | None, str | None]:
        """Values and class ids of a mask, the latter int32 `(height, width)`, or what is wrong with it; `size` is the height and width it
        should have, `orientation` that of the image in its Exif data."""
        if value is None or (value["bytes"] is None and value["path"] is None):
            return None, None, "it has no mask"
        name = f"its mask {value['path'] or ''}".rstrip()
        try:
            values = read_mask(value)
        except IMAGE_ERRORS as error:
            return None, None, f"{name} cannot be used: {error}"
        if size is not None and values.shape != size:
            return None, None, f"{name} {size_problem(values.shape, size, orientation)}"
        ids = self._table[values]
        if (ids == UNKNOWN).any():
            unknown, is_jpeg = np.unique(values[ids == UNKNOWN]), read_file_facts(value).is_jpeg
            return None, None, f"{name} {unknown_values_problem(unknown, self.encoding, is_jpeg)}"
        return values, ids, None


def count_mask_values(parts: list[datasets.Dataset], column: str) -> tuple[np.ndarray, int]:
    """Pixels of each value in the masks of some rows, int64 `(65536,)`, and the number of masks that are JPEG files. Masks that cannot
    be read are passed over: `check_rows` names them."""
    pixels, jpegs = np.zeros(MAX_VALUE + 1, dtype=np.int64), 0
    for rows in parts:
        rows = with_image_column(rows, column).select_columns(column).with_format("arrow")
        for value in (value.as_py() for table in rows.iter(batch_size=64) for value in table[column]):
            try:
                counts = np.bincount(read_mask(value).ravel())
            except (*IMAGE_ERRORS, TypeError):
                continue
            pixels[: len(counts)] += counts
            jpegs += read_file_facts(value).is_jpeg
    return pixels, jpegs
