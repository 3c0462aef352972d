"""What a training run reads: training and evaluation rows, and the label maps of the former."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from ..data.classes.class_labels import (
    check_class_names,
    check_columns,
    class_ids,
    warn_of_missing_classes,
    with_class_ids,
)
from ..data.classes.multi_label import (
    class_names,
    describe_labels,
    has_lists,
    is_unlabeled,
    label_counts,
    labelled,
    with_labels,
)
from ..data.classes.unlabeled import add_unlabeled, select_confident, without_labels
from ..data.sources import dataset_fingerprint, open_splits, streamed_rows
from ..data.splits import classes_of_rows, draw_subset, find_eval_split, hold_out, select_subset, take_subset
from ..labels.checks.agreement import compare_some, image_classes
from ..labels.columns import IDS_COLUMN, SCORES_COLUMN, LabelMapError
from ..labels.crops import join_crops, read_record
from ..labels.label_set import LabelSet
from ..labels.reader import LabelMapReader
from .data_arguments import DataArguments


logger = logging.get_logger(__name__)
COMPARED_ROWS = 256  # label maps compared with human labels when a label set is joined


@dataclass
class OpenedData:
    """What `open_datasets` found.

    Args:
        train, evaluation: Image rows with a column of `ClassLabel`, or of lists of them (multi-label), of the same classes.
        label_maps: Label maps of the training rows, in their order; `None` without dense labels.
        labels: For a stream, the label set to be joined while it is read; `None` for plain labels.
    """

    train: datasets.Dataset | datasets.IterableDataset
    evaluation: datasets.Dataset
    eval_name: str
    label_maps: LabelMapReader | None = None
    labels: LabelSet | None = None

    def describe(self, label_column: str) -> list[str]:
        """A line for each part: images, classes, smallest and largest class; the images of a stream are not counted."""
        parts = {"training": self.train, f"evaluation ({self.eval_name})": self.evaluation}
        return [
            describe_labels(rows, name, label_column)
            for name, rows in parts.items()
            if isinstance(rows, datasets.Dataset)
        ]


def open_datasets(args: DataArguments, seed: int) -> OpenedData:
    """Opens training and evaluation rows, and the label maps of the former.

    Args:
        seed: Seed of the split where the data has no evaluation part.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a split or column is missing, empty or unfit, or labels do not fit the images; the message names
            what there is.
    """
    name = args.dataset_name
    splits = open_splits(name, args.dataset_config_name, args.dataset_revision, args.streaming, args.train_split)
    eval_name = find_eval_split(splits, name, args.train_split, args.eval_split, args.label_column_name)
    labels = None
    if args.token_labels is not None and args.use_token_labels:
        labels = LabelSet.open(args.token_labels, args.train_split, args.token_labels_revision)
    if args.streaming:
        return _open_stream(args, splits, eval_name, labels)
    return _open_rows(args, splits, eval_name, labels, seed)


def _open_rows(
    args: DataArguments, splits: datasets.DatasetDict, eval_name: str | None, labels: LabelSet | None, seed: int
) -> OpenedData:
    """Training rows with their label maps, and evaluation rows: those of a split, or some that are held out."""
    name, column = args.dataset_name, args.label_column_name
    train = _open_training_rows(args, splits[args.train_split], labels)
    evaluation = with_human_label = None
    if eval_name is not None:
        evaluation = with_labels(_labelled_rows(args, splits[eval_name]), name, column, like=train)
        subset = draw_subset(train, args.max_train_samples, column)  # label maps may be there for a subset only
        with_human_label = np.isin(subset, draw_subset(train, args.max_labeled_samples, column))
        train = train if args.max_train_samples is None else train.select(subset)
    train, label_maps, images = _join_label_maps(args, train, labels)
    if evaluation is not None:
        with_human_label = with_human_label if images is None else with_human_label[images]
    else:
        classes = classes_of_rows(train, column)
        unlabeled = is_unlabeled(train, column)
        rows, held_out, eval_name = hold_out(
            len(train), args.eval_fraction, seed, name, args.train_split, classes, unlabeled
        )
        evaluation = train.select(held_out)
        if unlabeled.all() and label_maps is None:
            raise ValueError(
                f"No image of {name} has a human label, and labels of training crops say nothing of others."
            )
        if unlabeled.all():
            evaluation = _with_classes_of_maps(evaluation, label_maps.select(held_out), column)
            eval_name += ", by the classes of their label maps"
        subset = select_subset(len(rows), args.max_train_samples, classes[rows])
        with_human_label = np.isin(subset, select_subset(len(rows), args.max_labeled_samples, classes[rows]))
        rows = rows[subset]
        train, label_maps = train.select(rows), label_maps and label_maps.select(rows)
    is_of_crops = labels is not None and labels.is_of_crops
    if args.max_labeled_samples is not None:
        train, label_maps = _hide_labels(args, train, label_maps, with_human_label, is_of_crops)
    if args.selects_unlabeled:
        train, label_maps = _select_confident(args, train, label_maps)
    if is_of_crops:  # of these rows and no others
        record = read_record(args.token_labels, args.token_labels_revision)
        keys = (args.image_column_name, args.key_column, args.key_pattern)
        label_maps = join_crops(labels, record, train, row_options(args, seed), *keys)
        _compare_with_labels(label_maps, train, column)
    evaluation = take_subset(evaluation, args.max_eval_samples, args.label_column_name)
    for part, rows in (("training", train), ("evaluation", evaluation)):
        if not len(rows):
            raise ValueError(f"There are no {part} rows in {name}.")
    counts = {}
    if not is_unlabeled(train, column).any():  # others learn classes from label maps
        counts["training"] = label_counts(train, args.label_column_name)
    counts["evaluation"] = label_counts(evaluation, args.label_column_name)
    warn_of_missing_classes(class_names(train, args.label_column_name), counts)
    return OpenedData(train, evaluation, eval_name, label_maps)


def _open_training_rows(args: DataArguments, rows: datasets.Dataset, labels: LabelSet | None) -> datasets.Dataset:
    """Rows of the training split with classes, -1 for those without a human label, which dense labels allow; images that are added without
    labels come last."""
    name, column = args.dataset_name, args.label_column_name
    has_names = labels is not None and labels.class_names is not None
    if has_names and args.label_column_names is None and column not in rows.column_names:
        logger.warning("%s has no column %r: its images are trained on with their dense labels alone.", name, column)
        rows = without_labels(rows, column, labels.class_names)
    rows = _labelled_rows(args, rows)
    if has_lists(rows, column):
        _check_plain_labels(args, labels is not None)
    others = (args.key_column, *args.dense_columns)
    rows = add_unlabeled(rows, args.unlabeled_dataset_name, args.image_column_name, column, args.train_split, others)
    has_dense = labels is not None or args.annotator is not None
    has_dense = has_dense or (args.use_token_labels and has_dense_columns(rows, args.dense_columns))
    class_names = None if labels is None else labels.class_names
    return with_labels(rows, name, column, class_names=class_names, may_be_missing=has_dense)


def _join_label_maps(
    args: DataArguments, train: datasets.Dataset, labels: LabelSet | None
) -> tuple[datasets.Dataset, LabelMapReader | None, np.ndarray | None]:
    """Training rows that have a label map; these maps, of a label set or of the data's own columns, `None` without either; and which rows
    they were, `None` for all."""
    column = args.label_column_name
    if labels is not None:
        check_class_names(labels.class_names, train.features[column].names)
        if labels.is_of_crops:  # joined when it is known which rows train
            return train, None, None
        joined = labels.join(train, args.image_column_name, args.key_column, args.key_pattern)
        train, label_maps = train if joined.images is None else train.select(joined.images), joined.label_maps
        _compare_with_labels(label_maps, train, column)
        return train, label_maps, joined.images
    if not args.use_token_labels or not has_dense_columns(train, args.dense_columns):
        return train, None, None
    if has_lists(train, column):
        raise ValueError(
            f"Images of {args.dataset_name} have several classes (column {column!r}) and dense labels ({', '.join(args.dense_columns)}), "
            "which share every token out among classes that exclude each other. `use_token_labels` false trains with the plain labels."
        )
    return train, LabelMapReader(train, None, *args.dense_columns), None


def _hide_labels(
    args: DataArguments,
    train: datasets.Dataset,
    label_maps: LabelMapReader | None,
    with_human_label: np.ndarray,
    is_of_crops: bool,
) -> tuple[datasets.Dataset, LabelMapReader | None]:
    """Training rows of which some lose their human label; without dense labels these rows are left out."""
    column, count = args.label_column_name, int((~with_human_label).sum())
    if has_lists(train, column):
        raise ValueError("`max_labeled_samples` is for images with one class each.")
    if label_maps is None and args.annotator is None and not is_of_crops:
        logger.warning("%d of %d training images are left out, beyond `max_labeled_samples`.", count, len(train))
        return train.select(np.flatnonzero(with_human_label)), None
    feature, ids = train.features[column], np.where(with_human_label, class_ids(train, column), -1)
    return train.remove_columns(column).add_column(column, ids, feature=feature), label_maps


def _with_classes_of_maps(rows: datasets.Dataset, label_maps: LabelMapReader, column: str) -> datasets.Dataset:
    """Rows whose class is the one that their label map gives the whole image."""
    logger.warning(
        "No image has a human label: evaluation tells how often the model finds the class of the label map, not how often it is right."
    )
    feature = rows.features[column]
    return rows.remove_columns(column).add_column(
        column, image_classes(label_maps, feature.num_classes)[0], feature=feature
    )


def _select_confident(
    args: DataArguments, train: datasets.Dataset, label_maps: LabelMapReader | None
) -> tuple[datasets.Dataset, LabelMapReader]:
    """Without the images that have no human label and no sure label map; says how many these are."""
    if label_maps is None:
        raise ValueError(
            "`unlabeled_min_confidence` and `unlabeled_per_class` choose images by label maps of whole images, and there are none: give `token_labels`."
        )
    unlabeled = is_unlabeled(train, args.label_column_name)
    num_classes = train.features[args.label_column_name].num_classes
    best, confidence = image_classes(label_maps, num_classes)
    rows = select_confident(unlabeled, best, confidence, args.unlabeled_min_confidence, args.unlabeled_per_class)
    logger.warning(
        "%d of %d images without a human label are left out (`unlabeled_min_confidence` %g%s).",
        len(train) - len(rows), unlabeled.sum(), args.unlabeled_min_confidence,
        "" if args.unlabeled_per_class is None else f", `unlabeled_per_class` {args.unlabeled_per_class}",
    )  # fmt: skip
    return train.select(rows), label_maps.select(rows)


def row_options(args: DataArguments, seed: int) -> dict[str, Any]:
    """Options that choose the training rows of some data."""
    names = ("train_split", "eval_split", "eval_fraction", "max_train_samples", "unlabeled_dataset_name")
    return {"seed": seed, **{name: getattr(args, name) for name in names}}


def _labelled_rows(args: DataArguments, rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of a split, which must have the columns of images and labels."""
    rows = labelled(rows, args.dataset_name, args.label_column_name, args.label_separator, args.label_column_names)
    check_columns(rows, args.dataset_name, args.image_column_name, args.label_column_name)
    return rows


