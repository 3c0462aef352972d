"""Image processors for images of another size than they were made for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DeiTImageProcessor

from ..variants import DEFAULT_CROP_PCT, evaluation_image_processor
from .preprocessing import probe_processor, processor_image_size, processor_view


SAME_VIEW = 0.05  # shares of width and height that are closer are equal: images are squashed


def fitted_processor(
    processor: Any,
    image_size: tuple[int, int] | None,
    crop_pct: float | None,
    own_size: tuple[int, int] | None,
) -> Any:
    """An image processor as it is, if nothing else was asked for and it says how it normalizes; or one of the asked-for size and crop,
    with its normalization, filter and view of the image.

    Args:
        processor: Image processor of transformers.
        image_size: Asked-for height and width in pixels; default: its own.
        crop_pct: Share of the resized image that a center crop shall keep; default: its view of the image.
        own_size: Size for which its model was made, for processors that give several sizes.
    """
    own = probe_processor(processor, image_size or own_size)
    image_size = image_size or own.image_size
    std = [1 / (255 * scale) for scale in own.scale]
    mean = [-offset * deviation for offset, deviation in zip(own.offset, std)]
    if crop_pct is not None:
        return evaluation_image_processor(image_size, crop_pct, mean, std, own.resample)
    if processor_image_size(processor) is None:
        return evaluation_image_processor(image_size, DEFAULT_CROP_PCT, mean, std, own.resample)
    if image_size == own.image_size and _states_normalization(processor, mean, std):
        return processor
    across, down = processor_view(processor)
    if abs(across - down) > SAME_VIEW:
        seen = max(across, down)
        stated = getattr(processor, "data_config", {}).get("crop_pct")  # of timm
        if stated is None:
            stated = processor_crop_pct(processor)
            # what was measured is not exact, but some processors (LeViT's) resize to more than they say
            stated = stated if stated is not None and abs(stated - seen) < SAME_VIEW else seen
        return evaluation_image_processor(image_size, stated, mean, std, own.resample)
    # it squashes images, and perhaps leaves a border away
    squashed, crop = (
        {"height": round(height), "width": round(width)}
        for height, width in ((side / down for side in image_size), image_size)
    )
    return DeiTImageProcessor(
        size=squashed,
        crop_size=crop,
        do_center_crop=squashed != crop,
        resample=own.resample,
        image_mean=mean,
        image_std=std,
    )


def _states_normalization(processor: Any, mean: list[float], std: list[float]) -> bool:
    """Whether an image processor says how it normalizes, which training repeats."""
    stated = [getattr(processor, name, None) for name in ("image_mean", "image_std")]
    is_complete = all(isinstance(values, (list, tuple)) and len(values) == len(mean) for values in stated)
    return is_complete and np.allclose(stated, [mean, std], atol=1e-3)


class ImageProcessorTransform:
    """Evaluation preprocessing by an image processor of transformers.

    Args:
        image_processor: Called with one image; must return `pixel_values`.
    """

    def __init__(self, image_processor: Callable):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, *label_map: Any) -> dict[str, torch.Tensor]:
        """Image to `pixel_values` float32 `[3, height, width]`; a label map has no use in evaluation."""
        return {"pixel_values": self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]}


def processor_crop_pct(processor: Any) -> float | None:
    """Share of the resized image's shorter side that the center crop of an image processor keeps, in (0, 1]; `None` if it crops
    nothing."""
    size, crop = getattr(processor, "size", None) or {}, getattr(processor, "crop_size", None)
    if not getattr(processor, "do_center_crop", False) or not crop:
        return None
    shortest, side = (
        size.get("shortest_edge") or min(size.get("height", 0), size.get("width", 0)),
        max(crop["height"], crop["width"]),
    )
    if not shortest:
        return None
    # the roundest share that gives this size, which at another size gives that of the published runs: 224 of 248 is 0.9
    rounded = (round(side / shortest, digits) for digits in (1, 2, 3))
    exact = next((share for share in rounded if share and int(side / share) == shortest), side / shortest)
    return min(1.0, exact)
