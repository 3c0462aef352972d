"""Rows with an image and a mask that become samples, and the look at all of them before training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from ..data.image_dataset import ImageDataset, with_image_column
from ..data.images import IMAGE_ERRORS, SampleError, read_image_size
from ..data.masks import MAX_VALUE, UNKNOWN, MaskEncoding, read_mask


MAX_LISTED_VALUES = 10


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

    def median_frequency_weights(self) -> list[float]:
        """Weights of the classes that make up for their frequencies: the median frequency divided by that of the class, which is its
        share of the pixels of the masks in which it is (Eigen and Fergus 2015, arXiv:1411.4734, section 6.3.2). A class that is
        nowhere has weight 1."""
        frequency = self.pixels / np.maximum(self.pixels_where_present, 1)
        is_present = self.pixels > 0
        weights = np.ones(len(frequency))
        weights[is_present] = np.median(frequency[is_present]) / frequency[is_present]
        return weights.tolist()


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

    def sample(self, image: Image.Image, fetched: pa.ChunkedArray, offset: int, index: int) -> dict[str, torch.Tensor]:
        """What the transform makes of an image and its mask."""
        mask, problem = self._read(fetched[offset].as_py(), (image.height, image.width))
        if problem:
            raise SampleError(f"Row {index} of the {self.name} data: {problem}")
        return self.transform(image, mask)

    def mask(self, index: int) -> np.ndarray:
        """Class ids of a row, int32 `(height, width)`."""
        return self._table[read_mask(self.rows[index][self.mask_column][0].as_py())]

    def check_rows(self, decode: bool = False) -> ClassCounts:
        """Looks at every row before training: masks wholly, images as `check_all_rows` does; counts the pixels of the classes. Raises a
        `ValueError` with the first problems found, each with its row, or if no pixel has a class."""
        counts = ClassCounts(np.zeros(self.encoding.num_labels, dtype=np.int64))

        def find_problems(table: pa.Table, start: int) -> list[tuple[int, str]]:
            problems = []
            for offset, (image, mask) in enumerate(zip(table[self.image_column], table[self.mask_column])):
                size = read_image_size(image.as_py()) if image.is_valid else None
                ids, problem = self._read(mask.as_py(), size)
                if problem:
                    problems.append((offset, problem))
                    continue
                counted = ids[ids != self.encoding.label_ignore_index]
                counts.add(np.bincount(counted, minlength=len(counts.pixels)), ids.size - len(counted))
            return problems

        self.check_all_rows(find_problems, decode)
        if not counts.pixels.any():
            raise ValueError(
                f"No pixel of the {self.name} masks has a class: all are ignored. Masks may hold {self.encoding.describe()}; "
                "`mask_values` names others."
            )
        return counts

    def _read(
        self, value: dict[str, Any] | None, size: tuple[int, int] | None
    ) -> tuple[np.ndarray | None, str | None]:
        """Class ids of a mask, int32 `(height, width)`, or what is wrong with it; `size` is the height and width it should have."""
        if value is None or (value["bytes"] is None and value["path"] is None):
            return None, "it has no mask"
        name = f"its mask {value['path'] or ''}".rstrip()
        try:
            values = read_mask(value)
        except IMAGE_ERRORS as error:
            return None, f"{name} cannot be used: {error}"
        if size is not None and values.shape != size:
            sizes = [f"{width} x {height}" for height, width in (values.shape, size)]
            return None, f"{name} is {sizes[0]} pixels (width x height), its image {sizes[1]}"
        ids = self._table[values]
        if (ids == UNKNOWN).any():
            unknown = np.unique(values[ids == UNKNOWN]).tolist()
            listed = ", ".join(map(str, unknown[:MAX_LISTED_VALUES])) + (", ..." * (len(unknown) > MAX_LISTED_VALUES))
            return None, f"{name} has the values {listed}; expected {self.encoding.describe()}"
        return ids, None


def values_in_masks(rows: datasets.Dataset, column: str) -> np.ndarray:
    """The values that masks have, ascending. Masks that cannot be read are passed over: `check_rows` names them."""
    is_there = np.zeros(MAX_VALUE + 1, dtype=bool)
    rows = with_image_column(rows, column).select_columns(column).with_format("arrow")
    for table in rows.iter(batch_size=64):
        for value in table[column]:
            try:
                is_there[np.unique(read_mask(value.as_py()))] = True
            except (*IMAGE_ERRORS, TypeError):
                continue
    return np.flatnonzero(is_there)
