"""From images to the input of a classifier that was trained elsewhere."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from ..data.decoding import EncodedImage, resized_box


Fit = Literal["squash", "pad", "center_crop"]


@functools.lru_cache(maxsize=16)
def _per_channel(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """Float32 `(3, 1, 1)`, made once: numbers that are copied to a device for every batch make the processor wait for it."""
    with torch.inference_mode(False):  # whoever asks first, all may use it
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


@dataclass(frozen=True)
class Preprocessing:
    """From an image of any size to the input of an annotator.

    Args:
        image_size: Input height and width in pixels.
        scale, offset: Per channel: input = scale * value + offset, values 0 to 255.
        resample: Filter of Pillow.
        fit: How an image of another shape is brought to the input: `"squash"` resizes it without keeping its aspect
            ratio; `"pad"` keeps the ratio and fills the borders with the mean color; `"center_crop"` keeps the ratio and
            cuts off what is longer (what the authors of the paper did).
    """

    image_size: tuple[int, int]
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC
    fit: Fit = "squash"

    @classmethod
    def with_statistics(
        cls, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], resample: int
    ) -> "Preprocessing":
        """From the normalization of images in [0, 1], as image processors and timm state it."""
        scale = tuple(1.0 / (255.0 * deviation) for deviation in std)
        return cls(image_size, scale, tuple(-value / deviation for value, deviation in zip(mean, std)), resample)

    def __call__(self, image: Image.Image | EncodedImage) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
        """An RGB image to pixels uint8 `[3, height, width]`, and the region of the image that they show: (left, top,
        right, bottom) as fractions of the image, below 0 or above 1 where they show a border. Encoded JPEG files are decoded in the scale
        that this needs."""
        (width, height), (rows, columns) = image.size, self.image_size
        whole = (0, 0, width, height)
        if self.fit == "squash":
            return F.pil_to_tensor(resized_box(image, whole, (columns, rows), self.resample)), (0.0, 0.0, 1.0, 1.0)
        scales = (columns / width, rows / height)
        ratio = min(scales) if self.fit == "pad" else max(scales)
        shown = (columns / ratio, rows / ratio)  # size of the region, in pixels of the image
        left, top = (width - shown[0]) / 2, (height - shown[1]) / 2
        box = (left / width, top / height, (left + shown[0]) / width, (top + shown[1]) / height)
        if self.fit == "center_crop":
            region = (max(left, 0.0), max(top, 0.0), min(left + shown[0], width), min(top + shown[1], height))
            return F.pil_to_tensor(resized_box(image, region, (columns, rows), self.resample)), box
        inner = resized_box(image, whole, (max(1, round(width * ratio)), max(1, round(height * ratio))), self.resample)
        canvas = Image.new("RGB", (columns, rows), self._mean_color())
        canvas.paste(inner, ((columns - inner.width) // 2, (rows - inner.height) // 2))
        return F.pil_to_tensor(canvas), box

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, height, width)`, uint8 or floating values 0 to 255, to float32 input."""
        scale, offset = (_per_channel(tuple(values), pixels.device) for values in (self.scale, self.offset))
        return pixels.float() * scale + offset

    def _mean_color(self) -> tuple[int, int, int]:
        return tuple(int(np.clip(round(-b / a), 0, 255)) for a, b in zip(self.scale, self.offset))
