"""A view of a `datasets.Dataset` whose rows become training or evaluation samples."""

import io
import os
from collections.abc import Callable
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from tqdm.auto import tqdm

from .label_columns import LabelMapError, check_column_types, label_map_problems, to_numpy


MAX_REPORTED_PROBLEMS = 10
ROWS_PER_CHECK = 512
# what Pillow raises for files that are no pictures, damaged or too large to be one
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class ImageProcessorTransform:
    """Evaluation preprocessing by an image processor of transformers.

    Args:
        image_processor: Called with one picture; must return `pixel_values`.
    """

    def __init__(self, image_processor: Callable):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, *label_map: np.ndarray) -> dict[str, torch.Tensor]:
        """Picture to `pixel_values` float32 `[3, height, width]`; a label map has no use in evaluation."""
        return {"pixel_values": self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]}


class TokenLabelDataset(torch.utils.data.Dataset):
    """Decodes images and label maps of a `datasets.Dataset` and transforms them together.

    Rows are fetched in Arrow format, a batch at a time, so that label maps never become Python lists.

    Args:
        dataset: Rows with an image column and an integer or `ClassLabel` column.
        transform: Called with a picture, and with its map's ids and scores where there are maps; returns a dict of
            tensors (`TrainTransform`, `ImageProcessorTransform`).
        image_column, label_column: Column names.
        ids_column, scores_column: Dense-label columns, or `None` for both.
        name: What messages call the data set.

    Raises:
        ValueError: If a column is missing or has a wrong type.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable,
        image_column: str = "image",
        label_column: str = "label",
        ids_column: str | None = None,
        scores_column: str | None = None,
        name: str = "train",
    ):
        if (ids_column is None) != (scores_column is None):
            raise ValueError("Give both dense-label columns, ids and scores, or neither.")
        self.transform = transform
        self.image_column, self.label_column = image_column, label_column
        self.ids_column, self.scores_column = ids_column, scores_column
        self.name = name
        columns = [c for c in (image_column, label_column, ids_column, scores_column) if c is not None]
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The {name} data has no column {', '.join(map(repr, missing))}; it has {dataset.column_names}."
            )
        if not isinstance(dataset.features[image_column], datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image())
        self.label_feature = dataset.features[label_column]
        label_type = dataset.features.arrow_schema.field(label_column).type
        if not pa.types.is_integer(label_type):
            raise ValueError(f"Column {label_column!r} of the {name} data must hold class ids, got {label_type}.")
        self.rows = dataset.select_columns(columns).with_format("arrow")
        if self.has_label_maps:
            schema = self.rows.features.arrow_schema
            check_column_types(schema.field(ids_column).type, schema.field(scores_column).type)
        self._decoder = datasets.Image()

    @property
    def has_label_maps(self) -> bool:
        """Whether samples carry dense labels."""
        return self.ids_column is not None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Samples of several rows; PyTorch's `DataLoader` calls this once for each batch."""
        table = self.rows[indices]
        maps = [()] * len(indices)
        if self.has_label_maps:
            maps = list(
                zip(self._maps(table, self.ids_column, indices), self._maps(table, self.scores_column, indices))
            )
        images, labels = table[self.image_column], table[self.label_column].to_pylist()
        samples = []
        for offset, index in enumerate(indices):
            sample = self.transform(self._decode(images[offset].as_py(), index), *maps[offset])
            samples.append({**sample, "labels": labels[offset]})
        return samples

    def picture(self, index: int) -> Image.Image:
        """The undecorated RGB picture of a row."""
        return self._decode(self.rows[index][self.image_column][0].as_py(), index)

    def labels(self, count: int) -> list[int]:
        """Class ids of the first `count` rows."""
        return self.rows[:count][self.label_column].to_pylist()

    def label_map(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of a row, `[K, rows, columns]` each, before any transform."""
        table = self.rows[[index]]
        return self._maps(table, self.ids_column, [index])[0], self._maps(table, self.scores_column, [index])[0]

    def check_num_classes(self, num_classes: int) -> None:
        """Raises a `ValueError` if the class names of the data are not as many as the model's outputs."""
        if isinstance(self.label_feature, datasets.ClassLabel) and self.label_feature.num_classes != num_classes:
            raise ValueError(
                f"The {self.name} data has {self.label_feature.num_classes} classes in column {self.label_column!r}, the "
                f"model has {num_classes}. Give the model as many classes (`num_labels`; with a pretrained model also "
                "`ignore_mismatched_sizes=True`, which makes new heads)."
            )

    def check_rows(self, num_classes: int) -> None:
        """Looks at every row before training: labels and label maps wholly, image files for being there and whole.

        Image files are opened and checked for their end (JPEG) or their checksums (PNG); only other formats and doubtful
        files are decoded.

        Raises:
            ValueError: With the first problems found, each with its row.
        """
        problems: list[str] = []
        map_shape = None
        for start in tqdm(range(0, len(self), ROWS_PER_CHECK), desc=f"Checking {self.name} data", unit="batch"):
            table = self.rows[start : start + ROWS_PER_CHECK]
            found = self._label_problems(table, num_classes)
            if self.has_label_maps:
                map_problems, map_shape = self._map_problems(table, num_classes, map_shape)
                found += map_problems
            images = ((offset, self._image_problem(value)) for offset, value in enumerate(table[self.image_column]))
            found += [(offset, text) for offset, text in images if text]
            for offset, text in sorted(found):
                problems.append(f"row {start + offset}{_file_hint(table[self.image_column][offset].as_py())}: {text}")
            if len(problems) >= MAX_REPORTED_PROBLEMS:
                problems[MAX_REPORTED_PROBLEMS:] = ["... (the check stopped here)"]
                break
        if problems:
            raise ValueError(f"The {self.name} data has rows that cannot be used:\n  " + "\n  ".join(problems))

    def _label_problems(self, table: pa.Table, num_classes: int) -> list[tuple[int, str]]:
        labels = table[self.label_column]
        bad = pc.fill_null(pc.or_(pc.less(labels, 0), pc.greater_equal(labels, num_classes)), True)
        offsets = np.flatnonzero(bad.to_numpy()).tolist()
        return [(offset, f"class id {labels[offset]} is outside [0, {num_classes})") for offset in offsets]

    def _map_problems(
        self, table: pa.Table, num_classes: int, expected_shape: tuple[int, ...] | None
    ) -> tuple[list[tuple[int, str]], tuple[int, ...] | None]:
        """Problems of the label maps, and the `[K, rows, columns]` that all blocks must share."""
        try:
            ids, scores = to_numpy(table[self.ids_column]), to_numpy(table[self.scores_column])
        except LabelMapError as error:
            return [(error.row, str(error))], expected_shape
        if expected_shape is not None and ids.shape[1:] != expected_shape:
            text = f"its label map has [K, rows, columns] {list(ids.shape[1:])}, earlier rows {list(expected_shape)}"
            return [(0, text)], expected_shape
        return label_map_problems(ids, scores, num_classes), ids.shape[1:]

    def _image_problem(self, value: pa.StructScalar) -> str | None:
        """What is wrong with an image file, `None` if nothing seems to be."""
        if not value.is_valid:
            return "no image"
        content, path = value["bytes"], value["path"].as_py()
        if not content.is_valid and path is None:
            return "no image"
        if not content.is_valid and "://" in path:
            return None
        if not content.is_valid and not os.path.isfile(path):
            return "the image file does not exist"
        try:
            with io.BytesIO(content.as_buffer()) if content.is_valid else open(path, "rb") as file:
                if _is_whole(file):
                    return None
            to_rgb(self._decoder.decode_example(value.as_py()))
        except IMAGE_ERRORS as error:
            return f"the image cannot be decoded ({error})"
        return None

    def _decode(self, value: dict[str, Any] | None, index: int) -> Image.Image:
        if value is None:
            raise ValueError(f"Row {index} of the {self.name} data has no image.")
        try:
            return to_rgb(self._decoder.decode_example(value))
        except IMAGE_ERRORS as error:
            raise ValueError(
                f"Row {index} of the {self.name} data{_file_hint(value)}: the image cannot be decoded ({error})."
            ) from error

    def _maps(self, table: pa.Table, column: str, indices: list[int]) -> np.ndarray:
        try:
            return to_numpy(table[column])
        except LabelMapError as error:
            raise ValueError(
                f"Column {column!r} of the {self.name} data, row {indices[error.row]}: {error}."
            ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB picture; 16-bit greyscale is scaled, where Pillow alone would turn all but the darkest tones white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.uint8(np.clip(np.asarray(image, dtype=np.int64), 0, 65535) // 257))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the pictures with 8 or 16 bits")
    return image.convert("RGB")


def _is_whole(file: BinaryIO) -> bool:
    """Whether an open JPEG or PNG file can be read and has all its parts; other formats are not judged.

    Raises:
        OSError, SyntaxError: If it is no picture, or its checksums are wrong.
    """
    with Image.open(file) as image:
        if image.format == "PNG":
            image.verify()
            return True
    if image.format != "JPEG":
        return False
    file.seek(-16, os.SEEK_END)
    return file.read().rstrip(b"\0").endswith(b"\xff\xd9")


def _file_hint(value: dict[str, Any] | None) -> str:
    return f" ({value['path']})" if value and value.get("path") else ""
