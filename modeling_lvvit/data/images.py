"""Reading images: one way for training, evaluation and annotation, so that a label map fits what the model sees."""

import hashlib
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image


# what the functions of this file raise for files that are no images, damaged or too large to be one
IMAGE_ERRORS = (OSError, ValueError)
# what Pillow raises besides; some of its plug-ins let the last five through where a file ends too early
PILLOW_ERRORS = (
    SyntaxError, Image.DecompressionBombError, IndexError, KeyError, TypeError, RuntimeError, struct.error,
)  # fmt: skip
TURNED = range(2, 9)  # Exif orientations other than upright
LYING = range(5, 9)  # those that exchange height and width
_DECODER = datasets.Image()


class SampleError(ValueError):
    """A row of the data cannot be used; found while training."""


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turns what Pillow raises for unusable files into a `ValueError`; for calls of Pillow alone, as it would hide errors of ours."""
    try:
        yield
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error


def decode_stored(value: dict[str, Any]) -> Image.Image:
    """The upright image of an image column's value, in the mode of its file; errors as in `decode_image`."""
    with pillow_errors():
        return _DECODER.decode_example(value)


def decode_image(value: dict[str, Any]) -> Image.Image:
    """The upright 8-bit RGB image of an image column's value, `{"bytes": ..., "path": ...}`.

    Of an animation it is the first frame; transparency is dropped; 16-bit grayscale is scaled, where Pillow alone would
    turn all but the darkest tones white.

    Raises:
        IMAGE_ERRORS: If it is no image, is damaged or too large.
    """
    return to_rgb(decode_stored(value))


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image; a `ValueError` if the pixels are floating point."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.uint8(np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the images with 8 or 16 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def image_note(content: bytes) -> str:
    """What `decode_image` does to an image file beyond reading it, `""` for an upright RGB image."""
    with pillow_errors(), Image.open(io.BytesIO(content)) as image:
        notes = []
        if getattr(image, "n_frames", 1) > 1:
            notes.append("animation, first frame used")
        if image.mode.startswith("I"):
            notes.append("16-bit, scaled to 8")
        elif image.mode in ("L", "1"):
            notes.append("grayscale")
        elif image.mode == "CMYK":
            notes.append("CMYK, converted to RGB")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            notes.append("transparency dropped")
        if image.getexif().get(ExifTags.Base.Orientation) in TURNED:
            notes.append("turned upright as its Exif orientation says")
        return "; ".join(notes)


def read_image_size(value: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the upright image in an image column's value, without decoding it; `None` if it cannot be opened or is a
    remote file."""
    content, path = value["bytes"], value["path"]
    if content is None and (path is None or "://" in path):
        return None
    try:
        with pillow_errors(), Image.open(io.BytesIO(content) if content is not None else path) as image:
            width, height = image.size
            lies_on_side = image.getexif().get(ExifTags.Base.Orientation) in LYING
    except IMAGE_ERRORS:
        return None
    return (width, height) if lies_on_side else (height, width)


def read_orientation(value: dict[str, Any]) -> int:
    """Exif orientation by which `decode_image` turns an image column's value upright, 1 (not at all) to 8; 1 if it cannot be opened."""
    if value["bytes"] is None and value["path"] is None:
        return 1
    try:
        with (
            pillow_errors(),
            io.BytesIO(value["bytes"]) if value["bytes"] is not None else xopen(value["path"], "rb") as file,
            Image.open(file) as image,
        ):
            # Pillow itself turns TIFF files, for everyone who reads them
            orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation)
    except IMAGE_ERRORS:
        return 1
    return orientation if orientation in TURNED else 1


def read_content(value: dict[str, Any]) -> bytes:
    """The bytes of the file behind an image column's value.

    Raises:
        OSError: If the file does not exist or cannot be read.
        ValueError: If there is neither content nor path.
    """
    if value["bytes"] is not None:
        return value["bytes"]
    if value["path"] is None:
        raise ValueError("it has neither content nor path")
    with xopen(value["path"], "rb") as file:
        return file.read()


def content_hash(content: bytes) -> int:
    """64-bit hash of an image file, signed: two rows that share it hold the same file."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def find_image_problem(value: pa.StructScalar) -> str | None:
    """What is wrong with an image file, `None` if nothing seems to be.

    Files are opened and checked for their end (JPEG) or their checksums (PNG); only other formats and doubtful files are
    decoded. Remote files are not looked at.
    """
    content, path = (value["bytes"], value["path"].as_py()) if value.is_valid else (value, None)
    if not content.is_valid:
        if path is None:
            return "no image"
        if "://" in path:
            return None
        if not os.path.isfile(path):
            return "the image file does not exist"
    try:
        with io.BytesIO(content.as_buffer()) if content.is_valid else open(path, "rb") as file:
            if _is_whole(file):
                return None
        decode_image(value.as_py())
    except IMAGE_ERRORS as error:
        return f"the image cannot be decoded ({error})"
    return None


def _is_whole(file: BinaryIO) -> bool:
    """Whether an open JPEG or PNG file can be read and has all its parts; other formats are not judged.

    Raises:
        IMAGE_ERRORS: If it is no image, or its checksums are wrong.
    """
    with pillow_errors(), Image.open(file) as image:
        if image.format == "PNG":
            image.verify()
            return True
    if image.format != "JPEG":
        return False
    file.seek(-16, os.SEEK_END)
    return file.read().rstrip(b"\0").endswith(b"\xff\xd9")


def parse_image_size(
    numbers: list[int] | None, name: str, expected: str = "side or height and width"
) -> tuple[int, int] | None:
    """Height and width in pixels of an option: one number for both, or two; `None` where it was not given.

    Raises:
        ValueError: If there are other numbers; it calls the option `name`, and says what is `expected`.
    """
    if numbers is None:
        return None
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{name} is one {expected}, got {numbers}.")
    return numbers[0], numbers[-1]


class Normalization:
    """8-bit values to normalized ones in one pass, `(x / 255 - mean) / std`.

    Args:
        mean, std: Of each channel, for images in [0, 1].
    """

    def __init__(self, mean: list[float], std: list[float]):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `[3, height, width]` to float32 of the same shape."""
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(self.scale).add_(self.shift)
