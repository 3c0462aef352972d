"""Opening data sets: Hub names, image folders, Parquet files and folders of them."""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers.utils import logging

from .label_columns import IDS_COLUMN, SCORES_COLUMN
from .transforms import AugmentationConfig


logger = logging.get_logger(__name__)
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
        image_size: Side of the model input in pixels, or height and width; default: that of the model.
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


def _load(args: DataArguments) -> datasets.DatasetDict:
    name = args.dataset_name
    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".parquet"
    if looks_local and not path.exists():
        raise FileNotFoundError(
            f"There is no data set at {path.resolve()}. Give a Hub name, a folder or a Parquet file."
        )
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is neither a folder nor a .parquet file.")
        return datasets.load_dataset("parquet", data_files={args.train_split: str(path)})
    return datasets.load_dataset(
        str(path) if path.is_dir() else name, args.dataset_config_name, revision=args.dataset_revision
    )


def open_datasets(args: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and evaluation rows.

    Args:
        args: What to open.
        seed: Seed of the split where the data has no evaluation part.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a split or column is missing; the message names what there is.
    """
    splits = _load(args)
    if args.train_split not in splits:
        raise ValueError(f"{args.dataset_name} has no split {args.train_split!r}; it has {list(splits)}.")
    if args.eval_split is not None and args.eval_split not in splits:
        raise ValueError(f"{args.dataset_name} has no split {args.eval_split!r}; it has {list(splits)}.")
    train = _with_class_ids(splits[args.train_split], args)
    eval_split = args.eval_split or next((name for name in EVALUATION_SPLITS if name in splits), None)
    if eval_split is None:
        logger.warning("No evaluation split: %.0f %% of the training rows are kept for it.", 100 * args.eval_fraction)
        parts = train.train_test_split(test_size=args.eval_fraction, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    else:
        evaluation = _with_class_ids(splits[eval_split], args, like=train)
    return _first(train, args.max_train_samples), _first(evaluation, args.max_eval_samples)


def has_dense_columns(rows: datasets.Dataset, args: DataArguments) -> bool:
    """Whether to train with dense labels.

    Raises:
        ValueError: If only one of the two columns is there.
    """
    present = [c in rows.column_names for c in (args.token_label_ids_column, args.token_label_scores_column)]
    if args.use_token_labels and any(present) and not all(present):
        raise ValueError(
            f"Dense labels need both {args.token_label_ids_column!r} and {args.token_label_scores_column!r}; "
            f"the data has {rows.column_names}."
        )
    return args.use_token_labels and all(present)


def _with_class_ids(
    rows: datasets.Dataset, args: DataArguments, like: datasets.Dataset | None = None
) -> datasets.Dataset:
    """Turns a column of class names, or of plain integers, into a `ClassLabel` column."""
    for column in (args.image_column, args.label_column):
        if column not in rows.column_names:
            raise ValueError(
                f"{args.dataset_name} has no column {column!r}; it has {rows.column_names}. Name it with "
                "--image_column or --label_column."
            )
    feature = rows.features[args.label_column]
    if isinstance(feature, datasets.ClassLabel):
        return rows
    if like is not None:
        return rows.cast_column(args.label_column, like.features[args.label_column])
    if feature.dtype == "string":
        return rows.class_encode_column(args.label_column)
    values = rows.with_format("numpy")[args.label_column][:]
    if values.min() < 0:
        raise ValueError(
            f"Column {args.label_column!r} of {args.dataset_name} has negative class ids ({values.min()})."
        )
    names = [str(index) for index in range(int(values.max()) + 1)]
    return rows.cast_column(args.label_column, datasets.ClassLabel(names=names))


def _first(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    return rows if count is None else rows.select(range(min(count, len(rows))))
