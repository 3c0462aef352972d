"""Joint augmentation of an image and its label map.

Geometric operations act on both: a flip mirrors image and map, a crop cuts the image and is handed on as `crop_box`, so
that the map is cropped once, on the device, in the resolution of the tokens. Shear, shift and rotation of RandAugment are one
affine map, by which the image is resampled once and the label map read once (`label_affine`). Photometric operations touch the image only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from ..data.images import Normalization
from .rand_augment import RandAugment


FILTER_REACH = 3  # pixels, more than a bicubic filter reads to a side


@dataclass(frozen=True)
class AugmentationConfig:
    """Strength of the training augmentation. Defaults: the published recipe.

    Args:
        crop_scale: Smallest and largest area of the crop as a share of the image, in (0, 1].
        crop_ratio: Smallest and largest aspect ratio (width / height) of the crop.
        horizontal_flip: Probability of a mirror image, in [0, 1]. Set it to 0 where left and right carry meaning.
        rand_augment: Policy in timm's notation (see `RandAugment`), or `"none"`.
        color_jitter: Strength of brightness, contrast and saturation changes, at least 0. The published recipe uses none
            next to RandAugment.
        random_erasing: Probability that a rectangle is replaced by normal noise after normalization, in [0, 1]; area
            0.02 to 1/3 of the crop, aspect ratio 0.3 to 1/0.3.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.0
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
        if self.rand_augment != "none":
            RandAugment(self.rand_augment, [0.5] * 3)  # raises on a bad policy


def crop_of_warped_image(
    image: Image.Image,
    matrix: np.ndarray,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
    fill: tuple[int, ...],
) -> Image.Image:
    """A crop of an affinely warped image; only the part that the crop shows is ever computed.

    Args:
        matrix: `[3, 3]`, pixel of the warped image (x, y, 1) to pixel of the given one.
        box: The crop in pixels of the warped image, (left, top, right, bottom).
        size: Width and height of the result in pixels.
        fill: Color of what lies outside the image.
    """
    left, top, right, bottom = box
    width, height = size
    to_warped = np.array([[(right - left) / width, 0, left], [0, (bottom - top) / height, top], [0, 0, 1]])
    to_source = matrix @ to_warped  # pixel of the result -> pixel of the image
    # source pixels in a pixel of the result: what is more than one is averaged first, so that none is left out
    shrink = np.maximum(1, np.hypot(to_source[:2, 0], to_source[:2, 1]))
    corners = to_source[:2] @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])
    margin = FILTER_REACH * shrink
    low = np.clip(np.floor(corners.min(axis=1) - margin), 0, image.size)
    high = np.clip(np.ceil(corners.max(axis=1) + margin), 0, image.size)
    if (high - low).min() < 1:
        return Image.new("RGB", size, fill)
    if shrink.max() > 1:
        reduced_size = np.ceil((high - low) / shrink).astype(int)
        image = image.resize(tuple(reduced_size.tolist()), resample, box=(*low, *high))
        to_source[:2] = (to_source[:2] - np.outer(low, [0, 0, 1])) * (reduced_size / (high - low))[:, None]
    data = tuple(to_source[:2].flatten())
    return image.transform(size, Image.Transform.AFFINE, data, resample, fillcolor=fill)


