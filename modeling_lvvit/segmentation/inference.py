"""Segmentation of whole pictures by a model that was trained on crops: in overlapping windows, at one or several scales."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


# window and stride in pixels, and the scales of the multi-scale evaluation, of the published runs (512 pixels, ADE20K)
WINDOW, STRIDE = (512, 512), (341, 341)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

Forward = Callable[[torch.Tensor], torch.Tensor]


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps `(B, C, h, w)` at another height and width, bilinear."""
    return nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


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
    """Logits of whole pictures, averaged where windows overlap.

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
) -> torch.Tensor:
    """Class probabilities, averaged over sizes of the picture and its mirror image.

    Args:
        forward, window, stride: See `sliding_window_logits`.
        pixel_values: `(B, channels, height, width)`.
        scales: Factors of height and width.
        flip: Whether to add the mirror image at every scale.

    Returns:
        `(B, C, height, width)`, float32, sums to 1 over the classes.
    """
    size = pixel_values.shape[-2:]
    total = 0.0
    for scale in scales:
        scaled = tuple(max(1, round(side * scale)) for side in size)
        pictures = pixel_values if scaled == tuple(size) else resized(pixel_values, scaled)
        for is_flipped in (False, True) if flip else (False,):
            view = pictures.flip(-1) if is_flipped else pictures
            logits = resized(sliding_window_logits(forward, view, window, stride), size)
            probabilities = logits.softmax(dim=1)
            total = total + (probabilities.flip(-1) if is_flipped else probabilities)
    return total / (len(scales) * (2 if flip else 1))
