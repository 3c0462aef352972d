"""Photographs and their JPEG files, for tests of decoding."""

import io

import numpy as np
import torch
from PIL import Image


def photograph(width: int = 61, height: int = 45) -> Image.Image:
    """Something smooth with detail, so that scales and places can be told apart."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray(np.uint8(np.clip(np.asarray(coarse) + rng.normal(0, 4, (height, width, 1)), 0, 255)))


def jpeg(image: Image.Image, orientation: int = 1, **options) -> dict:
    """Value of an image column; options of Pillow's writer."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x112] = orientation
    image.save(file, "JPEG", exif=exif, **{"quality": 90, **options})
    return {"bytes": file.getvalue(), "path": None}


def as_array(pixels: torch.Tensor) -> np.ndarray:
    """`[3, height, width]` to `[height, width, 3]`."""
    return pixels.permute(1, 2, 0).numpy()


def mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