def _check_plain_labels(args: DataArguments, has_label_set: bool) -> None:
    """Raises a `ValueError` if images with several classes would be trained on with anything but plain labels."""
    options = {
        "token_labels": has_label_set,
        "annotator": args.annotator,
        "require_token_labels": args.require_token_labels,
    }
    if given := [f"`{name}`" for name, value in options.items() if value]:
        raise ValueError(
            f"Images of {args.dataset_name} have several classes (column {args.label_column_name!r}), and dense labels share every token out "
            f"among classes that exclude each other. Leave out {' and '.join(given)}: images with several classes are trained on with plain "
            "labels. Or name a column with one class of each image (`label_column`)."
        )


def _open_stream(
    args: DataArguments, splits: datasets.IterableDatasetDict, eval_name: str | None, labels: LabelSet | None
) -> OpenedData:
    """Training rows as a stream; evaluation rows prepared as usual."""
    name, columns = args.dataset_name, (args.image_column_name, args.label_column_name)
    if eval_name is None:
        raise ValueError(f"{name} has no split to evaluate on, and a stream cannot be divided. It has {list(splits)}.")
    train = splits[args.train_split]
    train = train if train.features is not None else train._resolve_features()
    is_asked = args.label_separator is not None or args.label_column_names is not None
    if is_asked or has_lists(train, args.label_column_name):
        raise ValueError(
            f"Images of {name} have several classes, with which no stream is trained: leave out --streaming."
        )
    check_columns(train, name, *columns)
    feature = train.features[args.label_column_name]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"With --streaming column {args.label_column_name!r} of {name} must be a ClassLabel, got {feature}."
        )
    if labels is not None:
        check_class_names(labels.class_names, feature.names)
    elif args.use_token_labels and has_dense_columns(train, args.dense_columns):
        raise ValueError("With --streaming dense labels come from a label set (--token_labels), not from two columns.")
    if args.max_train_samples is not None:
        logger.warning(
            "A stream is read from its start: the training images are its first %d.", args.max_train_samples
        )
        train = train.take(args.max_train_samples)
    # processes that come later find what the first one prepared: the arguments of the generator name the content
    place = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    location = (place, args.dataset_config_name, args.dataset_revision)
    source = (*location, eval_name, args.image_column_name, args.max_eval_samples)
    evaluation = datasets.Dataset.from_generator(
        streamed_rows,
        features=splits[eval_name].features or train.features,
        gen_kwargs={"source": source, "state": dataset_fingerprint(name, args.dataset_revision)},
    )
    check_columns(evaluation, name, *columns)
    evaluation = with_class_ids(evaluation, name, args.label_column_name, like=train)
    return OpenedData(train, evaluation, eval_name, labels=labels)


def _compare_with_labels(label_maps: LabelMapReader, train: datasets.Dataset, label_column: str) -> None:
    """Warns when maps rarely have the class of their image: then they are of other images, or ids mean other classes."""
    try:
        agreement = compare_some(label_maps, class_ids(train, label_column), COMPARED_ROWS)
    except LabelMapError:  # the check of all rows names it
        return
    if agreement is not None and (warnings := agreement.warnings(train.features[label_column].names)):
        summary = agreement.summary(f"{len(agreement.classes):,} label maps")
        logger.warning("%s: %s", summary, " ".join(warnings))


def has_dense_columns(rows: datasets.Dataset | datasets.IterableDataset, columns: tuple[str, str]) -> bool:
    """Whether data has the columns of dense labels, ids and scores; a `ValueError` if one, or both that were named, are missing."""
    present = [column in rows.column_names for column in columns]
    if not all(present) and (any(present) or columns != (IDS_COLUMN, SCORES_COLUMN)):
        raise ValueError(
            f"Dense labels need both {columns[0]!r} and {columns[1]!r}; the data has {rows.column_names}."
        )
    return all(present)
