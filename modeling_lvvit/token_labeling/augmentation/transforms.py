"""Joint augmentation of an image and its label map.

Geometric operations act on both: a flip mirrors image and map, a crop cuts the image and is handed on as `crop_box`, so
that the map is cropped once, on the device, in the resolution of the tokens. Shear, shift and rotation of RandAugment are one
affine map, by which the image is resampled once and the label map read once (`label_affine`). Photometric operations touch the image only.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from ...data.decoding import EncodedImage, as_encoded, resized_crop, warped_crop
from ...data.images import Normalization
from .finish import BoxEraser
from .rand_augment import ColorOperation, RandAugment


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


class TrainTransform:
    """Random flip, RandAugment, random resized crop, color jitter and random erasing.

    The order and the frame of the geometry are those of the published recipe: RandAugment moves the whole image, then the
    crop is cut. RandAugment's color operations act on the crop (as in timm), not on the whole image: those that look at
    the whole histogram see the part that is used.

    Flip, crop and matrix are drawn from the size of the image alone; then the part that the crop shows is decoded. Pixels stay 8-bit:
    `finish_images` normalizes them and fills erased rectangles, on the device.

    Randomness comes from the global generators of PyTorch and Python, which `data.sampling.seed_generators` starts for every sample.

    Args:
        image_size: Height and width of the result in pixels.
        image_mean, image_std: Per-channel normalization for images in [0, 1].
        exact_resize: Resample with Pillow from the whole image, instead of the fast way of `data.decoding`.
    """

    reads_regions = True

    def __init__(
        self,
        image_size: tuple[int, int],
        image_mean: list[float],
        image_std: list[float],
        augmentation: AugmentationConfig | None = None,
        exact_resize: bool = False,
    ):
        self.image_size, self.exact_resize = tuple(image_size), exact_resize
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.augmentation = augmentation or AugmentationConfig()
        self.normalize = Normalization(self.image_mean, self.image_std)
        policy = self.augmentation.rand_augment
        self.rand_augment = RandAugment(policy, self.image_mean) if policy != "none" else None
        jitter = self.augmentation.color_jitter
        self.color_jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None
        erasing = self.augmentation.random_erasing
        self.random_erasing = BoxEraser(erasing) if erasing else None

    def draw_options(self) -> dict[str, Any]:
        """All on which it depends, besides the generators, which part of an image is shown and how, but for `exact_resize`, before erasing; JSON
        values."""
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
        image: Image.Image | EncodedImage,
        token_label_index: np.ndarray | None = None,
        token_label_scores: np.ndarray | None = None,
        map_box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
    ) -> dict[str, Any]:
        """
        Args:
            image: RGB image of any size, decoded or not.
            token_label_index: `[K, rows, columns]` integers, classes as positions in the palette of the map, or `None`.
            token_label_scores: `[K, rows, columns]` float16, or `None`.
            map_box: Region of the image that the map covers, (left, top, right, bottom) as fractions of the image.

        Returns:
            `pixel_values` uint8 `[3, height, width]`, their `normalization`, and `erased`, an `ErasedBox`, where one was drawn; where
            given, the flipped `token_label_index` and
            `token_label_scores`; and where the crop lies: `crop_box` float32 `[4]`, (left, top, right, bottom). Without
            RandAugment these are fractions of the region that the flipped map covers (below 0 or above 1 where the crop
            leaves it). With it they are fractions of the warped image, and `label_affine` float32 `[2, 3]` and `image_box`
            float32 `[4]` lead from there to the map (see `label_crops.CropGeometry`).
        """
        sample, image = {}, as_encoded(image)
        if torch.rand(()).item() < self.augmentation.horizontal_flip:
            image = image.mirrored()
            map_box = (1 - map_box[2], map_box[1], 1 - map_box[0], map_box[3])
            if token_label_index is not None:
                token_label_index, token_label_scores = token_label_index[..., ::-1], token_label_scores[..., ::-1]
        if token_label_index is not None:
            sample["token_label_index"] = torch.from_numpy(token_label_index.copy())
            sample["token_label_scores"] = torch.from_numpy(token_label_scores.copy())
        box = self._draw_crop(image.size)
        warp, colors = self.rand_augment.draw(image.size) if self.rand_augment is not None else (None, [])
        sample |= self._places(warp, box, image.size, map_box)
        sample |= {"pixel_values": self._colored(self._cut(image, warp, box), colors), "normalization": self.normalize}
        if self.random_erasing is not None and (erased := self.random_erasing.draw(self.image_size)):
            sample["erased"] = erased
        return sample

    def _colored(self, pixels: torch.Tensor, colors: list[ColorOperation]) -> torch.Tensor:
        """A crop after the changes of color that are drawn; it becomes an image of Pillow only for those that act."""
        image = None
        drawn = (operation.draw() for operation in colors)  # each when those before it have acted
        for change in chain(drawn, [self.color_jitter]):
            if change is not None:
                image = change(v2.functional.to_pil_image(pixels) if image is None else image)
        return pixels if image is None else v2.functional.pil_to_tensor(image)

    def _draw_crop(self, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels, of an image of this width and height."""
        image_width, image_height = image_size
        # the rule of torchvision, drawn with Python's generator: 6 microseconds instead of 47
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(
            torch.empty(image_height, image_width, device="meta"),
            self.augmentation.crop_scale,
            self.augmentation.crop_ratio,
        )
        width, height = max(1, width), max(1, height)  # of tiny images it can cut nothing
        left, top = min(left, image_width - width), min(top, image_height - height)
        return left, top, left + width, top + height

    def _cut(self, image: EncodedImage, warp: np.ndarray | None, box: tuple[int, int, int, int]) -> torch.Tensor:
        bilinear = torch.rand(()).item() < 0.5  # the recipe draws the filter for each image
        resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        size = self.image_size[::-1]
        if warp is None:
            return resized_crop(image, box, size, resample, self.exact_resize)
        return warped_crop(image, warp, box, size, resample, self.rand_augment.fill, self.exact_resize)

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
