"""What an image processor does to an image, as a few numbers that any program can follow, tried out against the processor itself."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import TimmWrapperImageProcessor

from .image_processors import Resizing, checked_settings, stated_resizing
from .loading import FORWARD_ERRORS, library_errors


# width and height of the images of noise that are prepared twice: landscape, portrait, square, smaller than any input; the crop of some
# begins at half a pixel, where libraries round in different ways
TRIAL_SIZES = ((320, 200), (201, 317), (331, 200), (200, 339), (150, 150), (37, 29))
# Pillow and torchvision differ by 2 on photographs
MAX_GRAY_LEVELS = 3


@dataclass(frozen=True)
class ImagePreparation:
    """From an 8-bit RGB image to the input of a model: resized, cropped at its center, normalized.

    Args:
        resizing: To which size, and which part of it is cropped.
        resample: Filter of Pillow, which smooths (antialias) where it makes images smaller.
        image_mean, image_std: Normalization of images in [0, 1], by channel: (value / 255 - mean) / std.
        rounds_crop: Whether a crop that would begin at half a pixel begins at the even one (timm) instead of the lower one. A border
            is the lower one in any case: half of what is missing, rounded down, lies on the left and above.
    """

    resizing: Resizing
    resample: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rounds_crop: bool = False

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels to which it brings all images; `None` if it gives several sizes."""
        size = self.resizing.crop_size or self.resizing.size
        return size if isinstance(size, tuple) else None

    def resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which an image of a height and width is resized, all in pixels."""
        size, longest = self.resizing.size, self.resizing.longest_edge
        if not isinstance(size, int):
            return size or (height, width)
        short, long = sorted((height, width))
        new_short, new_long = size, size * long // short
        if longest is not None and long / short * size > longest:
            exact = longest * short / long
            new_short, new_long = round(exact), int(exact * long / short)
        return (new_short, new_long) if height <= width else (new_long, new_short)

    def crop_start(self, length: int, part: int) -> int:
        """Where a crop of a part of a length begins; below 0: so much border lies before the image."""
        rest = length - part
        if rest < 0:
            return -(-rest // 2)
        return round(rest / 2) if self.rounds_crop else rest // 2

    def prepare(self, image: Image.Image) -> np.ndarray:
        """An RGB image as float32 `(3, height, width)`."""
        size = self.resized_size(image.height, image.width)
        if size != (image.height, image.width):
            image = image.resize(size[::-1], Image.Resampling(self.resample))
        if self.resizing.crop_size is not None:
            height, width = self.resizing.crop_size
            top, left = self.crop_start(image.height, height), self.crop_start(image.width, width)
            image = image.crop((left, top, left + width, top + height))
        mean, std = np.float32(self.image_mean), np.float32(self.image_std)
        return ((np.asarray(image, dtype=np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def read_preparation(processor: Any) -> ImagePreparation:
    """What an image processor of transformers does to images, tried on images of noise.

    Args:
        processor: Of any family; of timm `TimmWrapperImageProcessor`.

    Raises:
        ValueError: If it does something else than to resize, crop at the center and normalize, or does these in another way than its
            settings say.
    """
    settings, rounds_crop = checked_settings(processor), False
    if isinstance(processor, TimmWrapperImageProcessor):
        resizing, rounds_crop = _timm_resizing(processor.data_config), True
    else:
        resizing = stated_resizing(processor)
    statistics = (tuple(settings.image_mean), tuple(settings.image_std))
    preparation = ImagePreparation(resizing, int(settings.resample), *statistics, rounds_crop)
    _check(preparation, processor)
    return preparation


def _timm_resizing(config: dict[str, Any]) -> Resizing:
    """How timm prepares images for evaluation, by its settings.

    Raises:
        ValueError: If it fills a border with a color, or resizes so that a rectangle is just covered.
    """
    crop, mode = tuple(config["input_size"][-2:]), config["crop_mode"]
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in crop)
    if mode == "squash":
        return Resizing(scaled, None, crop)
    if mode != "center" or crop[0] != crop[1]:
        raise ValueError(
            f"timm prepares images of {crop[0]} x {crop[1]} pixels with the crop_mode {mode!r} in a way that is not supported; expected "
            "squash, or center and a square. Save an image processor of transformers next to the model, for example BitImageProcessor."
        )
    return Resizing(scaled[0], None, crop)


def _check(preparation: ImagePreparation, processor: Any) -> None:
    """Raises a `ValueError` if a processor prepares an image in another way."""
    random, name = np.random.default_rng(0), type(processor).__name__
    deviation = 255 * np.float32(preparation.image_std)[:, None, None]
    for width, height in TRIAL_SIZES:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        with library_errors(FORWARD_ERRORS):
            expected = np.asarray(processor(images=image, return_tensors="pt")["pixel_values"][0])
        found = preparation.prepare(image)
        if found.shape != expected.shape:
            shapes = " instead of ".join(f"{shape[-2]} x {shape[-1]}" for shape in (expected.shape, found.shape))
            difference = f"it makes {shapes} pixels of them"
        else:
            levels = np.abs((found - expected) * deviation).max()
            if levels <= MAX_GRAY_LEVELS:
                continue
            difference = f"they differ by up to {levels:.0f} of 255 gray levels"
        raise ValueError(
            f"{name} prepares images of {height} x {width} pixels in another way than its settings say ({preparation.resizing}, filter "
            f"{preparation.resample}): {difference}. Save one that resizes, crops at the center and normalizes, for example BitImageProcessor."
        )
