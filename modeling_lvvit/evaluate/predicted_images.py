"""The images that `lvvit predict` looks at: a folder as it is, one file, or rows of a dataset; labels are not needed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from PIL import Image
from transformers.utils import logging

from ..data.image_dataset import ImageDataset, check_has_columns, with_image_column
from ..data.image_folder import Layout, list_folder
from ..data.images import IMAGE_ERRORS, decode_image
from ..data.sources import find_parquet_data, looks_local, open_splits
from ..data.splits import split_to_evaluate


logger = logging.get_logger(__name__)
FOLDER_COLUMN = "image"


@dataclass
class ImagesToPredict:
    """Images without labels.

    Args:
        name: What messages call them.
        rows: With an image column, in the order of their paths, or of the rows of a dataset.
        image_column: Its name.
        paths: Of the images; `row 7` where a dataset does not tell.
    """

    name: str
    rows: datasets.Dataset
    image_column: str
    paths: list[str]


def open_images(
    name: str,
    split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str = FOLDER_COLUMN,
) -> ImagesToPredict:
    """Opens images. Of a folder they are all image files in it and in the folders below it, whatever these are called.

    Args:
        name: Folder of images, image file, Hub name, folder of Parquet files, or such a file.
        split, config_name, revision, image_column: Of a dataset, as in `open_test_set`; a folder of images has none of them.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If it holds no images, or split or column are missing.
    """
    path = Path(name).expanduser()
    if looks_local(name) and not path.exists():
        raise FileNotFoundError(
            f"There is nothing at {path} (seen from {Path.cwd()}). Give a folder of images, or an image."
        )
    if path.is_file() and path.suffix.lower() != ".parquet":
        return _image_files(name, [str(path)])
    if path.is_dir():
        content = list_folder(path)
        if content.images and not find_parquet_data(path, content.left_out, has_images=True):
            for line in Layout(left_out=content.left_out).warnings():
                logger.warning("%s: %s", name, line)
            if split is not None:
                raise ValueError(
                    f"{name} is a folder of images, all of which are predicted: leave out `eval_split`, or name a folder in it."
                )
            return _image_files(name, [str(path / file) for file in sorted(content.images)])
    splits = open_splits(name, config_name, revision)
    split_name = split_to_evaluate(splits, split)
    if split_name is None:
        raise ValueError(f"{name} has the splits {list(splits)}. Name one of them with `eval_split`.")
    rows = splits[split_name]
    check_has_columns(rows, [image_column], f"{name} ({split_name})")
    rows = with_image_column(rows, image_column).select_columns(image_column)
    return ImagesToPredict(f"{name} ({split_name})", rows, image_column, _paths(rows, image_column))


def _image_files(name: str, paths: list[str]) -> ImagesToPredict:
    features = datasets.Features({FOLDER_COLUMN: datasets.Image()})
    values = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], ["bytes", "path"])
    rows = datasets.Dataset(pa.table({FOLDER_COLUMN: values}), datasets.DatasetInfo(features=features))
    return ImagesToPredict(name, rows, FOLDER_COLUMN, paths)


def _paths(rows: datasets.Dataset, column: str) -> list[str]:
    stored = rows.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
    paths: list[str | None] = []
    # chunk by chunk: all images in one array would be copied, and 2 GB are the most it can hold
    for batch in stored.iter(batch_size=1000):
        paths += [path for chunk in batch[column].chunks for path in chunk.field("path").to_pylist()]
    return [path or f"row {index}" for index, path in enumerate(paths)]


@dataclass
class Inputs:
    """Some images as a classifier takes them.

    Args:
        indices: Rows of `pixel_values`.
        pixel_values: `(B, 3, height, width)`.
        errors: Row -> why it cannot be read; such rows are in neither of the others.
    """

    indices: list[int]
    pixel_values: torch.Tensor
    errors: dict[int, str]

    @classmethod
    def collate(cls, samples: list[tuple[int, torch.Tensor | str]]) -> "Inputs":
        """From the samples of `PredictionDataset`."""
        good = [(index, pixels) for index, pixels in samples if not isinstance(pixels, str)]
        pixel_values = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0)
        return cls(
            [index for index, _ in good], pixel_values, {i: text for i, text in samples if isinstance(text, str)}
        )


class PredictionDataset(ImageDataset):
    """Row numbers with the input of a classifier, or why the image cannot be read.

    Args:
        images: See `ImagesToPredict`.
        transform: From an RGB image to float32 `(3, height, width)`.
    """

    def __init__(self, images: ImagesToPredict, transform: Callable[[Image.Image], torch.Tensor]):
        super().__init__(images.rows, [images.image_column], images.name)
        self.transform = transform

    def __getitems__(self, indices: list[int]) -> list[tuple[int, torch.Tensor | str]]:
        return list(zip(indices, map(self._input, self.rows[indices][self.image_column].to_pylist())))

    def _input(self, value: dict[str, Any] | None) -> torch.Tensor | str:
        if value is None:
            return "no image"
        try:
            image = decode_image(value)
        except IMAGE_ERRORS as error:
            return f"the image cannot be decoded ({error})"
        return self.transform(image)

    def check_images(self) -> None:
        """Looks at every image before the work, as `check_all_rows` does."""
        self.check_all_rows(lambda table, start: [])
