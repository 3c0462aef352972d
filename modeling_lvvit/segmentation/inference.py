"""Segmentation of whole images by a model that was trained on crops: in overlapping windows, at one or several scales."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..data.masks import MaskEncoding
from .transforms import evaluation_size


# window and stride in pixels, and the scales of the multi-scale evaluation, of the published runs (512 pixels, ADE20K)
WINDOW, STRIDE = (512, 512), (341, 341)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

CLASSES_AT_A_TIME = 8  # of which maps of the size of an image are in memory together

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class InferenceSettings:
    """How whole images are segmented: see `sliding_window_logits`, `transforms.evaluation_size` for the sides, and
    `multi_scale_probabilities`; with the single scale 1 and no mirror image nothing is averaged."""

    window: tuple[int, int] = WINDOW
    stride: tuple[int, int] = STRIDE
    short_side: int | None = None
    long_side: int | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def record(self, encoding: MaskEncoding) -> dict[str, Any]:
        """These settings and how masks are read, for a configuration or results: whatever changes the score of a model."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        values = None if encoding.values is None else list(encoding.values)
        masks = {"ignore_index": encoding.ignore_index, "reduce_labels": encoding.reduce_labels, "mask_values": values}
        return settings | masks


def trained_inference(config: PretrainedConfig, processor: Any | None) -> InferenceSettings:
    """How the evaluation of its training segmented images at a single scale, by the configuration of a model; where that does not say
    it, in the size of the image processor, in windows of the size of its training crops, every two thirds of them."""
    saved = getattr(config, "segmentation_inference", None)
    if saved is not None:
        window, stride = tuple(saved["window"]), tuple(saved["stride"])
        return InferenceSettings(window, stride, saved["short_side"], saved["long_side"])
    size = processor.size if processor is not None and processor.do_resize else {}
    window = tuple(config.image_height_width)
    sides = (size.get("shortest_edge"), size.get("longest_edge"))
    return InferenceSettings(window, default_stride(window), *sides)


def default_stride(window: Sequence[int]) -> tuple[int, ...]:
    """Two thirds of a window, as in the published evaluation."""
    return tuple(max(1, 2 * side // 3) for side in window)


def resized(maps: torch.Tensor, size: tuple[int, int], antialias: bool = False) -> torch.Tensor:
    """Maps `(B, C, h, w)` at another height and width, bilinear; `antialias` averages what a smaller map cannot show, as image
    processors do with images."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False, antialias=antialias)


@torch.no_grad()
def predict_classes(
    forward: Forward,
    pixel_values: torch.Tensor,
    settings: InferenceSettings | None = None,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The class of every pixel of images of one size.

    Args:
        forward: See `sliding_window_logits`.
        pixel_values: `(B, channels, height, width)` in their own size.
        size: Height and width of the result; default: those of the images.

    Returns:
        int64 `(B, *size)`.
    """
    settings = settings or InferenceSettings()
    image_size = pixel_values.shape[-2:]
    base_size = evaluation_size(image_size, settings.short_side, settings.long_side)
    windows = (settings.window, settings.stride)
    if settings.scales == (1.0,) and not settings.flip:
        maps = sliding_window_logits(forward, resized(pixel_values, base_size, antialias=True), *windows)
    else:
        maps = multi_scale_probabilities(
            forward, pixel_values, settings.scales, settings.flip, *windows, base_size=base_size
        )
    return best_classes(maps, size or image_size)


def best_classes(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The class with the largest value in maps `(B, C, h, w)`, at another height and width: int64 `(B, *size)`. The maps are enlarged a
    few classes at a time, so that memory does not grow with their number."""
    best = values = None
    for first in range(0, maps.shape[1], CLASSES_AT_A_TIME):
        part, ids = resized(maps[:, first : first + CLASSES_AT_A_TIME], size).max(dim=1)
        ids = ids + first
        if best is None:
            best, values = ids, part
        else:
            is_better = part > values  # of equal values the first one holds, as with argmax
            best, values = torch.where(is_better, ids, best), torch.where(is_better, part, values)
    return best


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover an axis; the last one ends with it.

    Example: windows of 4 with a stride of 3 begin on an axis of 9 at 0, 3 and 5.
    """
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


def sliding_window_logits(
    forward: Forward,
    pixel_values: torch.Tensor,
    window: tuple[int, int] = WINDOW,
    stride: tuple[int, int] = STRIDE,
) -> torch.Tensor:
    """Logits of whole images, averaged where windows overlap.

    Args:
        forward: `(B, channels, h, w)` to logits `(B, C, any height, any width)` of the same field.
        pixel_values: `(B, channels, height, width)`. Where a side is shorter than the window, the window is as short.
        window, stride: Height and width in pixels; a stride may not be larger than the window.

    Returns:
        `(B, C, height, width)`, float32.

    Raises:
        ValueError: If windows would leave pixels out.
    """
    if not all(0 < step <= side for step, side in zip(stride, window)):
        raise ValueError(
            f"A stride must lie between 1 and the side of the window, got {stride} for windows of {window}."
        )
    height, width = pixel_values.shape[-2:]
    rows, columns = min(window[0], height), min(window[1], width)
    total = counts = None
    for top in window_starts(height, rows, stride[0]):
        for left in window_starts(width, columns, stride[1]):
            field = (..., slice(top, top + rows), slice(left, left + columns))
            logits = resized(forward(pixel_values[field]).float(), (rows, columns))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
                counts = logits.new_zeros(height, width)
            total[field] += logits
            counts[field] += 1
    return total.div_(counts)


def multi_scale_probabilities(
    forward: Forward,
    pixel_values: torch.Tensor,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    window: tuple[int, int] = WINDOW,
    stride: tuple[int, int] = STRIDE,
    base_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Class probabilities, averaged over sizes of the image and its mirror image.

    Args:
        forward, window, stride: See `sliding_window_logits`.
        pixel_values: `(B, channels, height, width)`.
        scales: Factors of height and width.
        flip: Whether to add the mirror image at every scale.
        base_size: Height and width of scale 1 and of the result; default: those of the images. All sizes are made of the images
            as they are.

    Returns:
        `(B, C, *base_size)`, float32, sums to 1 over the classes.
    """
    size = tuple(base_size or pixel_values.shape[-2:])
    total = 0.0
    for scale in scales:
        scaled = tuple(max(1, round(side * scale)) for side in size)
        images = resized(pixel_values, scaled, antialias=True)
        for is_flipped in (False, True) if flip else (False,):
            view = images.flip(-1) if is_flipped else images
            logits = resized(sliding_window_logits(forward, view, window, stride), size)
            probabilities = logits.softmax(dim=1)
            total = total + (probabilities.flip(-1) if is_flipped else probabilities)
    return total / (len(scales) * (2 if flip else 1))
