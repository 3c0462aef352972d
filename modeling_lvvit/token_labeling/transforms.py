"""Joint augmentation of an image and its label map.

Geometric operations act on both: a flip mirrors image and map, a crop cuts the image and is handed on as `crop_box`, so
that the map is cropped once, on the device, in the resolution of the tokens. Photometric operations touch the image only.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class AugmentationConfig:
    """Strength of the training augmentation. Defaults: the published recipe without RandAugment.

    Args:
        crop_scale: Smallest and largest area of the crop as a share of the image, in (0, 1].
        crop_ratio: Smallest and largest aspect ratio (width / height) of the crop.
        horizontal_flip: Probability of a mirror image, in [0, 1]. Set it to 0 where left and right carry meaning.
        color_jitter: Strength of brightness, contrast and saturation changes, at least 0.
        random_erasing: Probability that a rectangle is replaced by normal noise after normalisation, in [0, 1]; area
            0.02 to 1/3 of the crop, aspect ratio 0.3 to 1/0.3.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    color_jitter: float = 0.4
    random_erasing: float = 0.25

    def __post_init__(self):
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"`crop_scale` must be (low, high) with 0 < low <= high <= 1, got {self.crop_scale}.")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"`crop_ratio` must be (low, high) with 0 < low <= high, got {self.crop_ratio}.")
        if self.color_jitter < 0:
            raise ValueError(f"`color_jitter` must be at least 0, got {self.color_jitter}.")


def within_region(crop_box: torch.Tensor, map_box: tuple[float, float, float, float], mirrored: bool) -> torch.Tensor:
    """A crop box as fractions of the region that the map covers, instead of the whole image.

    Args:
        crop_box: `(4,)`, (left, top, right, bottom) as fractions of the image, after a mirroring.
        map_box: The region, likewise, before it.
        mirrored: Whether the image was mirrored.
    """
    left, top, right, bottom = map_box
    if mirrored:
        left, right = 1 - right, 1 - left
    if (left, top, right, bottom) == (0, 0, 1, 1):
        return crop_box
    origin, extent = torch.tensor([left, top] * 2), torch.tensor([right - left, bottom - top] * 2)
    return (crop_box - origin) / extent


class TrainTransform:
    """Random flip, random resized crop, colour jitter, normalisation and random erasing.

    Randomness comes from PyTorch's global generator, which a `DataLoader` seeds for every worker.

    Args:
        image_size: Height and width of the result in pixels.
        image_mean, image_std: Per-channel normalisation for images in [0, 1].
        augmentation: Strengths.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        image_mean: list[float],
        image_std: list[float],
        augmentation: AugmentationConfig | None = None,
    ):
        self.image_size = tuple(image_size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.augmentation = augmentation or AugmentationConfig()
        jitter = self.augmentation.color_jitter
        self.color_jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None
        erasing = self.augmentation.random_erasing
        self.random_erasing = v2.RandomErasing(erasing, ratio=(0.3, 1 / 0.3), value="random") if erasing else None

    def __call__(
        self,
        image: Image.Image,
        token_label_ids: np.ndarray | None = None,
        token_label_scores: np.ndarray | None = None,
        map_box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            image: RGB picture of any size.
            token_label_ids: `[K, rows, columns]` integers, or `None`.
            token_label_scores: `[K, rows, columns]` float16, or `None`.
            map_box: Region of the image that the map covers, (left, top, right, bottom) as fractions of the image.

        Returns:
            `pixel_values` float32 `[3, height, width]`; `crop_box` float32 `[4]`, (left, top, right, bottom) as
            fractions of the region that the flipped map covers (below 0 or above 1 where the crop leaves it); and, where
            given, the flipped `token_label_ids` and `token_label_scores`.
        """
        sample = {}
        mirrored = torch.rand(()).item() < self.augmentation.horizontal_flip
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if token_label_ids is not None:
            step = -1 if mirrored else 1
            sample["token_label_ids"] = torch.from_numpy(token_label_ids[..., ::step].copy())
            sample["token_label_scores"] = torch.from_numpy(token_label_scores[..., ::step].copy())
        image, crop_box = self._random_resized_crop(image)
        sample["crop_box"] = within_region(crop_box, map_box, mirrored)
        if self.color_jitter is not None:
            image = self.color_jitter(image)
        pixel_values = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
        pixel_values = F.normalize(pixel_values, self.image_mean, self.image_std, inplace=True)
        if self.random_erasing is not None:
            pixel_values = self.random_erasing(pixel_values)
        return {"pixel_values": pixel_values, **sample}

    def _random_resized_crop(self, image: Image.Image) -> tuple[Image.Image, torch.Tensor]:
        width, height = image.size
        top, left, crop_height, crop_width = RandomResizedCrop.get_params(
            image, list(self.augmentation.crop_scale), list(self.augmentation.crop_ratio)
        )
        box = (left, top, left + crop_width, top + crop_height)
        bilinear = torch.rand(()).item() < 0.5  # the recipe draws the filter for each image
        resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        image = image.resize(self.image_size[::-1], resample, box=box)
        return image, torch.tensor(box, dtype=torch.float32) / torch.tensor([width, height, width, height])
