"""From pictures to the input of a classifier that was trained elsewhere."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers import TimmWrapperImageProcessor


Fit = Literal["squash", "pad", "center_crop"]


@dataclass(frozen=True)
class Preprocessing:
    """From a picture of any size to the input of an annotator.

    Args:
        image_size: Input height and width in pixels.
        scale, offset: Per channel: input = scale * value + offset, values 0 to 255.
        resample: Filter of Pillow.
        fit: How a picture of another shape is brought to the input: `"squash"` resizes it without keeping its aspect
            ratio; `"pad"` keeps the ratio and fills the borders with the mean colour; `"center_crop"` keeps the ratio and
            cuts off what is longer (what the authors of the paper did).
    """

    image_size: tuple[int, int]
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]
    resample: int = Image.Resampling.BICUBIC
    fit: Fit = "squash"

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
        """An RGB picture to pixels uint8 `[3, height, width]`, and the region of the picture that they show: (left, top,
        right, bottom) as fractions of the picture, below 0 or above 1 where they show a border."""
        (width, height), (rows, columns) = image.size, self.image_size
        if self.fit == "squash":
            return F.pil_to_tensor(image.resize((columns, rows), self.resample)), (0.0, 0.0, 1.0, 1.0)
        scales = (columns / width, rows / height)
        ratio = min(scales) if self.fit == "pad" else max(scales)
        shown = (columns / ratio, rows / ratio)  # size of the region, in pixels of the picture
        left, top = (width - shown[0]) / 2, (height - shown[1]) / 2
        box = (left / width, top / height, (left + shown[0]) / width, (top + shown[1]) / height)
        if self.fit == "center_crop":
            region = (max(left, 0.0), max(top, 0.0), min(left + shown[0], width), min(top + shown[1], height))
            return F.pil_to_tensor(image.resize((columns, rows), self.resample, box=region)), box
        inner = image.resize((max(1, round(width * ratio)), max(1, round(height * ratio))), self.resample)
        canvas = Image.new("RGB", (columns, rows), self._mean_color())
        canvas.paste(inner, ((columns - inner.width) // 2, (rows - inner.height) // 2))
        return F.pil_to_tensor(canvas), box

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, height, width)`, uint8 or floating values 0 to 255, to float32 input."""
        scale, offset = (pixels.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.scale, self.offset))
        return pixels.float() * scale + offset

    def _mean_color(self) -> tuple[int, int, int]:
        return tuple(int(np.clip(round(-b / a), 0, 255)) for a, b in zip(self.scale, self.offset))


def probe_processor(processor: Any) -> Preprocessing:
    """What an image processor does, found by giving it black, white and red pictures: one reading for all processors.

    Raises:
        ValueError: If it does something else to colours than to scale and shift them.
    """
    black, white, red = (
        processor(images=Image.new("RGB", (256, 256), color), return_tensors="pt")["pixel_values"][0].float()
        for color in ((0, 0, 0), (255, 255, 255), (255, 0, 0))
    )
    height, width = black.shape[-2:]
    black, white, red = (values[:, height // 2, width // 2] for values in (black, white, red))
    scale = (white - black) / 255.0
    if not (scale > 0).all():
        raise ValueError(f"{type(processor).__name__} does not map brightness to input values; it is not supported.")
    if not torch.allclose(red, torch.stack([white[0], black[1], black[2]]), atol=1e-3):
        raise ValueError(f"{type(processor).__name__} exchanges red and blue; it is not supported.")
    return Preprocessing((height, width), tuple(scale.tolist()), tuple(black.tolist()), _filter_of(processor))


def _filter_of(processor: Any) -> Image.Resampling:
    if isinstance(processor, TimmWrapperImageProcessor):
        return Image.Resampling[processor.data_config["interpolation"].upper()]
    resample = getattr(processor, "resample", None)
    return Image.Resampling.BICUBIC if resample is None else Image.Resampling(int(resample))
