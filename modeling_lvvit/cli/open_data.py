"""What a training run reads: training and evaluation rows, and the label maps of the former."""

from dataclasses import dataclass

import datasets
import numpy as np
from transformers.utils import logging

from ..data.class_labels import check_columns, with_class_ids
from ..data.sources import dataset_fingerprint, open_splits, streamed_rows
from ..data.splits import find_eval_split, hold_out
from ..labels.columns import IDS_COLUMN, SCORES_COLUMN, LabelMapError
from ..labels.label_crops import top_classes
from ..labels.label_set import check_class_names, join_label_set, open_label_set
from ..labels.reader import LabelMapReader, label_class_names
from .data_arguments import DataArguments


logger = logging.get_logger(__name__)
COMPARED_ROWS = 256  # label maps compared with human labels when a label set is joined


@dataclass
class OpenedData:
    """What `open_datasets` found.

    Args:
        train, evaluation: Image rows with a `ClassLabel` column of the same classes.
        eval_name: What the evaluation rows are called.
        label_maps: Label maps of the training rows, in their order; `None` without dense labels.
        labels: For a stream, the label set to be joined while it is read; `None` for plain labels.
    """

    train: datasets.Dataset | datasets.IterableDataset
    evaluation: datasets.Dataset
    eval_name: str
    label_maps: LabelMapReader | None = None
    labels: datasets.Dataset | None = None


def open_datasets(args: DataArguments, seed: int) -> OpenedData:
    """Opens training and evaluation rows, and the label maps of the former.

    Args:
        args: What to open.
        seed: Seed of the split where the data has no evaluation part.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a split or column is missing, empty or unfit, or labels do not fit the images; the message names
            what there is.
    """
    if args.streaming:
        return _open_stream(args)
    splits = open_splits(args.dataset_name, args.dataset_config_name, args.dataset_revision, split=args.train_split)
    eval_name = find_eval_split(splits, args.dataset_name, args.train_split, args.eval_split)
    check_columns(splits[args.train_split], args.dataset_name, args.image_column, args.label_column)
    labels = (
        open_label_set(args.token_labels, args.train_split, args.token_labels_revision)
        if args.token_labels is not None and args.use_token_labels
        else None
    )
    class_names = label_class_names(labels) if labels is not None else None
    train = splits[args.train_split]
    if eval_name is not None and args.max_train_samples is not None:  # labels may be there for these only
        train = train.select(_first(train, args.max_train_samples))
    train = with_class_ids(train, args.dataset_name, args.label_column, class_names=class_names)
    train, label_maps = _with_label_maps(train, labels, args)
    if eval_name is not None:
        check_columns(splits[eval_name], args.dataset_name, args.image_column, args.label_column)
        evaluation = with_class_ids(splits[eval_name], args.dataset_name, args.label_column, like=train)
    else:
        kept, held_out, eval_name = hold_out(len(train), args.eval_fraction, seed, args.dataset_name, args.train_split)
        evaluation = train.select(held_out)
        train, label_maps = _select(train, label_maps, kept)
        if args.max_train_samples is not None:
            train, label_maps = _select(train, label_maps, _first(train, args.max_train_samples))
    if args.max_eval_samples is not None:
        evaluation = evaluation.select(_first(evaluation, args.max_eval_samples))
    for name, rows in (("training", train), ("evaluation", evaluation)):
        if not len(rows):
            raise ValueError(f"There are no {name} rows in {args.dataset_name}.")
    return OpenedData(train, evaluation, eval_name, label_maps)


