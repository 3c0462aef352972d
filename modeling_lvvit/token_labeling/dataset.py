"""A view of a `datasets.Dataset` whose rows become training or evaluation samples."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from tqdm.auto import tqdm

from .label_columns import LabelMapError
from .label_sets import LabelMaps
from .label_source import LabelMapSource, covered_region
from .pictures import IMAGE_ERRORS, SampleError, decode_picture, picture_problem
from .randomness import derived_seed, kept_generators, start_generators


MAX_REPORTED_PROBLEMS = 10
ROWS_PER_CHECK = 512


class ImageProcessorTransform:
    """Evaluation preprocessing by an image processor of transformers.

    Args:
        image_processor: Called with one picture; must return `pixel_values`.
    """

    def __init__(self, image_processor: Callable):
        self.image_processor = image_processor

    def __call__(self, image: Image.Image, *label_map: Any) -> dict[str, torch.Tensor]:
        """Picture to `pixel_values` float32 `[3, height, width]`; a label map has no use in evaluation."""
        return {"pixel_values": self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]}


class TokenLabelDataset(torch.utils.data.Dataset):
    """Decodes images and label maps of a `datasets.Dataset` and transforms them together.

    Rows are fetched in Arrow format, a batch at a time, so that label maps never become Python lists.

    Once `start_epoch` was called, what a transform draws for a row hangs on seed, epoch and row alone: not on the number of
    processes or workers, the batch size, or whether the run was interrupted.

    Args:
        dataset: Rows with an image column and an integer or `ClassLabel` column.
        transform: Called with a picture, and where there are maps with its map's ids, scores and region; returns a dict
            of tensors (`TrainTransform`, `ImageProcessorTransform`).
        image_column, label_column: Column names.
        ids_column, scores_column: Dense-label columns of the data set itself, or `None` for both.
        label_maps: Instead of them, a label set joined to the rows (`label_join.join_label_set`).
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
        label_maps: LabelMapSource | None = None,
    ):
        if (ids_column is None) != (scores_column is None):
            raise ValueError("Give both dense-label columns, ids and scores, or neither.")
        if ids_column is not None and label_maps is not None:
            raise ValueError("Give dense-label columns or a label set, not both.")
        self.transform = transform
        self.image_column, self.label_column = image_column, label_column
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
        self.rows = dataset.select_columns([image_column, label_column]).with_format("arrow")
        self.label_maps = label_maps
        if ids_column is not None:
            self.label_maps = LabelMapSource(dataset, ids_column=ids_column, scores_column=scores_column)
        if self.label_maps is not None and len(self.label_maps) != len(dataset):
            raise ValueError(f"The {name} data has {len(dataset)} rows, its label maps are {len(self.label_maps)}.")

        # shared, so that workers that outlive an epoch see it change
        self._seed_and_epoch = torch.full((2,), -1, dtype=torch.int64).share_memory_()

    @property
    def has_label_maps(self) -> bool:
        """Whether samples carry dense labels."""
        return self.label_maps is not None

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Makes samples a function of `seed`, `epoch` and their row; `TokenLabelTrainer` calls it."""
        self._seed_and_epoch.copy_(torch.tensor([seed, epoch]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Samples of several rows; PyTorch's `DataLoader` calls this once for each batch."""
        table = self.rows[indices]
        maps = self._fetch_maps(indices) if self.has_label_maps else None
        images, labels = table[self.image_column], table[self.label_column].to_pylist()
        run_seed, epoch = self._seed_and_epoch.tolist()
        samples = []
        with kept_generators() if epoch >= 0 else nullcontext():
            for offset, index in enumerate(indices):
                image = self._decode(images[offset].as_py(), index)
                label_map, seed = (), {}
                if maps is not None:
                    box = None if maps.boxes is None else maps.boxes[offset]
                    label_map = (maps.ids[offset], maps.scores[offset], covered_region(box, *image.size))
                if epoch >= 0:
                    seed = {"seed": derived_seed(run_seed, epoch, index)}
                    start_generators(seed["seed"])
                samples.append({**self.transform(image, *label_map), "labels": labels[offset], **seed})
        return samples

    def picture(self, index: int) -> Image.Image:
        """The undecorated RGB picture of a row."""
        return self._decode(self.rows[index][self.image_column][0].as_py(), index)

    def labels(self, count: int) -> list[int]:
        """Class ids of the first `count` rows."""
        return self.rows[:count][self.label_column].to_pylist()

    def label_map(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of a row, `[K, rows, columns]` each, before any transform."""
        maps = self._fetch_maps([index])
        return maps.ids[0], maps.scores[0]

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
                map_problems, map_shape = self._map_problems(range(start, start + len(table)), num_classes, map_shape)
                found += map_problems
            images = ((offset, picture_problem(value)) for offset, value in enumerate(table[self.image_column]))
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
        self, images: range, num_classes: int, expected_shape: tuple[int, ...] | None
    ) -> tuple[list[tuple[int, str]], tuple[int, ...] | None]:
        """Problems of the label maps, and the `[K, rows, columns]` that all blocks must share."""
        problems, shape = self.label_maps.problems(images, num_classes)
        if None not in (shape, expected_shape) and shape != expected_shape:
            text = f"its label map has [K, rows, columns] {list(shape)}, earlier rows {list(expected_shape)}"
            return [(0, text)], expected_shape
        return problems, expected_shape or shape

    def _decode(self, value: dict[str, Any] | None, index: int) -> Image.Image:
        if value is None:
            raise SampleError(f"Row {index} of the {self.name} data has no image.")
        try:
            return decode_picture(value)
        except IMAGE_ERRORS as error:
            raise SampleError(
                f"Row {index} of the {self.name} data{_file_hint(value)}: the image cannot be decoded ({error})."
            ) from error

    def _fetch_maps(self, indices: list[int]) -> LabelMaps:
        try:
            return self.label_maps.fetch(indices)
        except LabelMapError as error:
            raise SampleError(
                f"The label map of row {indices[error.row]} of the {self.name} data: {error}."
            ) from error


def _file_hint(value: dict[str, Any] | None) -> str:
    return f" ({value['path']})" if value and value.get("path") else ""
