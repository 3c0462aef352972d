"""Joint augmentation of an image and its mask.

The published training runs had, in this order: a random scale, a random crop that is not filled by a single class, a mirror image,
color changes, normalization, and a border where the image is smaller than the crop (MMSegmentation's pipeline for ADE20K, in the
authors' folder `seg`). Scale and crop are one resampling here: only the part that the crop shows is ever computed.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from ..data.decoding import EncodedImage, as_encoded, resized_crop
from ..data.images import Normalization


CROP_TRIES = 10  # crops that are drawn until one has several classes; as in MMSegmentation


@dataclass(frozen=True)
class SegmentationAugmentation:
    """Strength of the training augmentation. Defaults: the published recipe.

    Args:
        scale: Smallest and largest factor of the size in which images are evaluated.
        max_class_share: Crops in which one class has at least this share of the labelled pixels are drawn again, up to ten times; 1
            takes every crop.
        horizontal_flip: Probability of a mirror image, in [0, 1].
        photometric: Probability of each of four color changes (brightness, contrast, saturation, hue), in [0, 1].
    """

    scale: tuple[float, float] = (0.5, 2.0)
    max_class_share: float = 0.75
    horizontal_flip: float = 0.5
    photometric: float = 0.5

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"`scale` must be (low, high) with 0 < low <= high, got {self.scale}.")
        for name in ("max_class_share", "horizontal_flip", "photometric"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """Changes of brightness, contrast, saturation and hue, without the exchange of channels, which the published runs did not have.

    Ranges are theirs, but brightness is a factor (theirs adds up to 32 of 255) and contrast pivots on the mean grey (theirs on black).
    """

    def __init__(self, probability: float = 0.5):
        # their hue moves by up to 18 of 180 steps around the color circle
        super().__init__(hue=(-0.1, 0.1), p=probability)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """As in the library; channels stay."""
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def evaluation_size(size: tuple[int, int], short_side: int | None, long_side: int | None = None) -> tuple[int, int]:
    """Height and width in which an image is evaluated, and to which the scales of training refer: its shorter side becomes
    `short_side`, unless the longer one would exceed `long_side`.

    Args:
        size: Height and width of the image in pixels.
        short_side, long_side: In pixels; `None` keeps the size, or sets no limit.

    Example: 600 x 800 with 512 and 2048 becomes 512 x 683.
    """
    if short_side is None:
        return tuple(size)
    factor = short_side / min(size)
    if long_side is not None:
        factor = min(factor, long_side / max(size))
    return tuple(max(1, round(side * factor)) for side in size)


class SegmentationTrainTransform:
    """Random scale, crop, mirror image and color changes of an image and its mask.

    Scale and crop are drawn from the size of the image; then the part that the crop shows is decoded, in the scale that it needs.

    Randomness comes from the global generator of PyTorch, which `ImageDataset` starts for every sample.

    Args:
        crop_size: Height and width of the result in pixels.
        image_mean, image_std: Per-channel normalization for images in [0, 1].
        ignore_index: Label of the border around images that are smaller than the crop.
        short_side, long_side: See `evaluation_size`.
    """

    reads_regions = True

    def __init__(
        self,
        crop_size: tuple[int, int],
        image_mean: list[float],
        image_std: list[float],
        ignore_index: int,
        augmentation: SegmentationAugmentation | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
    ):
        self.crop_size, self.ignore_index = tuple(crop_size), ignore_index
        self.normalize = Normalization(image_mean, image_std)
        self.augmentation = augmentation or SegmentationAugmentation()
        self.short_side, self.long_side = short_side, long_side
        self.distort = PhotometricDistortion(self.augmentation.photometric) if self.augmentation.photometric else None

    def __call__(self, image: Image.Image | EncodedImage, mask: np.ndarray) -> dict[str, Any]:
        """From an RGB image of any size, decoded or not, and the class ids of its pixels `(height, width)` to `pixel_values` uint8 `[3, height,
        width]`, of which the upper left `image_size` are the crop, their `normalization`, and `labels` int32 `[height, width]`."""
        image, (low, high) = as_encoded(image), self.augmentation.scale
        image_width, image_height = image.size
        base = evaluation_size((image_height, image_width), self.short_side, self.long_side)
        factor = low + (high - low) * torch.rand(()).item()
        scaled = tuple(max(1, round(side * factor)) for side in base)
        top, left, labels = self._draw_crop(mask, scaled)
        height, width = labels.shape
        down, right = image_height / scaled[0], image_width / scaled[1]  # pixels of the image in a scaled one
        box = (
            left * right,
            top * down,
            min(image_width, (left + width) * right),
            min(image_height, (top + height) * down),
        )
        # boxes are no whole pixels: Pillow resamples, which takes them as they are
        is_whole = image.reduction(box, (width, height)) == 1
        pixels = resized_crop(image, box, (width, height), Image.Resampling.BILINEAR, exact=is_whole)
        if torch.rand(()).item() < self.augmentation.horizontal_flip:
            pixels, labels = pixels.flip(2), labels[:, ::-1]
        if self.distort is not None:
            pixels = self.distort(pixels)
        pixel_values = torch.zeros(3, *self.crop_size, dtype=torch.uint8)
        pixel_values[:, :height, :width] = pixels
        framed = torch.full(self.crop_size, self.ignore_index, dtype=torch.int32)
        framed[:height, :width] = torch.from_numpy(labels.astype(np.int32))
        image = {"pixel_values": pixel_values, "normalization": self.normalize, "image_size": (height, width)}
        return {**image, "labels": framed}

    def _draw_crop(self, mask: np.ndarray, scaled: tuple[int, int]) -> tuple[int, int, np.ndarray]:
        """Top and left pixel of a crop in the scaled image, and its labels, by the nearest pixel of the mask."""
        height, width = (min(side, crop) for side, crop in zip(scaled, self.crop_size))
        for _ in range(CROP_TRIES):
            top = int(torch.randint(scaled[0] - height + 1, ()))
            left = int(torch.randint(scaled[1] - width + 1, ()))
            rows = (top + np.arange(height) + 0.5) * (mask.shape[0] / scaled[0])
            columns = (left + np.arange(width) + 0.5) * (mask.shape[1] / scaled[1])
            labels = mask[np.ix_(rows.astype(np.intp), columns.astype(np.intp))]
            if self._has_several_classes(labels):
                break
        return top, left, labels

    def _has_several_classes(self, labels: np.ndarray) -> bool:
        if self.augmentation.max_class_share >= 1:
            return True
        counts = np.bincount(labels[labels != self.ignore_index])
        return counts.size > 0 and counts.max() < self.augmentation.max_class_share * counts.sum()


class SegmentationEvalTransform:
    """An image in its own size and its mask: both are resized on the device (`inference.predict_classes`)."""

    def __init__(self, image_mean: list[float], image_std: list[float]):
        self.normalize = Normalization(image_mean, image_std)

    def __call__(self, image: Image.Image, mask: np.ndarray) -> dict[str, Any]:
        """`pixel_values` uint8 `[3, height, width]`, their `normalization`, and `labels` int32 `[height, width]`."""
        pixels = v2.functional.pil_to_tensor(image)
        labels = torch.from_numpy(mask.astype(np.int32))
        return {"pixel_values": pixels, "normalization": self.normalize, "labels": labels}