class TrainTransform:
    """Random flip, RandAugment, random resized crop, color jitter, normalization and random erasing.

    The order and the frame of the geometry are those of the published recipe: RandAugment moves the whole image, then the
    crop is cut. RandAugment's color operations act on the crop (as in timm), not on the whole image: those that look at
    the whole histogram see the part that is used.

    Randomness comes from the global generators of PyTorch and Python, which `data.sampling.seed_generators` starts for every sample.

    Args:
        image_size: Height and width of the result in pixels.
        image_mean, image_std: Per-channel normalization for images in [0, 1].
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
        self.normalize = Normalization(self.image_mean, self.image_std)
        policy = self.augmentation.rand_augment
        self.rand_augment = RandAugment(policy, self.image_mean) if policy != "none" else None
        jitter = self.augmentation.color_jitter
        self.color_jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None
        erasing = self.augmentation.random_erasing
        self.random_erasing = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None

    def draw_options(self) -> dict[str, Any]:
        """All on which it depends, besides the generators, what an image looks like before erasing; JSON values."""
        (low, high), augmentation = self.augmentation.crop_scale, self.augmentation
        return {
            "image_size": list(self.image_size),
            "crop_scale_min": low,
            "crop_scale_max": high,
            "crop_ratio": list(augmentation.crop_ratio),
            "horizontal_flip": augmentation.horizontal_flip,
            "rand_augment": augmentation.rand_augment,
            "color_jitter": augmentation.color_jitter,
            # of `image_mean`, in parts that move in from outside
            "fill_color": None if self.rand_augment is None else list(self.rand_augment.fill),
        }

    @classmethod
    def from_draw_options(cls, options: dict[str, Any]) -> "TrainTransform":
        """A transform that draws as the one that has these `draw_options`, without erasing."""
        names = ("horizontal_flip", "rand_augment", "color_jitter")
        crop_scale = (options["crop_scale_min"], options["crop_scale_max"])
        augmentation = AugmentationConfig(
            crop_scale, tuple(options["crop_ratio"]), **{name: options[name] for name in names}, random_erasing=0.0
        )
        image_mean = [value / 255 for value in options["fill_color"] or (128, 128, 128)]
        return cls(tuple(options["image_size"]), image_mean, [0.5] * 3, augmentation)

    def __call__(
        self,
        image: Image.Image,
        token_label_index: np.ndarray | None = None,
        token_label_scores: np.ndarray | None = None,
        map_box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            image: RGB image of any size.
            token_label_index: `[K, rows, columns]` integers, classes as positions in the palette of the map, or `None`.
            token_label_scores: `[K, rows, columns]` float16, or `None`.
            map_box: Region of the image that the map covers, (left, top, right, bottom) as fractions of the image.

        Returns:
            `pixel_values` float32 `[3, height, width]`; where given, the flipped `token_label_index` and
            `token_label_scores`; and where the crop lies: `crop_box` float32 `[4]`, (left, top, right, bottom). Without
            RandAugment these are fractions of the region that the flipped map covers (below 0 or above 1 where the crop
            leaves it). With it they are fractions of the warped image, and `label_affine` float32 `[2, 3]` and `image_box`
            float32 `[4]` lead from there to the map (see `label_crops.CropGeometry`).
        """
        sample = {}
        if torch.rand(()).item() < self.augmentation.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            map_box = (1 - map_box[2], map_box[1], 1 - map_box[0], map_box[3])
            if token_label_index is not None:
                token_label_index, token_label_scores = token_label_index[..., ::-1], token_label_scores[..., ::-1]
        if token_label_index is not None:
            sample["token_label_index"] = torch.from_numpy(token_label_index.copy())
            sample["token_label_scores"] = torch.from_numpy(token_label_scores.copy())
        box = self._draw_crop(image)
        warp, colors = self.rand_augment.draw(image.size) if self.rand_augment is not None else (None, [])
        sample |= self._places(warp, box, image.size, map_box)
        image = self._cut(image, warp, box)
        for operation in colors:
            image = operation(image)
        if self.color_jitter is not None:
            image = self.color_jitter(image)
        pixel_values = self.normalize(v2.functional.pil_to_tensor(image))
        if self.random_erasing is not None:
            pixel_values = self.random_erasing(pixel_values)
        return {"pixel_values": pixel_values, **sample}

    def _draw_crop(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels."""
        # the rule of torchvision, drawn with Python's generator: 6 microseconds instead of 47
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            image, self.augmentation.crop_scale, self.augmentation.crop_ratio
        )
        width, height = max(1, width), max(1, height)  # of tiny images it can cut nothing
        left, top = min(left, image.width - width), min(top, image.height - height)
        return left, top, left + width, top + height

    def _cut(self, image: Image.Image, warp: np.ndarray | None, box: tuple[int, int, int, int]) -> Image.Image:
        bilinear = torch.rand(()).item() < 0.5  # the recipe draws the filter for each image
        resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        size = self.image_size[::-1]
        if warp is None:
            return image.resize(size, resample, box=box)
        return crop_of_warped_image(image, warp, box, size, resample, self.rand_augment.fill)

    def _places(
        self,
        warp: np.ndarray | None,
        box: tuple[int, int, int, int],
        image_size: tuple[int, int],
        map_box: tuple[float, float, float, float],
    ) -> dict[str, torch.Tensor]:
        """Where the crop lies in the map: the fields of `CropGeometry`."""
        width, height = image_size
        crop = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
        left, top, right, bottom = map_box
        scale_x, scale_y = 1 / (right - left), 1 / (bottom - top)
        if self.rand_augment is None:
            crop = ((x - o) * s for x, o, s in zip(crop, (left, top) * 2, (scale_x, scale_y) * 2))
            return {"crop_box": torch.tensor([*crop])}
        a, b, c, d, e, f = (1, 0, 0, 0, 1, 0) if warp is None else warp[:2].flatten().tolist()
        # pixels of the warped image -> of the image, between fractions of both and of the map
        affine = [
            [scale_x * a, scale_x * b * height / width, scale_x * (c / width - left)],
            [scale_y * d * width / height, scale_y * e, scale_y * (f / height - top)],
        ]
        image_box = [-left * scale_x, -top * scale_y, (1 - left) * scale_x, (1 - top) * scale_y]
        places = {"crop_box": crop, "label_affine": affine, "image_box": image_box}
        return {name: torch.tensor(values) for name, values in places.items()}
