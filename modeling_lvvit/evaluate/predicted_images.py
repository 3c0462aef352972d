"""Images without labels as inputs of a classifier (`lvvit predict`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..data.classes.unlabeled import UnlabeledImages
from ..data.image_dataset import ImageDataset
from ..data.images import IMAGE_ERRORS, decode_image


@dataclass
class Inputs:
    """Some images as a classifier takes them.

    Args:
        indices: Rows of `pixel_values`.
        pixel_values: `(B, 3, height, width)`.
        errors: Row -> why it cannot be read; such rows are in neither of the others.
    """

    indices: list[int]
    pixel_values: torch.Tensor
    errors: dict[int, str]

    @classmethod
    def collate(cls, samples: list[tuple[int, torch.Tensor | str]]) -> "Inputs":
        """From the samples of `PredictionDataset`."""
        good = [(index, pixels) for index, pixels in samples if not isinstance(pixels, str)]
        pixel_values = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0)
        return cls(
            [index for index, _ in good], pixel_values, {i: text for i, text in samples if isinstance(text, str)}
        )


class PredictionDataset(ImageDataset):
    """Row numbers with the input of a classifier, or why the image cannot be read.

    Args:
        images: See `UnlabeledImages`.
        transform: From an RGB image to float32 `(3, height, width)`.
    """

    def __init__(self, images: UnlabeledImages, transform: Callable[[Image.Image], torch.Tensor]):
        super().__init__(images.rows, [images.image_column], images.name)
        self.transform = transform

    def __getitems__(self, indices: list[int]) -> list[tuple[int, torch.Tensor | str]]:
        return list(zip(indices, map(self._input, self.rows[indices][self.image_column].to_pylist())))

    def _input(self, value: dict[str, Any] | None) -> torch.Tensor | str:
        if value is None:
            return "no image"
        try:
            image = decode_image(value)
        except IMAGE_ERRORS as error:
            return f"the image cannot be decoded ({error})"
        return self.transform(image)

    def check_images(self) -> None:
        """Looks at every image before the work, as `check_all_rows` does."""
        self.check_all_rows(lambda table, start: [])
