"""Makes image files smaller, several at a time in worker processes."""

import io
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from PIL import ExifTags, Image

from ..image_dataset import file_hint
from ..images import (
    IMAGE_ERRORS,
    JPEG_START,
    PixelLimit,
    SampleError,
    content_hash,
    examine_image,
    pillow_errors,
    read_content,
    read_orientation,
    to_rgb,
)
from .record import SOURCE_HASH


OVERSAMPLING = 2  # libjpeg decodes at a half, a quarter or an eighth, at least so many times larger than the result
REDUCING_GAP = 3.0  # other files are averaged to at least so many times the result before they are resized


@dataclass(frozen=True)
class Reduction:
    """How images are made smaller.

    Args:
        max_side: Pixels of the longer side.
        quality: Of the JPEG files, 1 to 100.
    """

    max_side: int
    quality: int

    def __call__(self, content: bytes) -> bytes | None:
        """A JPEG file of at most `max_side` pixels; `None` if the image is not larger.

        Colors become what `decode_image` makes of them. The Exif orientation is kept and the pixels lie as in the source, as label maps
        may belong to the image as its file stores it.

        Raises:
            IMAGE_ERRORS: If it is no image, is damaged or too large.
        """
        with pillow_errors(), Image.open(io.BytesIO(content)) as image:
            scale = self.max_side / max(image.size)
            if scale >= 1:
                return None
            size = tuple(max(1, round(side * scale)) for side in image.size)
            image.draft(None, tuple(OVERSAMPLING * side for side in size))  # of JPEG alone
            image.load()
        pixels = image if image.mode == "L" else to_rgb(image)
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
        exif, orientation = Image.Exif(), read_orientation({"bytes": content, "path": None})
        if orientation != 1:
            exif[ExifTags.Base.Orientation] = orientation
        file = io.BytesIO()
        # colors at full resolution: thin colored lines would fade
        pixels.save(file, "JPEG", quality=self.quality, subsampling="4:4:4", exif=exif, comment=b"")
        return file.getvalue()


@dataclass
class CopyFacts:
    """What is known of some copied images.

    Args:
        images, reduced, bytes_before: Number of images, of those that were made smaller, and bytes of the source files.
        notes: Of the reduced ones: what `decode_image` did that other readers do in another way -> number of images.
        damaged: Of the reduced ones: rows with what libjpeg says of them.
        brightest: Of the reduced ones, the largest value of 16-bit grayscale; 0 if there is none.
    """

    images: int = 0
    reduced: int = 0
    bytes_before: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    brightest: int = 0

    def __add__(self, other: "CopyFacts") -> "CopyFacts":
        return CopyFacts(
            self.images + other.images,
            self.reduced + other.reduced,
            self.bytes_before + other.bytes_before,
            dict(sorted((Counter(self.notes) + Counter(other.notes)).items())),
            self.damaged + other.damaged,
            max(self.brightest, other.brightest),
        )


class ReducedRows(torch.utils.data.Dataset):
    """Rows of a dataset with smaller images, by split and range of rows, for a `DataLoader`.

    Args:
        splits: Rows of each split.
        image_column: Their images.
        prefix: What is cut off the paths of images, so that a copy does not depend on where the source lies.
    """

    def __init__(self, splits: dict[str, datasets.Dataset], image_column: str, prefix: str, reduction: Reduction):
        self.splits = {split: rows.with_format("arrow") for split, rows in splits.items()}
        self.schemas = {split: self._schema(rows.features) for split, rows in splits.items()}
        self.image_column, self.prefix, self.reduction = image_column, prefix, reduction
        self.pixel_limit = PixelLimit()  # for the processes that load

    def __getitem__(self, place: tuple[str, range]) -> tuple[pa.Table, CopyFacts] | SampleError:
        """Copied rows; an error that a worker process could not raise as it is."""
        split, rows = place
        table = self.splits[split][rows.start : rows.stop]
        contents, hashes, total = [], [], CopyFacts()
        values = table[self.image_column].to_pylist()
        for row, value in zip(rows, values):
            name = f"row {row}{file_hint(value)}"
            try:
                content, source_hash, facts = self._reduced(value, name)
            except IMAGE_ERRORS as error:
                return SampleError(
                    f"Row {row} of split {split}{file_hint(value)}: {error}. Mend the file, then start again: what was copied so far is "
                    "kept. (Without the image the data is another one, and so is its copy.)"
                )
            contents.append({"bytes": content, "path": self.stored_path(value["path"])})
            hashes.append(source_hash)
            total += facts
        columns = {name: table[name] for name in table.column_names}
        columns[self.image_column] = pa.array(contents, datasets.Image().pa_type)
        columns.setdefault(SOURCE_HASH, pa.array(hashes, pa.int64()))  # of a copy of a copy, that of the first source
        return pa.Table.from_arrays(list(columns.values()), schema=self.schemas[split]), total

    def stored_path(self, path: str | None) -> str | None:
        """The path of an image as the copy has it; its last two parts, which are its key, stay."""
        return path and path.removeprefix(self.prefix)

    def _reduced(self, value: dict[str, Any] | None, name: str) -> tuple[bytes, int, CopyFacts]:
        if value is None:
            raise ValueError("there is no image")
        content = read_content(value)
        smaller = self.reduction(content)
        # what libjpeg says of damage cannot be seen in the copy any more
        is_jpeg = content.startswith(JPEG_START)
        scalar = pa.scalar({"bytes": content, "path": None}, datasets.Image().pa_type)
        report = examine_image(scalar, decode=smaller is not None and is_jpeg)
        if report.problem is not None:
            raise ValueError(report.problem)
        if smaller is None:
            return content, content_hash(content), CopyFacts(1, 0, len(content))
        notes, damaged = dict.fromkeys(report.notes, 1), [f"{name}: {report.damage}"] if report.damage else []
        return smaller, content_hash(content), CopyFacts(1, 1, len(content), notes, damaged, report.brightest or 0)

    def _schema(self, features: datasets.Features) -> pa.Schema:
        if SOURCE_HASH not in features:
            features = datasets.Features({**features, SOURCE_HASH: datasets.Value("int64")})
        return features.arrow_schema


def local_prefix(name: str) -> str:
    """Start of the paths of images in a local dataset, up to its folder, which is left in the copy; "" of others."""
    path = Path(name).expanduser()
    return os.path.join(path.absolute().parent, "") if path.is_dir() else ""
