"""Reading masks: from the value of an image column to class ids."""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from .images import IMAGE_ERRORS, LYING, MAX_VALUE, decode_stored, pillow_errors, upright_size


IGNORED = 255  # what masks usually have where no class is marked
UNKNOWN = -1  # id of a mask value that stands for nothing
MAX_LISTED_VALUES = 10
WHITE = 250  # or more: the brightest value of masks that were smoothed
MAX_SOFT_SHARE = 0.3  # of the pixels between the two values of a mask with soft borders
MANY_VALUES = 16  # more than anyone forgets to name: values in between


@dataclass(frozen=True)
class MaskEncoding:
    """How the values of a mask stand for classes.

    Args:
        num_labels: Number of classes C.
        ignore_index: Mask value of pixels that do not count, and the id that they get.
        reduce_labels: Whether 0 is no class: it is ignored, and 1 is the first class (ADE20K).
        values: Mask value of each class, in the order of the class ids; default: the ids themselves.
    """

    num_labels: int
    ignore_index: int = IGNORED
    reduce_labels: bool = False
    values: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.num_labels < 1:
            raise ValueError(f"There must be classes, got {self.num_labels}.")
        # the default may be the value of a class that was named: in masks of 0 and 255 it is
        if self.ignore_index in self.class_values and (self.values is None or self.ignore_index != IGNORED):
            raise ValueError(
                f"--ignore_index {self.ignore_index} is the value of one of the {self.num_labels} classes, which would never be learned; "
                f"choose another one, for example {MAX_VALUE}."
                + (
                    " Where 0 is no class and 1 the first one, give --reduce_labels true."
                    if not self.ignore_index
                    else ""
                )
            )
        if self.values is None:
            return
        if self.reduce_labels:
            raise ValueError("Give --mask_values or --reduce_labels, not both.")
        if len(set(self.values)) != self.num_labels or not all(0 <= value <= MAX_VALUE for value in self.values):
            raise ValueError(
                f"--mask_values must be {self.num_labels} different values, one for each class, from 0 to {MAX_VALUE}; got "
                f"{list(self.values)}."
            )

    @property
    def class_values(self) -> list[int]:
        """The mask value of each class, in the order of the ids."""
        if self.values is not None:
            return list(self.values)
        return list(range(self.reduce_labels, self.num_labels + self.reduce_labels))

    @property
    def label_ignore_index(self) -> int:
        """The id of pixels that do not count; no id of a class."""
        return IGNORED if self.num_labels <= IGNORED else -100

    def table(self) -> np.ndarray:
        """The class id of each mask value, int32 `(65536,)`; `UNKNOWN` for values that stand for nothing."""
        table = np.full(MAX_VALUE + 1, UNKNOWN, dtype=np.int32)
        if 0 <= self.ignore_index <= MAX_VALUE:
            table[self.ignore_index] = self.label_ignore_index
        if self.reduce_labels:
            table[0] = self.label_ignore_index
        # a class that has the value of the ignored pixels by its own name counts
        table[self.class_values] = np.arange(self.num_labels)
        return table

    def describe(self) -> str:
        """What a mask may hold, for messages."""
        values = self.class_values
        listed = ", ".join(map(str, values)) if len(values) <= 8 or self.values else f"{values[0]} to {values[-1]}"
        ignored = [0] if self.reduce_labels else []
        ignored += [self.ignore_index] if self.ignore_index not in values else []
        text = f"{listed} for {self.num_labels} classes"
        if ignored:
            text += f", and {' and '.join(map(str, ignored))}, which {'is' if len(ignored) == 1 else 'are'} ignored"
        return text


def read_mask(value: dict[str, Any]) -> np.ndarray:
    """The values of a mask, uint8 or uint16 `(height, width)`; of an image with a palette its indices.

    Args:
        value: What an image column holds, `{"bytes": ..., "path": ...}`.

    Raises:
        IMAGE_ERRORS: If it cannot be decoded.
        ValueError: If it is a color image, or has values below 0 or above 65535.
    """
    image = decode_stored(value)
    if image.mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= values.min() <= values.max() <= MAX_VALUE:
            raise ValueError(f"it has values from {values.min()} to {values.max()}; expected 0 to {MAX_VALUE}")
        return values.astype(np.uint16)
    channels = np.asarray(image)
    if image.mode == "RGB" and (channels == channels[..., :1]).all():  # grey, saved as color
        return channels[..., 0]
    raise ValueError(
        f"it is an image of mode {image.mode}; expected one channel with class ids. "
        "lvvit masks --colors turns colors into ids"
    )


