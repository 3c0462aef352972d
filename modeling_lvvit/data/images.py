"""Reading images: one way for training, evaluation and annotation, so that a label map fits what the model sees."""

import functools
import hashlib
import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.io import decode_jpeg


# what the functions of this file raise for files that are no images, damaged or too large to be one
IMAGE_ERRORS = (OSError, ValueError)
# what Pillow raises besides; some of its plug-ins let the last five through where a file ends too early
PILLOW_ERRORS = (SyntaxError, IndexError, KeyError, TypeError, RuntimeError, struct.error)
JPEG_START = b"\xff\xd8"  # of a file
MAX_VALUE = 65_535  # of a pixel: 16 bits
TURNED = range(2, 9)  # Exif orientations other than upright
LYING = range(5, 9)  # those that exchange height and width
MAX_PIXELS_HELP = "Largest image in pixels, width times height; default: 178,956,970, the limit of Pillow."
# notes on images that other readers read in another way
SIXTEEN_BITS, TRANSPARENT = "16-bit, scaled to 8", "transparency dropped"
ROTATED = "turned upright as its Exif orientation says"
_DECODER = datasets.Image()


class SampleError(ValueError):
    """A row of the data cannot be used; found while training."""


class UndecodableError(ValueError):
    """An image file cannot be read or decoded."""


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turns what Pillow raises for unusable files into `IMAGE_ERRORS`; for calls of Pillow alone, as it would hide errors of ours."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise OSError(str(error).partition(" <")[0]) from error  # without the address of a buffer
    except Image.DecompressionBombError as error:
        reason = str(error).partition(",")[0]
        raise ValueError(f"{reason}; `max_image_pixels` allows more, or save the image smaller") from error
    except PILLOW_ERRORS as error:
        raise ValueError(str(error)) from error