def _open_stream(args: DataArguments) -> OpenedData:
    """Training rows as a stream; evaluation rows prepared as usual."""
    name, columns = args.dataset_name, (args.image_column, args.label_column)
    splits = open_splits(name, args.dataset_config_name, args.dataset_revision, streaming=True, split=args.train_split)
    eval_name = find_eval_split(splits, args.dataset_name, args.train_split, args.eval_split)
    if eval_name is None:
        raise ValueError(f"{name} has no split to evaluate on, and a stream cannot be divided. It has {list(splits)}.")
    train = splits[args.train_split]
    train = train if train.features is not None else train._resolve_features()
    check_columns(train, name, *columns)
    feature = train.features[args.label_column]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"With --streaming column {args.label_column!r} of {name} must be a ClassLabel, got {feature}."
        )
    labels = (
        open_label_set(args.token_labels, args.train_split, args.token_labels_revision)
        if args.token_labels is not None and args.use_token_labels
        else None
    )
    if labels is None and args.use_token_labels and has_dense_columns(train, args):
        raise ValueError("With --streaming dense labels come from a label set (--token_labels), not from two columns.")
    if labels is not None:
        check_class_names(label_class_names(labels), feature.names)
    if args.max_train_samples is not None:
        train = train.take(args.max_train_samples)
    # processes that come later find what the first one prepared: the arguments of the generator name the content
    source = (
        name,
        args.dataset_config_name,
        args.dataset_revision,
        eval_name,
        args.image_column,
        args.max_eval_samples,
    )
    evaluation = datasets.Dataset.from_generator(
        streamed_rows,
        features=splits[eval_name].features or train.features,
        gen_kwargs={"source": source, "state": dataset_fingerprint(name, args.dataset_revision)},
    )
    check_columns(evaluation, name, *columns)
    evaluation = with_class_ids(evaluation, name, args.label_column, like=train)
    return OpenedData(train, evaluation, eval_name, labels=labels)


def _with_label_maps(
    train: datasets.Dataset, labels: datasets.Dataset | None, args: DataArguments
) -> tuple[datasets.Dataset, LabelMapReader | None]:
    """Training rows with their label maps, of a label set or of two columns of their own."""
    if labels is None:
        ids_column, scores_column = args.token_label_ids_column, args.token_label_scores_column
        has_maps = has_dense_columns(train, args)
        return train, LabelMapReader(train, None, None, ids_column, scores_column) if has_maps else None
    check_class_names(label_class_names(labels), train.features[args.label_column].names)
    joined = join_label_set(labels, train, args.image_column, args.key_column, args.key_pattern)
    if joined.images is not None:
        train = train.select(joined.images)
    _compare_with_labels(joined.label_maps, train, args.label_column)
    return train, joined.label_maps


def _compare_with_labels(label_maps: LabelMapReader, train: datasets.Dataset, label_column: str) -> None:
    """Warns when maps rarely have the class of their image: then they are of other images, or ids mean other classes."""
    rows = np.unique(np.linspace(0, len(train) - 1, COMPARED_ROWS).astype(np.int64)).tolist()
    human = train.select_columns(label_column).with_format("arrow")[rows][label_column].to_numpy()
    try:
        maps = label_maps.fetch(rows)
    except LabelMapError:  # the check of all rows names it
        return
    if (maps.ids < 0).any() or (maps.ids >= label_maps.num_classes).any():
        return
    agree = (top_classes(maps.ids, maps.scores, label_maps.num_classes) == human).mean()
    logger.info("%.0f %% of %d label maps have the class of their image first.", 100 * agree, len(rows))
    if agree < 0.5:
        logger.warning(
            "Only %.0f %% of %d label maps have the class of their image first. Do labels and images belong together, do ids "
            "mean the same classes, and is the annotator any good? (dataset_scripts/check_token_labels.py shows more.)",
            100 * agree,
            len(rows),
        )


def _select(
    rows: datasets.Dataset, label_maps: LabelMapReader | None, chosen: np.ndarray
) -> tuple[datasets.Dataset, LabelMapReader | None]:
    """Some rows with their label maps."""
    return rows.select(chosen), None if label_maps is None else label_maps.select(chosen)


def has_dense_columns(rows: datasets.Dataset, args: DataArguments) -> bool:
    """Whether to train with dense labels.

    Raises:
        ValueError: If only one of the two columns is there.
    """
    names = (args.token_label_ids_column, args.token_label_scores_column)
    present = [name in rows.column_names for name in names]
    was_named = names != (IDS_COLUMN, SCORES_COLUMN)
    if args.use_token_labels and not all(present) and (any(present) or was_named):
        raise ValueError(f"Dense labels need both {names[0]!r} and {names[1]!r}; the data has {rows.column_names}.")
    return args.use_token_labels and all(present)


def _first(rows: datasets.Dataset, count: int) -> np.ndarray:
    return np.arange(min(max(count, 0), len(rows)))
