"""What image processors do to images, read from their settings, and processors for images of another size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DeiTImageProcessor, LevitImageProcessor, LevitImageProcessorPil, TimmWrapperImageProcessor

from ..data.images import Normalization
from ..variants import DEFAULT_CROP_PCT, evaluation_image_processor


LEVIT_CROP_PCT = 224 / 256  # `LevitImageProcessor.resize`, at every size
CONVNEXT_SQUASHED_SIZE = 384  # `ConvNextImageProcessor.resize` crops nothing from this size on
PROBE_COLOR = (200, 100, 50)


@dataclass(frozen=True)
class ProcessorSettings:
    """What an image processor does to images.

    Args:
        image_size: Height and width in pixels to which it brings all images; `None` if it gives several sizes.
        crop_pct: Share of the resized image that its center crop keeps, in (0, 1].
        squashes: Whether it resizes without keeping the aspect ratio.
        image_mean, image_std: Normalization of images in [0, 1], by channel.
        resample: Filter of Pillow.
    """

    image_size: tuple[int, int] | None
    crop_pct: float
    squashes: bool
    image_mean: list[float]
    image_std: list[float]
    resample: int

    @property
    def view(self) -> tuple[float, float]:
        """Shares of width and height of an image of 8:5 that it shows: (0.625, 1) is the center square."""
        if self.squashes:
            return self.crop_pct, self.crop_pct
        height, width = (self.crop_pct * side / max(self.image_size) for side in self.image_size)
        return min(1.0, 0.625 * width), height


def read_settings(processor: Any) -> ProcessorSettings:
    """The settings of an image processor of transformers."""
    if isinstance(processor, TimmWrapperImageProcessor):
        config = processor.data_config
        geometry = (tuple(config["input_size"][-2:]), config["crop_pct"], config["crop_mode"] == "squash")
        resample = pillow_filter(config["interpolation"])
        return ProcessorSettings(*geometry, list(config["mean"]), list(config["std"]), resample)
    resample = getattr(processor, "resample", None)
    resample = Image.Resampling.BICUBIC if resample is None else Image.Resampling(int(resample))
    return ProcessorSettings(*_geometry(processor), *_normalization(processor), resample)


def pillow_filter(interpolation: str) -> Image.Resampling:
    """The filter of Pillow by its name in timm; bicubic for the names of random ones."""
    filters = {entry.name.lower(): entry for entry in Image.Resampling}
    return filters.get(interpolation, Image.Resampling.BICUBIC)


def checked_settings(processor: Any) -> ProcessorSettings:
    """The settings of an image processor that treats colors as they say.

    Raises:
        ValueError: If it gives no images, exchanges channels, or normalizes in another way than it says.
    """
    settings, name = read_settings(processor), type(processor).__name__
    pixels = processor(images=Image.new("RGB", (256, 256), PROBE_COLOR), return_tensors="pt")["pixel_values"][0]
    if pixels.ndim != 3 or len(pixels) != len(PROBE_COLOR):
        raise ValueError(
            f"{name} makes {tuple(pixels.shape)} of an image, expected (3, height, width); it is not supported."
        )
    center = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].numpy()
    colors = (np.divide([PROBE_COLOR, PROBE_COLOR[::-1]], 255) - settings.image_mean) / settings.image_std
    is_stated, is_swapped = (np.allclose(center, color, rtol=1e-3, atol=1e-3) for color in colors)
    if is_swapped:
        raise ValueError(f"{name} exchanges red and blue; it is not supported.")
    if not is_stated:
        raise ValueError(f"{name} normalizes in another way than its settings say; it is not supported.")
    return settings


def choose_image_size(processor: Any, *sizes: tuple[int, int] | None) -> tuple[int, int]:
    """The first of several sizes that is known.

    Raises:
        ValueError: If none is.
    """
    size = next(filter(None, sizes), None)
    if size is None:
        name = type(processor).__name__
        raise ValueError(f"{name} gives images of several sizes. Give the height and width in pixels (`image_size`).")
    return size


def fitted_processor(
    processor: Any,
    image_size: tuple[int, int] | None,
    crop_pct: float | None,
    model_size: tuple[int, int] | None,
) -> Any:
    """An image processor as it is, if nothing else was asked for and it says how it normalizes; or one of the asked-for size and crop,
    with its normalization, filter and view of the image.

    Args:
        processor: Image processor of transformers.
        image_size: Asked-for height and width in pixels; default: its own.
        crop_pct: Share of the resized image that a center crop shall keep; default: its view of the image.
        model_size: Size for which its model was made, for processors that give several sizes.
    """
    settings = checked_settings(processor)
    normalization = {key: getattr(settings, key) for key in ("image_mean", "image_std", "resample")}
    new_size = choose_image_size(processor, image_size, settings.image_size, model_size)
    if crop_pct is None and new_size == settings.image_size and _states_normalization(processor, settings):
        return processor
    if crop_pct is None and settings.image_size is None:
        crop_pct = DEFAULT_CROP_PCT
    if crop_pct is not None or not settings.squashes:
        return evaluation_image_processor(new_size, crop_pct or settings.crop_pct, **normalization)
    resized = tuple(int(side / settings.crop_pct) for side in new_size)
    size, crop_size = (dict(zip(("height", "width"), sides)) for sides in (resized, new_size))
    return DeiTImageProcessor(size=size, crop_size=crop_size, do_center_crop=size != crop_size, **normalization)


@dataclass(frozen=True)
class Resizing:
    """How an image processor brings an image to its size, all in pixels.

    Args:
        size: Height and width to which images are resized; or the length of the shorter side, where the longer one follows, rounded
            down; `None`: not at all.
        longest_edge: What the longer side will not exceed.
        crop_size: Height and width of the center crop after that, black where the image is smaller.
    """

    size: int | tuple[int, int] | None
    longest_edge: int | None = None
    crop_size: tuple[int, int] | None = None


def stated_resizing(processor: Any) -> Resizing:
    """How a processor of transformers (not that of timm) resizes and crops, by its settings."""
    size = (getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", True) else {}
    shortest, resized = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    crop_pct = getattr(processor, "crop_pct", None)
    if _crops_itself(processor) and shortest:
        if shortest >= CONVNEXT_SQUASHED_SIZE:
            return Resizing((shortest, shortest))
        return Resizing(int(shortest / crop_pct), None, (shortest, shortest))
    if shortest and isinstance(processor, (LevitImageProcessor, LevitImageProcessorPil)):
        shortest = int(shortest / LEVIT_CROP_PCT)
    elif shortest and crop_pct is not None:  # PoolFormer
        shortest = int(shortest / crop_pct)
    crop = None if crop is None else (crop["height"], crop["width"])
    return Resizing(shortest or (resized if all(resized) else None), size.get("longest_edge"), crop)


def _crops_itself(processor: Any) -> bool:
    """Whether a processor crops as ConvNext does, without a `crop_size`."""
    return getattr(processor, "crop_pct", None) is not None and not getattr(processor, "do_center_crop", False)


def _geometry(processor: Any) -> tuple[tuple[int, int] | None, float, bool]:
    """Size of the images that a processor of transformers gives, share that its crop keeps, and whether it squashes."""
    resizing = stated_resizing(processor)
    resized, crop = resizing.size, resizing.crop_size
    squashes = isinstance(resized, tuple)
    if crop is None:
        return (resized if squashes else None), 1.0, True
    if _crops_itself(processor):
        return crop, processor.crop_pct, False
    return crop, _share(crop[0], resized[0]) if squashes else _share(max(crop), resized or max(crop)), squashes


def _share(part: int, whole: int) -> float:
    """The roundest share that gives this part, which at another size gives that of the published runs: 224 of 248 is 0.9."""
    rounded = (round(part / whole, digits) for digits in (1, 2, 3))
    return min(1.0, next((share for share in rounded if share and int(part / share) == whole), part / whole))


def _normalization(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by which a processor of transformers normalizes images in [0, 1]."""
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 255
    mean, std = np.zeros(3), np.ones(3)
    if getattr(processor, "do_normalize", False):
        mean, std = (np.broadcast_to(getattr(processor, name), 3) for name in ("image_mean", "image_std"))
    if getattr(processor, "rescale_offset", False):  # EfficientNet: to [-1, 1]
        mean = mean + 1
    mean, std = mean / scale, std / scale
    if getattr(processor, "include_top", False):  # EfficientNet divides a second time
        std = std * processor.image_std
    return mean.tolist(), std.tolist()


