"""An image file of which only the header has been read."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from ..images import IMAGE_ERRORS, JPEG_START, TURNED, UndecodableError, decode_image, pillow_errors, read_content
from .jpeg_regions import read_region


JPEG = ("JPEG", "MPO")  # formats of Pillow
REDUCTIONS = (8, 4, 2)  # in which libjpeg decodes without finer detail
UPRIGHT = 1
# Exif orientation -> how stored pixels become upright: exchange rows and columns, then mirror from left to right, from top to bottom
TURNS = {
    UPRIGHT: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class EncodedImage:
    """An RGB image, upright and perhaps mirrored, of which a region is decoded when it is asked for.

    Args:
        size: Width and height in pixels, upright.
        value: Value of an image column, with its `bytes`; `None` for an image that is decoded already.
        orientation: Exif orientation of the file.
        has_regions: Whether regions and smaller scales can be decoded alone: of JPEG files with three channels.
        is_mirrored: Whether left and right are exchanged.
        image: The decoded image, upright and not mirrored, where the file had to be decoded to know it.
    """

    size: tuple[int, int]
    value: dict[str, Any] | None = None
    orientation: int = UPRIGHT
    has_regions: bool = False
    is_mirrored: bool = False
    image: Image.Image | None = None

    @classmethod
    def open(cls, value: dict[str, Any]) -> "EncodedImage":
        """Reads the header of an image column's value; what is no JPEG with three channels is decoded at once.

        Raises:
            UndecodableError: If it is no image, or too large; also what `decode_image` refuses, unless it is such a JPEG.
        """
        with _undecodable():
            value = {**value, "bytes": read_content(value)}
            if not value["bytes"].startswith(JPEG_START):
                return as_encoded(decode_image(value))
            with pillow_errors(), Image.open(io.BytesIO(value["bytes"])) as image:
                if image.format in JPEG and image.mode == "RGB":
                    orientation = image.getexif().get(ExifTags.Base.Orientation)
                    orientation = orientation if orientation in TURNED else UPRIGHT
                    size = image.size[::-1] if TURNS[orientation][0] else image.size
                    return cls(size, value, orientation, has_regions=True)
            return as_encoded(decode_image(value))

    def read_by(self, transform: Any) -> "EncodedImage | Image.Image":
        """What a transform gets: this, if it says that it `reads_regions`, else the decoded image."""
        return self if getattr(transform, "reads_regions", False) else self.decode()

    def mirrored(self) -> "EncodedImage":
        """The same with left and right exchanged."""
        return replace(self, is_mirrored=not self.is_mirrored)

    def decode(self) -> Image.Image:
        """All pixels.

        Raises:
            UndecodableError: As `decode_image`, also for damage in a part that no region shows.
        """
        image = self._whole()
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.is_mirrored else image

    def loaded(self, size: tuple[int, int]) -> "EncodedImage":
        """The same decoded once for several uses, in the smallest scale that has at least `size` pixels, width and height.

        Raises:
            UndecodableError: As `decode`.
        """
        whole = (0, 0, *self.size)
        reduction = self.reduction(whole, size)
        if reduction == 1:
            return as_encoded(self.decode())
        reduced = tuple(side // reduction for side in self.size)
        pixels = self.resized_from_reduced(whole, reduced, Image.Resampling.BOX, reduction)
        return as_encoded(as_image(pixels))

    def reduction(self, box: Box, size: tuple[float, float]) -> int:
        """How many times smaller (1, 2, 4 or 8) the image can be decoded so that a box keeps at least `size` pixels, width and height."""
        if not self.has_regions:
            return 1
        shrink = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
        return next((reduction for reduction in REDUCTIONS if reduction <= shrink), 1)

    def region(self, box: tuple[int, int, int, int]) -> torch.Tensor:
        """Pixels of a box, uint8 `[3, height, width]` with the channels of a pixel next to each other in memory; the values are those of `decode`.

        Raises:
            UndecodableError: If the file is damaged there.
        """
        pixels = None
        if self.has_regions:
            stored_width = self.size[1 if TURNS[self.orientation][0] else 0]
            pixels = read_region(self.value["bytes"], self._stored_box(box, self.orientation), stored_width)
        if pixels is not None:
            return self._turned(pixels, self.orientation)
        whole, upright_box = self._whole(), self._stored_box(box, UPRIGHT)
        part = whole if upright_box == (0, 0, *self.size) else whole.crop(upright_box)
        return self._turned(np.array(part), UPRIGHT)

    def resized_from_reduced(
        self, box: Box, size: tuple[int, int], resample: Image.Resampling, reduction: int
    ) -> torch.Tensor:
        """A box in another size, of the image `reduction` times smaller: libjpeg leaves detail out while it decodes.

        Args:
            box: In pixels of the whole image.
            size: Width and height of the result in pixels.
            resample: Filter from the reduced pixels to the result.
            reduction: 2, 4 or 8, see `reduction`.

        Returns:
            uint8 `[3, height, width]`.

        Raises:
            UndecodableError: If the file is damaged.
        """
        stored_box = tuple(side / reduction for side in self._stored_box(box, self.orientation))
        stored_size = size[::-1] if TURNS[self.orientation][0] else size
        with _undecodable(), pillow_errors(), Image.open(io.BytesIO(self.value["bytes"])) as image:
            image.draft("RGB", (image.width // reduction, image.height // reduction))
            resized = image.resize(stored_size, resample, box=stored_box)
        return self._turned(np.array(resized), self.orientation)

    def _whole(self) -> Image.Image:
        """Upright, not mirrored."""
        if self.image is not None:
            return self.image
        with _undecodable():
            return decode_image(self.value)

    def _stored_box(self, box: Box, orientation: int) -> Box:
        """Where a box lies in the image as `orientation` says that it is stored."""
        (width, height), (left, top, right, bottom) = self.size, box
        swaps, flips_x, flips_y = TURNS[orientation]
        if flips_x != self.is_mirrored:
            left, right = width - right, width - left
        if flips_y:
            top, bottom = height - bottom, height - top
        return (top, left, bottom, right) if swaps else (left, top, right, bottom)

    def _turned(self, pixels: np.ndarray, orientation: int) -> torch.Tensor:
        """Stored pixels `[height, width, 3]` upright, and mirrored where it is; `[3, height, width]`."""
        swaps, flips_x, flips_y = TURNS[orientation]
        pixels = torch.from_numpy(pixels)
        if swaps:
            pixels = pixels.transpose(0, 1)
        axes = [axis for axis, flips in ((0, flips_y), (1, flips_x != self.is_mirrored)) if flips]
        # a copy, in a layout without gaps
        return (pixels.flip(axes) if axes else pixels.contiguous()).permute(2, 0, 1)


@contextmanager
def _undecodable() -> Iterator[None]:
    """`IMAGE_ERRORS` as one error, which is no other's."""
    try:
        yield
    except IMAGE_ERRORS as error:
        raise UndecodableError(str(error)) from error


def as_image(pixels: torch.Tensor) -> Image.Image:
    """Pixels uint8 `[3, height, width]` as an image of Pillow."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def as_encoded(image: Image.Image | EncodedImage) -> EncodedImage:
    """An RGB image of Pillow as one that has been decoded already; encoded ones as they are."""
    return image if isinstance(image, EncodedImage) else EncodedImage(image.size, image=image)