@dataclass(frozen=True)
class PixelLimit:
    """How many pixels (width times height) an image may have; `None` leaves the limit as it is, by default 178,956,970.

    Pillow keeps the limit for the whole process. Datasets hold a `PixelLimit`, so that it reaches the processes that load them.

    Raises:
        ValueError: If it is less than 1.
    """

    max_image_pixels: int | None = None

    def __post_init__(self):
        if self.max_image_pixels is None:
            return
        if self.max_image_pixels < 1:
            raise ValueError(f"`max_image_pixels` must be at least 1, got {self.max_image_pixels}.")
        # Pillow warns from there on, and refuses twice as many
        Image.MAX_IMAGE_PIXELS = -(-self.max_image_pixels // 2)
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    def __reduce__(self):
        return PixelLimit, (2 * (Image.MAX_IMAGE_PIXELS or 1 << 40),)


def decode_stored(value: dict[str, Any]) -> Image.Image:
    """The upright image of an image column's value, in the mode of its file; errors as in `decode_image`."""
    if value["bytes"] is None and value["path"] and "://" not in value["path"]:
        # Pillow maps files that it opens by name into memory, and mixes up the pixels of TIFF files that lie on their side
        value = {**value, "bytes": read_content(value)}
    with pillow_errors():
        return _DECODER.decode_example(value)


def decode_image(value: dict[str, Any]) -> Image.Image:
    """The upright 8-bit RGB image of an image column's value, `{"bytes": ..., "path": ...}`.

    Of an animation it is the first frame; transparency is dropped, color profiles are not applied; 16-bit grayscale is scaled, where
    Pillow alone would turn all but the darkest tones white. `export/predict.py` does the same.

    Raises:
        IMAGE_ERRORS: If it is no image, is damaged or too large.
    """
    return to_rgb(decode_stored(value))


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image; a `ValueError` if the pixels are floating point, or integers beyond 16 bits."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the images with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > MAX_VALUE:
            raise ValueError(
                f"its values are {values.min()} to {values.max()}, expected 0 to {MAX_VALUE}; save the images with 8 or 16 bits"
            )
        image = Image.fromarray(np.uint8(values // 257))
    return image if image.mode == "RGB" else image.convert("RGB")


def image_note(content: bytes) -> str:
    """What `decode_image` does to an image file beyond reading it, `""` for an upright RGB image."""
    with pillow_errors(), Image.open(io.BytesIO(content)) as image:
        notes = ["animation, first frame used"] if getattr(image, "n_frames", 1) > 1 else []
        if image.mode in ("L", "1"):
            notes.append("grayscale")
        elif image.mode == "CMYK":
            notes.append("CMYK, converted to RGB")
        return "; ".join([*notes, *reading_notes(image)])


def reading_notes(image: Image.Image, with_exif: bool = True) -> list[str]:
    """What is done to an opened image that other readers do in another way. For its Exif data a PNG may have to be decoded."""
    notes = [SIXTEEN_BITS] if image.mode.startswith("I") else []
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        notes.append(TRANSPARENT)
    if with_exif and image.getexif().get(ExifTags.Base.Orientation) in TURNED:
        notes.append(ROTATED)
    return notes


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image once it is upright."""
    width, height = image.size
    # of TIFF, Pillow says the upright size
    lies_on_side = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in LYING
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


@dataclass(frozen=True)
class ImageReport:
    """What was seen of an image file.

    Args:
        problem: Why it cannot be used, `None` if nothing seems to be wrong.
        damage: What libjpeg says of it, where it can be read nevertheless.
        notes: See `reading_notes`.
        brightest: Largest value of 16-bit grayscale.
    """

    problem: str | None = None
    damage: str | None = None
    notes: tuple[str, ...] = ()
    brightest: int | None = None


def examine_image(value: pa.StructScalar, decode: bool = False) -> ImageReport:
    """Looks at an image file. It is opened and checked for its end (JPEG) or its checksums (PNG); only other formats, 16-bit and
    doubtful files are decoded. Remote files are not looked at.

    Args:
        value: Of an image column.
        decode: Decodes every file, with `jpeg_damage`.
    """
    content, path = (value["bytes"], value["path"].as_py()) if value.is_valid else (value, None)
    if not content.is_valid:
        if path is None:
            return ImageReport("no image")
        if "://" in path:
            return ImageReport()
        if not os.path.isfile(path):
            return ImageReport("the image file does not exist")
    damage = brightest = None
    try:
        with io.BytesIO(content.as_buffer()) if content.is_valid else open(path, "rb") as file:
            with pillow_errors(), Image.open(file) as image:
                file_format = image.format
                notes = tuple(reading_notes(image, file_format != "PNG" or "exif" in image.info))
                if file_format == "PNG":
                    image.verify()
            is_whole = file_format == "PNG" and not decode
            if file_format in ("JPEG", "MPO"):
                file.seek(-16, os.SEEK_END)
                is_whole = file.read().rstrip(b"\0").endswith(b"\xff\xd9")
                if decode and libjpeg_reports_damage():
                    file.seek(0)
                    damage = jpeg_damage(file.read())
                elif decode:
                    is_whole = False
        if damage or not is_whole or SIXTEEN_BITS in notes:
            stored = decode_stored(value.as_py())
            to_rgb(stored)
            brightest = int(np.asarray(stored).max()) if SIXTEEN_BITS in notes else None
    except IMAGE_ERRORS as error:
        return ImageReport(f"the image cannot be decoded ({error})")
    return ImageReport(None, damage, notes, brightest)


def jpeg_damage(content: bytes) -> str | None:
    """What libjpeg says while it decodes a file, `None` if it has nothing to say. It fills in what it cannot read and writes to
    standard error, which is read here: for processes that do nothing else meanwhile."""
    read_end, write_end = os.pipe()
    standard_error = os.dup(2)
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would be read as well
            decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        message = None
    except RuntimeError as error:  # also for kinds of JPEG that only Pillow reads
        message = str(error).partition("\n")[0].rpartition(", ")[2]
    finally:
        os.dup2(standard_error, 2)
        os.close(standard_error)
    with open(read_end, encoding="utf-8", errors="replace") as words:
        return words.read().strip() or message


@functools.cache
def libjpeg_reports_damage() -> bool:
    """Whether `jpeg_damage` works with this build of torchvision: not without its decoders, or if its libjpeg is silent."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 64).save(file, "JPEG")
    content = file.getvalue()
    return jpeg_damage(content) is None and jpeg_damage(content[:-200] + content[-2:]) is not None


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


@dataclass(frozen=True)
class Normalization:
    """8-bit values to normalized ones in one pass, `(x / 255 - mean) / std`.

    Args:
        mean, std: Of each channel, for images in [0, 1].
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 `[..., 3, height, width]` to float32 of the same shape, on the same device."""
        scale, shift = _scale_and_shift(self, pixels.device)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.mul_(scale).add_(shift)


@functools.lru_cache(maxsize=16)
def _scale_and_shift(normalization: Normalization, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors and summands of the channels, `[3, 1, 1]`, copied to a device once."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalization.mean, normalization.std))
        return (1 / (255 * std)).to(device), (-mean / std).to(device)
