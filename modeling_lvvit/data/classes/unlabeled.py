"""Images without human labels: opened as they lie, and added behind the labeled rows of a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from transformers.utils import logging

from ..image_dataset import check_has_columns, with_image_column
from ..image_folder import Layout, list_folder
from ..sources import find_parquet_data, looks_local, open_splits
from ..splits import EVALUATION_SPLITS, split_to_evaluate


logger = logging.get_logger(__name__)
FOLDER_COLUMN = "image"
UNLABELED_HELP = (
    "More images, without labels, behind those of dataset_name: Hub name, folder (all image files in it and below it) or Parquet files. "
    "They learn from their dense labels alone."
)


@dataclass
class UnlabeledImages:
    """Images, labels aside.

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
    preferred_splits: Sequence[str] = EVALUATION_SPLITS,
    other_columns: Sequence[str | None] = (),
) -> UnlabeledImages:
    """Opens images. Of a folder they are all image files in it and in the folders below it, whatever these are called.

    Args:
        name: Folder of images, image file, Hub name, folder of Parquet files, or such a file.
        split, config_name, revision, image_column: Of a dataset, as in `open_splits`; a folder of images has none of them.
        preferred_splits: Taken in this order where no split is named; then the only one.
        other_columns: Kept where the dataset has them; `None` names none.

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
        return _image_files(name, [str(path)], image_column)
    if path.is_dir():
        content = list_folder(path)
        if content.images and not find_parquet_data(path, content.left_out, has_images=True):
            for line in Layout(left_out=content.left_out).warnings():
                logger.warning("%s: %s", name, line)
            if split is not None:
                raise ValueError(
                    f"{name} is a folder of images, all of which are taken: leave out `eval_split`, or name a folder in it."
                )
            return _image_files(name, [str(path / file) for file in sorted(content.images)], image_column)
    splits = open_splits(name, config_name, revision)
    split_name = split_to_evaluate(splits, split, preferred_splits)
    if split_name is None:
        raise ValueError(f"{name} has the splits {list(splits)}. Name one of them with `eval_split`.")
    rows = splits[split_name]
    check_has_columns(rows, [image_column], f"{name} ({split_name})")
    columns = [image_column, *(column for column in other_columns if column in rows.column_names)]
    rows = with_image_column(rows, image_column).select_columns(columns)
    return UnlabeledImages(f"{name} ({split_name})", rows, image_column, _paths(rows, image_column))


def _image_files(name: str, paths: list[str], image_column: str) -> UnlabeledImages:
    features = datasets.Features({image_column: datasets.Image()})
    values = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], ["bytes", "path"])
    rows = datasets.Dataset(pa.table({image_column: values}), datasets.DatasetInfo(features=features))
    return UnlabeledImages(name, rows, image_column, paths)


def _paths(rows: datasets.Dataset, column: str) -> list[str]:
    stored = rows.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
    paths: list[str | None] = []
    # chunk by chunk: all images in one array would be copied, and 2 GB are the most it can hold
    for batch in stored.iter(batch_size=1000):
        paths += [path for chunk in batch[column].chunks for path in chunk.field("path").to_pylist()]
    return [path or f"row {index}" for index, path in enumerate(paths)]


def add_unlabeled(
    rows: datasets.Dataset,
    name: str | None,
    image_column: str,
    label_column: str,
    train_split: str = "train",
    other_columns: Sequence[str | None] = (),
) -> datasets.Dataset:
    """Rows of a dataset, and behind them images that have no label: theirs is null. All programs that read labels for them add them here, so
    that images have the same order and the same keys in all.

    Args:
        name: Of the images, see `open_images`; `None` adds nothing.
        other_columns: Kept where both have them; for example of keys.

    Raises:
        FileNotFoundError, ValueError: See `open_images`; a `ValueError` too if columns do not fit each other.
    """
    if name is None:
        return rows
    splits = (train_split, "train", "unlabeled", "unsupervised")
    more = open_images(name, image_column=image_column, preferred_splits=splits, other_columns=other_columns)
    try:
        joined = datasets.concatenate_datasets([with_image_column(rows, image_column), more.rows])
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"The columns of {more.name} do not fit those of the labeled images: {error}") from error
    logger.info("%d images of %s are added without labels.", len(more.rows), more.name)
    return joined


def without_labels(rows: datasets.Dataset, column: str, class_names: Sequence[str]) -> datasets.Dataset:
    """Rows of images that have no label column, with one of class -1."""
    feature = datasets.ClassLabel(names=list(class_names))
    return rows.add_column(column, np.full(len(rows), -1), feature=feature)


def select_confident(
    is_unlabeled: np.ndarray,
    classes: np.ndarray,
    confidence: np.ndarray,
    min_confidence: float = 0.0,
    per_class: int | None = None,
) -> np.ndarray:
    """Rows to train on: all labeled ones, and the unlabeled ones of which a label map is sure. Threshold and equal numbers of classes are those
    of Noisy Student (Xie et al. 2020, arXiv:1911.04252).

    Args:
        is_unlabeled: Bool `(n,)`.
        classes, confidence: Of each row, the class that its label map gives the whole image, and its probability in [0, 1].
        min_confidence: Unlabeled rows below it are left out.
        per_class: Of each class the so many unlabeled rows with the highest confidence; `None` for all.

    Returns:
        Row numbers, ascending int64.

    Example: confidences 0.9, 0.8, 0.4 of three unlabeled rows of one class, `min_confidence` 0.5 and `per_class` 1: the first row.
    """
    taken = is_unlabeled & (confidence >= min_confidence)
    if per_class is not None:
        rows = np.flatnonzero(taken)
        rows = rows[np.lexsort((-confidence[rows], classes[rows]))]
        _, starts, counts = np.unique(classes[rows], return_index=True, return_counts=True)
        rank = np.arange(len(rows)) - np.repeat(starts, counts)
        taken = np.isin(np.arange(len(taken)), rows[rank < per_class])
    return np.flatnonzero(~is_unlabeled | taken)
