"""Reading masks: from the value of an image column to class ids."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .images import MAX_VALUE, decode_stored


IGNORED = 255  # what masks usually have where no class is marked
UNKNOWN = -1  # id of a mask value that stands for nothing


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
        "dataset_scripts/image_mask_folder.py --colors turns colors into ids"
    )
