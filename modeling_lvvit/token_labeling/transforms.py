"""Joint augmentation of an image and its label map.

Geometric operations act on both: a flip mirrors image and map, a crop cuts the image and is handed on as `crop_box`, so
that the map is cropped once, on the device, in the resolution of the tokens. Shear, shift and rotation of RandAugment are one
affine map, by which the picture is resampled once and the label map read once (`label_affine`). Photometric operations touch the image only.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

from .rand_augment import RandAugment


@dataclass(frozen=True)
class AugmentationConfig:
    """Strength of the training augmentation. Defaults: the published recipe.

    Args:
        crop_scale: Smallest and largest area of the crop as a share of the image, in (0, 1].
        crop_ratio: Smallest and largest aspect ratio (width / height) of the crop.
        horizontal_flip: Probability of a mirror image, in [0, 1]. Set it to 0 where left and right carry meaning.
        rand_augment: Policy in timm's notation (see `RandAugment`), or `"none"`.
        color_jitter: Strength of brightness, contrast and saturation changes, at least 0. The published recipe uses none
            beside RandAugment.
        random_erasing: Probability that a rectangle is replaced by normal noise after normalisation, in [0, 1]; area
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


def region_affine(map_box: tuple[float, float, float, float]) -> np.ndarray:
    """Takes fractions of the image to fractions of the region that the map covers.

    Args:
        map_box: The region, (left, top, right, bottom) as fractions of the image.

    Returns:
        `[3, 3]` float64, for (x, y, 1).
    """
    left, top, right, bottom = map_box
    width, height = right - left, bottom - top
    return np.array([[1 / width, 0, -left / width], [0, 1 / height, -top / height], [0, 0, 1]])


def crop_of_moved_picture(
    image: Image.Image,
    matrix: np.ndarray,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    resample: Image.Resampling,
    fill: tuple[int, ...],
) -> Image.Image:
    """A crop of an affinely moved picture; only the part that the crop shows is ever computed.

    Args:
        image: The picture.
        matrix: `[3, 3]`, pixel of the moved picture (x, y, 1) to pixel of the given one.
        box: The crop in pixels of the moved picture, (left, top, right, bottom).
        size: Width and height of the result in pixels.
        resample: Filter.
        fill: Colour of what lies outside the picture.
    """
    left, top, right, bottom = box
    shrink = max(1, min((right - left) // (2 * size[0]), (bottom - top) // (2 * size[1])))
    if shrink > 1:  # a large photograph: averaged first, so that the affine step reads few pixels and none is left out
        image = image.reduce(shrink)
    scale = np.diag([1 / shrink, 1 / shrink, 1.0])
    to_source = scale @ matrix @ np.array([[1, 0, left], [0, 1, top], [0, 0, 1]]) @ np.linalg.inv(scale)
    moved_size = (round((right - left) / shrink), round((bottom - top) / shrink))
    data = tuple(to_source[:2].flatten())
    moved = image.transform(moved_size, Image.Transform.AFFINE, data, resample, fillcolor=fill)
    return moved.resize(size, resample)


class TrainTransform:
    """Random flip, RandAugment, random resized crop, colour jitter, normalisation and random erasing.

    The order and the frame of the geometry are those of the published recipe: RandAugment moves the whole picture, then the
    crop is cut. RandAugment's colour operations act on the crop (as in timm), not on the whole picture: those that look at
    the whole histogram see the part that is used.

    Randomness comes from the global generators of PyTorch and Python, which `randomness.seeded` starts for every sample.

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
        policy = self.augmentation.rand_augment
        self.rand_augment = RandAugment(policy, self.image_mean) if policy != "none" else None
        jitter = self.augmentation.color_jitter
        self.color_jitter = v2.ColorJitter(jitter, jitter, jitter) if jitter else None
        erasing = self.augmentation.random_erasing
        self.random_erasing = (
            v2.RandomErasing(erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random") if erasing else None
        )

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
            `pixel_values` float32 `[3, height, width]`; where given, the flipped `token_label_ids` and
            `token_label_scores`; and where the crop lies: `crop_box` float32 `[4]`, (left, top, right, bottom). Without
            RandAugment these are fractions of the region that the flipped map covers (below 0 or above 1 where the crop
            leaves it). With it they are fractions of the moved picture, and `label_affine` float32 `[2, 3]` and `image_box`
            float32 `[4]` lead from there to the map (see `label_crops.CropGeometry`).
        """
        sample = {}
        if torch.rand(()).item() < self.augmentation.horizontal_flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            map_box = (1 - map_box[2], map_box[1], 1 - map_box[0], map_box[3])
            if token_label_ids is not None:
                token_label_ids, token_label_scores = token_label_ids[..., ::-1], token_label_scores[..., ::-1]
        if token_label_ids is not None:
            sample["token_label_ids"] = torch.from_numpy(token_label_ids.copy())
            sample["token_label_scores"] = torch.from_numpy(token_label_scores.copy())
        moved, colours = self.rand_augment.draw(image.size) if self.rand_augment is not None else (None, [])
        sample |= self._places(moved, box := self._draw_crop(image), image.size, map_box)
        image = self._cut(image, moved, box)
        for operation in colours:
            image = operation(image)
        if self.color_jitter is not None:
            image = self.color_jitter(image)
        pixel_values = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
        pixel_values = F.normalize(pixel_values, self.image_mean, self.image_std, inplace=True)
        if self.random_erasing is not None:
            pixel_values = self.random_erasing(pixel_values)
        return {"pixel_values": pixel_values, **sample}

    def _draw_crop(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Left, top, right and bottom in pixels."""
        top, left, height, width = RandomResizedCrop.get_params(
            image, list(self.augmentation.crop_scale), list(self.augmentation.crop_ratio)
        )
        return left, top, left + width, top + height

    def _cut(self, image: Image.Image, moved: np.ndarray | None, box: tuple[int, int, int, int]) -> Image.Image:
        bilinear = torch.rand(()).item() < 0.5  # the recipe draws the filter for each image
        resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        size = self.image_size[::-1]
        if moved is None:
            return image.resize(size, resample, box=box)
        return crop_of_moved_picture(image, moved, box, size, resample, self.rand_augment.fill)

    def _places(
        self,
        moved: np.ndarray | None,
        box: tuple[int, int, int, int],
        image_size: tuple[int, int],
        map_box: tuple[float, float, float, float],
    ) -> dict[str, torch.Tensor]:
        """Where the crop lies in the map: the fields of `CropGeometry`."""
        pixels = np.diag([*image_size, 1.0])
        to_map = region_affine(map_box)
        crop = np.array([box[:2], box[2:]]) / image_size
        if self.rand_augment is None:
            return {"crop_box": _corners(to_map, crop)}
        affine = to_map if moved is None else to_map @ np.linalg.inv(pixels) @ moved @ pixels
        return {
            "crop_box": _corners(np.eye(3), crop),
            "label_affine": torch.tensor(affine[:2], dtype=torch.float32),
            "image_box": _corners(to_map, np.array([[0.0, 0.0], [1.0, 1.0]])),
        }


def _corners(affine: np.ndarray, corners: np.ndarray) -> torch.Tensor:
    """Two corners `[2, 2]` taken elsewhere by an affine map without rotation, as a box float32 `[4]`."""
    moved = corners @ affine[:2, :2].T + affine[:2, 2]
    return torch.tensor(moved.flatten(), dtype=torch.float32)
