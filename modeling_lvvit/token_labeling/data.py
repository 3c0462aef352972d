"""Opening data sets: Hub names, image folders, Parquet files and folders of them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError
from transformers.utils import logging

from .label_columns import IDS_COLUMN, SCORES_COLUMN
from .transforms import AugmentationConfig


logger = logging.get_logger(__name__)
MAX_CLASSES = 1_000_000  # ids beyond are no class ids
EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "test")


@dataclass
class DataArguments:
    """What to train and evaluate on.

    Args:
        dataset_name: Hub name, a folder (image folder, or Parquet files), or one Parquet file. Without it the embedded
            digit scenes are used.
        dataset_config_name, dataset_revision: Configuration and revision on the Hub.
        train_split, eval_split: Split names; without `eval_split` the first of validation, val, valid, dev, test, else
            a share of the training data.
        eval_fraction: That share, in (0, 1).
        image_column, label_column: Column names.
        token_label_ids_column, token_label_scores_column: Dense-label columns.
        use_token_labels: Whether to train with dense labels where the data has them.
        max_train_samples, max_eval_samples: Keep the first rows only; for trying things out.
        check_data: Whether to look at every row before training.
        crop_scale_min, horizontal_flip, color_jitter, random_erasing: See `AugmentationConfig`.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, folder or Parquet file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Training split."})
    eval_split: str | None = field(default=None, metadata={"help": "Evaluation split; default: found by name."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Share of training rows where no such split is."})
    image_column: str = field(default="image", metadata={"help": "Column of pictures."})
    label_column: str = field(default="label", metadata={"help": "Column of class ids or names."})
    token_label_ids_column: str = field(default=IDS_COLUMN, metadata={"help": "Dense-label ids."})
    token_label_scores_column: str = field(default=SCORES_COLUMN, metadata={"help": "Dense-label scores."})
    use_token_labels: bool = field(default=True, metadata={"help": "Train with dense labels where there are any."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Keep the first rows only."})
    check_data: bool = field(default=True, metadata={"help": "Look at every row before training."})
    crop_scale_min: float = field(default=0.08, metadata={"help": "Smallest area share of a training crop."})
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a mirror image."})
    color_jitter: float = field(default=0.4, metadata={"help": "Strength of colour changes."})
    random_erasing: float = field(default=0.25, metadata={"help": "Probability of an erased rectangle."})

    def __post_init__(self):
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must lie in (0, 1), got {self.eval_fraction}.")
        self.augmentation()  # raises on bad strengths

    def augmentation(self) -> AugmentationConfig:
        """Strengths of the training augmentation."""
        return AugmentationConfig(
            crop_scale=(self.crop_scale_min, 1.0),
            horizontal_flip=self.horizontal_flip,
            color_jitter=self.color_jitter,
            random_erasing=self.random_erasing,
        )


def looks_local(name: str) -> bool:
    """Whether a name can only be a path, not a Hub name."""
    return name.startswith((".", "~", os.sep)) or name.endswith(".parquet") or name.count("/") > 1


def _load(args: DataArguments) -> datasets.DatasetDict:
    name = args.dataset_name
    path = Path(name).expanduser()
    if looks_local(name) and not path.exists():
        raise FileNotFoundError(
            f"There is no data set at {path.resolve()}. Give a Hub name, a folder or a Parquet file."
        )
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{path} is neither a folder nor a .parquet file.")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files={args.train_split: str(path)})
        return datasets.load_dataset(
            str(path) if path.is_dir() else name, args.dataset_config_name, revision=args.dataset_revision
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder or Parquet file (seen from {Path.cwd()}) nor a data set that the Hub gives: "
            f"{error}"
        ) from error
    except DatasetsError as error:
        raise ValueError(f"{name} cannot be read as a data set: {error.__cause__ or error}") from error


def open_datasets(args: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, str]:
    """Training rows, evaluation rows, and what the latter are called.

    Args:
        args: What to open.
        seed: Seed of the split where the data has no evaluation part.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a split or column is missing, empty or unfit; the message names what there is.
    """
    splits = _load(args)
    for name in (args.train_split, args.eval_split or args.train_split):
        if name not in splits:
            raise ValueError(f"{args.dataset_name} has no split {name!r}; it has {list(splits)}.")
    if args.eval_split == args.train_split:
        raise ValueError(f"Split {args.train_split!r} cannot serve both training and evaluation.")
    train = _with_class_ids(splits[args.train_split], args)
    others = [name for name in EVALUATION_SPLITS if name in splits and name != args.train_split]
    eval_name = args.eval_split or next(iter(others), None)
    if eval_name is not None:
        evaluation = _with_class_ids(splits[eval_name], args, like=train)
    else:
        logger.warning("No evaluation split: %.0f %% of the training rows are kept for it.", 100 * args.eval_fraction)
        if len(train) < 2:
            raise ValueError(f"{args.dataset_name} has {len(train)} rows, too few for training and evaluation.")
        parts = train.train_test_split(test_size=args.eval_fraction, seed=seed)
        train, evaluation = parts["train"], parts["test"]
        eval_name = f"{100 * args.eval_fraction:.0f} % of {args.train_split}, held out"
    train, evaluation = _first(train, args.max_train_samples), _first(evaluation, args.max_eval_samples)
    for name, rows in (("training", train), ("evaluation", evaluation)):
        if not len(rows):
            raise ValueError(f"There are no {name} rows in {args.dataset_name}.")
    return train, evaluation, eval_name


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


def _with_class_ids(
    rows: datasets.Dataset, args: DataArguments, like: datasets.Dataset | None = None
) -> datasets.Dataset:
    """Turns a column of class names, or of plain integers, into a `ClassLabel` column."""
    column = args.label_column
    for name, option in ((args.image_column, "--image_column"), (column, "--label_column")):
        if name not in rows.column_names:
            raise ValueError(
                f"{args.dataset_name} has no column {name!r}; it has {rows.column_names}. Name it with {option}."
                + (
                    " (An image folder gets labels only when it has two or more class folders.)"
                    if name == "label"
                    else ""
                )
            )
    if not len(rows):
        raise ValueError(f"{args.dataset_name} has no rows in split {rows.split}.")
    kind = rows.features.arrow_schema.field(column).type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"Column {column!r} of {args.dataset_name} must hold class ids or names, got {kind}.")
    values = rows.select_columns(column).with_format("arrow")[:][column]
    if values.null_count:
        row = pc.index(values.is_null().combine_chunks(), True).as_py()
        raise ValueError(f"Row {row} of {args.dataset_name}, split {rows.split}, has no label in column {column!r}.")
    if like is not None:
        known = like.features[column].names
        if is_text and (foreign := sorted(set(pc.unique(values).to_pylist()) - set(known))):
            raise ValueError(
                f"Split {rows.split} of {args.dataset_name} has classes that training lacks: {foreign[:10]}."
            )
        feature = like.features[column]
        return rows if rows.features[column] == feature else _cast(rows, column, feature)
    if isinstance(rows.features[column], datasets.ClassLabel):
        names = rows.features[column].names
    elif is_text:
        names = sorted(set(pc.unique(values).to_pylist()))
    else:
        lowest, highest = (value.as_py() for value in pc.min_max(pc.cast(values, pa.int64())).values())
        if not 0 <= lowest <= highest < MAX_CLASSES:
            raise ValueError(
                f"Column {column!r} of {args.dataset_name} has ids from {lowest} to {highest}; class ids count from 0 "
                f"and stay below {MAX_CLASSES:,}."
            )
        names = [str(index) for index in range(highest + 1)]
    if len(names) < 2:
        raise ValueError(f"{args.dataset_name} has {len(names)} class in column {column!r}; a classifier needs two.")
    feature = datasets.ClassLabel(names=names)
    return rows if rows.features[column] == feature else _cast(rows, column, feature)


def _cast(rows: datasets.Dataset, column: str, feature: datasets.ClassLabel) -> datasets.Dataset:
    if rows.features[column].dtype == "large_string":  # which the library cannot turn into class ids
        rows = rows.cast_column(column, datasets.Value("string"))
    return rows.cast_column(column, feature)


def _first(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    return rows if count is None else rows.select(range(min(max(count, 0), len(rows))))