def _states_normalization(processor: Any, settings: ProcessorSettings) -> bool:
    """Whether an image processor says how it normalizes, which training repeats."""
    stated = (np.ravel(getattr(processor, name, None)).tolist() for name in ("image_mean", "image_std"))
    return [*stated] == [settings.image_mean, settings.image_std]


class ImageProcessorTransform:
    """Evaluation preprocessing by an image processor of transformers.

    Args:
        image_processor: Called with one image; must return `pixel_values`.
        as_pixels: Leave the normalization to the device, where the processor has a switch for it: then images are uint8 and come with
            their `normalization`.
    """

    def __init__(self, image_processor: Callable, as_pixels: bool = False):
        self.image_processor, self.normalization = image_processor, None
        if as_pixels and not isinstance(image_processor, TimmWrapperImageProcessor):
            settings = checked_settings(image_processor)
            if (
                self._pixels(Image.new("RGB", (256, 256), PROBE_COLOR)).dtype == torch.uint8
            ):  # else it does more than normalize
                self.normalization = Normalization(settings.image_mean, settings.image_std)

    def __call__(self, image: Image.Image, *label_map: Any) -> dict[str, Any]:
        """Image to `pixel_values` `[3, height, width]`, float32 and normalized, or uint8; a label map has no use in evaluation."""
        if self.normalization is None:
            return {"pixel_values": self.model_input(image)}
        return {"pixel_values": self._pixels(image), "normalization": self.normalization}

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        switches = {"do_rescale": False, "do_normalize": False}
        return self.image_processor(images=image, return_tensors="pt", **switches)["pixel_values"][0]

    def model_input(self, image: Image.Image) -> torch.Tensor:
        """Image to float32 `[3, height, width]`, normalized by the processor."""
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
