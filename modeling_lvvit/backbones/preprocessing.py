"""From images to the input of a classifier that was trained elsewhere."""

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

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
        """An RGB image to pixels uint8 `[3, height, width]`, and the region of the image that they show: (left, top,
        right, bottom) as fractions of the image, below 0 or above 1 where they show a border."""
        (width, height), (rows, columns) = image.size, self.image_size
        if self.fit == "squash":
            return F.pil_to_tensor(image.resize((columns, rows), self.resample)), (0.0, 0.0, 1.0, 1.0)
        scales = (columns / width, rows / height)
        ratio = min(scales) if self.fit == "pad" else max(scales)
        shown = (columns / ratio, rows / ratio)  # size of the region, in pixels of the image
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


def probe_processor(processor: Any, image_size: tuple[int, int] | None = None) -> Preprocessing:
    """What an image processor does to colors, and the size of what it gives; found by giving it black, white and red images: one
    reading for all processors.

    Args:
        processor: Image processor of transformers.
        image_size: Height and width in pixels to assume where it does not make all images the same size.

    Raises:
        ValueError: If it does something else to colors than to scale and shift them, or gives several sizes and none is assumed.
    """
    size = processor_image_size(processor) or image_size
    if size is None:
        raise ValueError(
            f"{type(processor).__name__} does not bring images to one size; say which height and width in pixels they shall have."
        )
    black, white, red = (
        _center(_output(processor, Image.new("RGB", (256, 256), color)))
        for color in ((0, 0, 0), (255, 255, 255), (255, 0, 0))
    )
    scale = (white - black) / 255.0
    if not (scale > 0).all():
        raise ValueError(f"{type(processor).__name__} does not map brightness to input values; it is not supported.")
    if not torch.allclose(red, torch.stack([white[0], black[1], black[2]]), atol=1e-3):
        raise ValueError(f"{type(processor).__name__} exchanges red and blue; it is not supported.")
    return Preprocessing(size, tuple(scale.tolist()), tuple(black.tolist()), _filter_of(processor))


def processor_image_size(processor: Any) -> tuple[int, int] | None:
    """Height and width in pixels to which an image processor brings all images, `None` if there are several."""
    sizes = {tuple(_output(processor, Image.new("RGB", size)).shape[-2:]) for size in ((320, 200), (200, 320))}
    return sizes.pop() if len(sizes) == 1 else None


def processor_view(processor: Any) -> tuple[float, float]:
    """Shares of the width and of the height that an image processor shows of an image of 8:5, each in (0, 1].

    Example: an image that is squashed gives (1, 1); one whose center square is cut out (0.625, 1); one that is squashed to 256 x 256
    pixels and cropped to 224 x 224 (0.875, 0.875).
    """
    width, height = 640, 400
    ramps = [np.linspace(0, 255, length).round().astype(np.uint8) for length in (width, height)]
    images = [np.broadcast_to(ramps[0], (height, width)), np.broadcast_to(ramps[1][:, None], (height, width))]
    black, white = (
        _center(_output(processor, Image.new("RGB", (width, height), (level,) * 3)))[0] for level in (0, 255)
    )
    shares = []
    for axis, image in zip((1, 0), images):
        values = _output(processor, Image.fromarray(image).convert("RGB"))[0]
        places = ((values - black) / (white - black)).mean(dim=1 - axis).double()  # of columns or rows, in the image
        number = torch.arange(len(places), dtype=torch.float64)
        number -= number.mean()
        step = (number @ places / (number @ number)).item()  # from one to the next, by least squares
        shares.append(min(1.0, round(step * len(places), 3)))
    return shares[0], shares[1]


def _output(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def _center(values: torch.Tensor) -> torch.Tensor:
    return values[:, values.shape[1] // 2, values.shape[2] // 2]


def _filter_of(processor: Any) -> Image.Resampling:
    if isinstance(processor, TimmWrapperImageProcessor):
        names = {entry.name: entry for entry in Image.Resampling}
        return names.get(processor.data_config["interpolation"].upper(), Image.Resampling.BICUBIC)
    resample = getattr(processor, "resample", None)
    return Image.Resampling.BICUBIC if resample is None else Image.Resampling(int(resample))
