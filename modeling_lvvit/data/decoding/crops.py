"""Crops of images in another size, plain or out of an affinely warped image; only what they show is decoded and computed.

Two ways of resampling: `exact`, by Pillow from the pixels of the whole image; and the fast one, in the scale that the crop needs and by
PyTorch, which rounds differently (data/README.md, Decoding, has the differences). Small crops of small images are always exact.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import nn

from .encoded_image import Box, EncodedImage, as_encoded, as_image


SMALL_IMAGE, SMALL_CROP = 256, 64  # pixels of the longer side
FILTER_REACH = 3  # pixels, more than a bicubic filter reads to a side
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
IntBox = tuple[int, int, int, int]


def resized_crop(
    image: EncodedImage, box: Box, size: tuple[int, int], resample: Image.Resampling, exact: bool = False
) -> torch.Tensor:
    """A box of an image in another size, anti-aliased.

    Args:
        box: In pixels.
        size: Width and height of the result in pixels.
        resample: Bilinear or bicubic filter.
        exact: Whether the result equals that of `Image.resize` of the whole image bit for bit.

    Returns:
        uint8 `[3, height, width]`.
    """
    if exact or _is_small(image, size):
        return _as_pixels(_resized_exactly(image, box, size, resample))
    reduction = image.reduction(box, size)
    if reduction > 1:
        return image.resized_from_reduced(box, size, resample, reduction)
    pixels = image.region(_within(image, box, 0))
    if pixels.shape[1:] == size[::-1]:
        return pixels
    return nn.functional.interpolate(_as_batch(pixels), size=size[::-1], mode=MODES[resample], antialias=True)[0]


def resized_box(
    image: Image.Image | EncodedImage, box: Box, size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """A box of an RGB image in another size, by Pillow from all pixels, or in the smaller scale in which libjpeg decodes enough of them.

    Args:
        box: In pixels, within the image.
        size: Width and height of the result in pixels.

    Raises:
        UndecodableError: If the file is damaged, wherever.
    """
    image = as_encoded(image)
    reduction = image.reduction(box, size)
    if reduction > 1:
        return as_image(image.resized_from_reduced(box, size, resample, reduction))
    return image.decode().resize(size, resample, box=box)


def warped_crop(
    image: EncodedImage,
    matrix: np.ndarray,
    box: IntBox,
    size: tuple[int, int],
    resample: Image.Resampling,
    fill: tuple[int, ...],
    exact: bool = False,
) -> torch.Tensor:
    """A crop of an affinely warped image.

    The part that it shows is first brought to the scale of the result with the filter; the fast way then reads it bilinearly for either filter.

    Args:
        matrix: `[3, 3]`, pixel of the warped image (x, y, 1) to pixel of the given one.
        box: The crop in pixels of the warped image.
        size: Width and height of the result in pixels.
        fill: Color of what lies outside the image.
        exact: As in `resized_crop`, next to resampling the whole image and then transforming it.

    Returns:
        uint8 `[3, height, width]`.
    """
    exact = exact or _is_small(image, size)
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
        return torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width)
    region = tuple(int(side) for side in (*low, *high))
    reduced_size = tuple(np.ceil((high - low) / shrink).astype(int).tolist())
    is_reduced = shrink.max() > 1
    if is_reduced:
        to_source[:2] = (to_source[:2] - np.outer(low, [0, 0, 1])) * (reduced_size / (high - low))[:, None]
    if exact:  # places in the whole image: the same less its corner would be rounded differently
        whole = _resized_exactly(image, region, reduced_size, resample) if is_reduced else image.decode()
        data = tuple(to_source[:2].flatten())
        return _as_pixels(whole.transform(size, Image.Transform.AFFINE, data, resample, fillcolor=fill))
    if is_reduced:
        part = resized_crop(image, region, reduced_size, resample)
    else:
        part = image.region(region)
        to_source[:2, 2] -= low
    leaves = bool((corners < low[:, None]).any() or (corners > high[:, None]).any())
    return _read_bilinearly(part, to_source, size, fill if leaves else None)


def _resized_exactly(image: EncodedImage, box: Box, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """`Image.resize` of the whole image, from the part that the filter reads."""
    if image.image is not None:  # decoded already
        return image.decode().resize(size, resample, box=box)
    left, top, right, bottom = _within(image, box, FILTER_REACH * max(1, *_shrink(box, size)))
    part = as_image(image.region((left, top, right, bottom)))
    return part.resize(size, resample, box=(box[0] - left, box[1] - top, box[2] - left, box[3] - top))


def _read_bilinearly(
    pixels: torch.Tensor, to_source: np.ndarray, size: tuple[int, int], fill: tuple[int, ...] | None
) -> torch.Tensor:
    """An affine reading of pixels `[3, rows, columns]`; `fill` where it is outside of them, `None` if it never is."""
    # pixel of the result -> place from -1 to 1 in the pixels
    along_x, along_y, offset = (to_source[:2] * (2 / np.array(pixels.shape[:0:-1]))[:, None]).T.tolist()
    columns, rows = (torch.arange(side) + 0.5 for side in size)
    places = [
        torch.add(columns * along_x[axis], (rows * along_y[axis] + (offset[axis] - 1))[:, None]) for axis in range(2)
    ]  # x and y, [height, width] each
    grid = torch.empty(1, *size[::-1], 2)
    for axis, place in enumerate(places):
        grid[0, :, :, axis] = place
    options = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    read = nn.functional.grid_sample(_as_batch(pixels).float(), grid, **options)[0]
    channels = read.add_(0.5).to(torch.uint8).numpy()  # values are means of 0 to 255
    if fill is not None:
        outside = (torch.maximum(*(place.abs() for place in places)) > 1).numpy()
        for channel, value in zip(channels, fill):
            np.copyto(channel, value, where=outside)
    return torch.from_numpy(np.dstack(list(channels))).permute(2, 0, 1)


def _is_small(image: EncodedImage, size: tuple[int, int]) -> bool:
    """Whether Pillow is as fast for a crop: single calls of PyTorch take longer than so few pixels."""
    return max(image.size) <= SMALL_IMAGE and max(size) <= SMALL_CROP


def _shrink(box: Box, size: tuple[int, int]) -> tuple[float, float]:
    """Source pixels in a pixel of the result, in x and y."""
    return (box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]


def _within(image: EncodedImage, box: Box, margin: float) -> IntBox:
    """The whole pixels around a box with a margin, as far as the image goes."""
    low = (max(0, math.floor(side - margin)) for side in box[:2])
    high = (min(limit, math.ceil(side + margin)) for side, limit in zip(box[2:], image.size))
    return (*low, *high)


def _as_batch(pixels: torch.Tensor) -> torch.Tensor:
    """A batch of one image with strides by which PyTorch knows that the channels of a pixel lie next to each other: its fast way."""
    return pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def _as_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