def list_values(values: np.ndarray) -> str:
    """The first of some values, for messages."""
    more = ", ..." if len(values) > MAX_LISTED_VALUES else ""
    return ", ".join(map(str, values[:MAX_LISTED_VALUES].tolist())) + more


def unknown_values_problem(unknown: np.ndarray, encoding: MaskEncoding, is_jpeg: bool) -> str:
    """What to say of a mask with values that stand for nothing, and how to mend it."""
    text = f"has the values {list_values(unknown)}; expected {encoding.describe()}"
    if is_jpeg or len(unknown) > MANY_VALUES:
        cause = "the compression of JPEG" if is_jpeg else "resizing with a smooth filter, or drawing with soft borders"
        return f"{text}. Values in between come from {cause}: {NEAREST_VALUES}"
    if encoding.values is None and not encoding.reduce_labels and unknown.tolist() == [encoding.num_labels]:
        return f"{text}. Where 0 is no class and 1 the first one, give --reduce_labels true"
    return text


def has_soft_borders(pixels: np.ndarray) -> bool:
    """Whether masks look like black and white with a few pixels of all grays in between; `pixels` of each value. Class ids would be
    dense among the small values, and 255 alone."""
    values = np.flatnonzero(pixels)
    between = values[1:-1]
    if values[-1] < WHITE or (between > values[-1] // 2).sum() < MANY_VALUES // 2:
        return False
    return (
        pixels[between].sum() < MAX_SOFT_SHARE * pixels.sum() and pixels[between].max() < pixels[values[[0, -1]]].min()
    )


NEAREST_VALUES = (
    "save masks as PNG and resize them to the nearest pixel; lvvit masks --nearest_values 0 255 takes the nearer "
    "one of the values that you name"
)


class FileFacts(NamedTuple):
    """What the header of an image file says; defaults where it cannot be opened, or is remote."""

    size: tuple[int, int] | None = None  # height and width, upright
    is_jpeg: bool = False
    orientation: int = 1  # Exif
    palette: bytes | None = None  # red, green and blue of each value


def read_file_facts(value: dict[str, Any]) -> FileFacts:
    """Facts of the file behind an image column's value, which is not decoded."""
    content, path = value["bytes"], value["path"]
    if content is None and (path is None or "://" in path):
        return FileFacts()
    try:
        with pillow_errors(), Image.open(io.BytesIO(content) if content is not None else path) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            palette = image.palette.palette if image.mode == "P" and image.palette.mode == "RGB" else None
            is_jpeg = image.format in ("JPEG", "MPO")
            return FileFacts(upright_size(image), is_jpeg, orientation, palette and bytes(palette))
    except IMAGE_ERRORS:
        return FileFacts()


def size_problem(mask_size: tuple[int, int], image_size: tuple[int, int], image_orientation: int) -> str:
    """What to say of a mask whose height and width are not those of the upright image."""
    shown = [f"{width} x {height}" for height, width in (mask_size, image_size)]
    text = f"is {shown[0]} pixels (width x height), its image {shown[1]}"
    if image_orientation in LYING and tuple(mask_size) == tuple(image_size)[::-1]:
        text += (
            f" once turned upright, as its Exif orientation ({image_orientation}) says: the mask was made of the image as it is stored. "
            "Turn the mask too, or take the orientation out of the image file"
        )
    return text


def is_turning_unclear(image: FileFacts, mask: FileFacts, size: tuple[int, int]) -> bool:
    """Whether Exif turns an image of a height and width otherwise than its mask, and their sizes would be equal in any case."""
    sizes_tell = (image.orientation in LYING) != (mask.orientation in LYING) and size[0] != size[1]
    return image.orientation != mask.orientation and not sizes_tell
