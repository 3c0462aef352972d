"""Images with human labels, and how they are shared out among folds."""

from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers.utils import logging

from ...data.classes.class_labels import (
    check_columns,
    check_single_classes,
    class_counts,
    class_ids,
    describe_classes,
    warn_of_missing_classes,
    with_class_ids,
)
from ...data.image_keys import Strings, read_keys, row_keys
from ..annotate import open_images
from .arguments import FitAnnotatorArguments
from .head import draw_folds


logger = logging.get_logger(__name__)
DEFAULT_FOLDS = 5  # of the cross-validation
MAX_NAMED = 10


@dataclass
class LabeledImages:
    """Rows that have a class.

    Args:
        rows: Of the dataset.
        keys: What messages call them.
        classes: Class ids `(n,)`.
        class_names: By id.
        hashes: Content hashes; empty until they are read.
    """

    rows: datasets.Dataset
    keys: Strings
    classes: np.ndarray
    class_names: list[str]
    hashes: list[int | None] = field(default_factory=list)


def open_labeled_images(args: FitAnnotatorArguments) -> LabeledImages:
    """The rows to fit on.

    Raises:
        FileNotFoundError, ValueError: If there is no such dataset, split or column, fewer than two classes have images, or one has a
            single one.
    """
    name, column = args.dataset_name, args.label_column_name
    rows = open_images(args)
    check_columns(rows, name, args.image_column_name, column)
    check_single_classes(rows, name, column)
    rows = with_class_ids(rows, name, column, may_be_missing=True)
    ids = class_ids(rows, column)
    labeled = np.flatnonzero(ids >= 0)
    if len(labeled) < len(ids):
        print(f"{len(ids) - len(labeled):,} of {len(ids):,} images have no label and are left out", flush=True)
        rows = rows.select(labeled)
    names = rows.features[column].names
    check_class_sizes(ids[labeled], names, "images")
    print(describe_classes(rows, args.train_split, column), flush=True)
    warn_of_missing_classes(names, {"training": class_counts(rows, column)})
    try:
        keys = read_keys(rows, args.image_column_name)
    except ValueError:  # some rows have paths, others have none
        keys = row_keys(0, len(rows))
    return LabeledImages(rows, keys, ids[labeled], names)


def check_class_sizes(classes: np.ndarray, names: list[str], unit: str) -> None:
    """Raises a `ValueError` if a held-out image could not be told by others of its class.

    Args:
        classes: Class ids `(n,)`.
        names: Of all classes, by id.
        unit: What is counted, for the message.
    """
    counts = np.bincount(classes, minlength=len(names))
    present = np.flatnonzero(counts)
    if len(present) < 2:
        raise ValueError(
            f"The {unit} are of {len(present)} class ({', '.join(names[index] for index in present)}); a classifier needs at least two."
        )
    if single := [names[index] for index in np.flatnonzero(counts == 1)]:
        raise ValueError(
            f"{len(single)} classes have a single one of the {unit}: {', '.join(single[:10])}. None could be held out to see how well they "
            "are told. Add images of these classes, or take them out of the data."
        )


def fold_images(args: FitAnnotatorArguments, images: LabeledImages) -> np.ndarray:
    """Fold of each image, `(n,)`; says which classes have fewer images than there are folds."""
    hashes = np.asarray(images.hashes, dtype=np.int64)
    _, first = np.unique(hashes, return_index=True)
    if copies := len(hashes) - len(first):
        print(f"{copies:,} images are copies of others; all copies of an image are in one fold", flush=True)
    check_class_sizes(images.classes[first], images.class_names, "different images")
    number = args.folds or DEFAULT_FOLDS
    counts = np.bincount(images.classes[first], minlength=len(images.class_names))
    if few := [images.class_names[index] for index in np.flatnonzero((counts > 0) & (counts < number))]:
        logger.warning(
            "%d classes have fewer images than the %d folds of the cross-validation, so some folds have none of them, and their held-out "
            "scores say little: %s%s.", len(few), number, ", ".join(few[:10]), ", ..." if len(few) > 10 else "",
        )  # fmt: skip
    return draw_folds(hashes, images.classes, min(number, len(first)), args.seed)
