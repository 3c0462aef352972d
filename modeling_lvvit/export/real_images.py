"""Real images, on which an exported file is calibrated and compared."""

from collections.abc import Callable, Iterator, Sequence

import datasets
import numpy as np
from PIL import Image

from ..data.classes.unlabeled import open_images
from ..data.images import IMAGE_ERRORS, decode_image
from ..data.splits import select_subset


AsInput = Callable[[Image.Image], np.ndarray]


def unprepared(image: Image.Image) -> np.ndarray:
    """An RGB image as a file takes it that prepares images itself: float32 `(1, 3, height, width)`, 0 to 255."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]


class RealImages:
    """Images of a dataset, read one after the other; a subset of them that is the same in every run.

    Args:
        name: See `open_images`.
        count: Images at most.
        as_input: From an RGB image to what the file takes, float32 `(1, 3, height, width)`.
        preferred_splits: Of which split, where there are several.
        other_than: Images that are not among them, where both are of the same data.

    Raises:
        FileNotFoundError, ValueError: See `open_images`; also if the others are all that there are.
    """

    def __init__(
        self,
        name: str,
        count: int,
        as_input: AsInput,
        preferred_splits: Sequence[str],
        other_than: "RealImages | None" = None,
    ):
        images = open_images(name, preferred_splits=preferred_splits)
        numbers = np.arange(len(images.rows))
        if other_than is not None and other_than.name == images.name:
            numbers = np.setdiff1d(numbers, other_than.numbers)
            if not len(numbers):
                raise ValueError(
                    f"All {len(images.rows):,} images of {images.name} are for calibration; name others to compare predictions on."
                )
        self.numbers = numbers[select_subset(len(numbers), count)]
        self.as_input, self.total, self.name = as_input, len(images.rows), images.name
        self.paths = [images.paths[number] for number in self.numbers]
        rows = images.rows.cast_column(images.image_column, datasets.Image(decode=False))
        self.rows, self.image_column = rows.select(self.numbers), images.image_column

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[np.ndarray]:
        for row, path in zip(self.rows, self.paths):
            value = row[self.image_column]
            if value is None:
                raise ValueError(f"{self.name}: {path} has no image.")
            try:
                yield self.as_input(decode_image(value))
            except IMAGE_ERRORS as error:
                raise ValueError(f"{self.name}: {path} cannot be read as an image: {error}") from error

    def __str__(self) -> str:
        return f"{len(self):,} of {self.total:,} images of {self.name}"
