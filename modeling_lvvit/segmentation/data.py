"""What a segmentation run reads: the rows of its splits, which column holds masks, and what the classes are called."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging

from ..data.class_names import read_class_names
from ..data.masks import MaskEncoding
from ..data.sources import looks_local, open_splits
from ..data.splits import EVALUATION_SPLITS, find_eval_split, hold_out, split_to_evaluate
from .arguments import SegmentationDataArguments
from .dataset import ClassCounts, SegmentationDataset, values_in_masks
from .transforms import SegmentationEvalTransform, SegmentationTrainTransform


logger = logging.get_logger(__name__)
MASK_COLUMNS = (
    "annotation",
    "mask",
    "segmentation",
    "label",
    "labels",
    "segmentation_mask",
    "semantic",
    "annotations",
)
NAMES_FILE = "id2label.json"


@dataclass
class OpenedSegmentationData:
    """The data of a run, see `open_segmentation_data`.

    Args:
        train, evaluation, test: Rows with images and masks, `None` for those that were not asked for.
        eval_name: What the evaluation rows are called.
        encoding: How mask values stand for classes.
    """

    train: datasets.Dataset | None
    evaluation: datasets.Dataset
    eval_name: str
    mask_column: str
    class_names: list[str]
    encoding: MaskEncoding
    test: datasets.Dataset | None = None


def open_segmentation_data(
    args: SegmentationDataArguments, seed: int, model_names: list[str] | None = None, evaluate_only: bool = False
) -> OpenedSegmentationData:
    """Opens the splits and finds out about their masks.

    Args:
        seed: Of the split where the data has no evaluation part.
        model_names: Class names of a model, for data that has none.
        evaluate_only: Whether no training rows are needed.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a split or column is missing or empty, or classes do not fit each other.
    """
    splits = open_splits(args.dataset_name, args.dataset_config_name, args.dataset_revision, split=args.train_split)
    if args.test_split is not None and args.test_split not in splits:
        raise ValueError(f"{args.dataset_name} has no split {args.test_split!r}; it has {list(splits)}.")
    train = None if evaluate_only else splits.get(args.train_split)
    if evaluate_only:
        eval_name = split_to_evaluate(splits, args.eval_split)
        if eval_name is None:
            wanted = args.eval_split or " or ".join(EVALUATION_SPLITS)
            raise ValueError(
                f"{args.dataset_name} has no split {wanted}; it has {list(splits)}. Name it with `eval_split`."
            )
    else:
        eval_name = find_eval_split(splits, args.dataset_name, args.train_split, args.eval_split)
    if eval_name is not None:
        evaluation = splits[eval_name]
    else:
        training, held_out, eval_name = hold_out(
            len(train), args.eval_fraction, seed, args.dataset_name, args.train_split
        )
        train, evaluation = train.select(training), train.select(held_out)
    rows = {
        "training": _first(train, args.max_train_samples),
        "evaluation": _first(evaluation, args.max_eval_samples),
        "test": _first(splits.get(args.test_split), args.max_eval_samples),
    }
    for name, part in rows.items():
        if part is not None and not len(part):
            raise ValueError(f"There are no {name} rows in {args.dataset_name}.")
    mask_column = find_mask_column(evaluation, args)
    class_names, encoding = _find_classes(args, rows["training"] or rows["evaluation"], mask_column, model_names)
    weights = args.given_class_weights()
    if weights is not None and len(weights) != len(class_names):
        raise ValueError(f"`class_weights` has {len(weights)} numbers; the data has {len(class_names)} classes.")
    return OpenedSegmentationData(
        rows["training"], rows["evaluation"], eval_name, mask_column, class_names, encoding, test=rows["test"]
    )


def find_mask_column(rows: datasets.Dataset, args: SegmentationDataArguments) -> str:
    """The column of masks; a `ValueError` if there is no such column, or none of images."""
    if args.image_column not in rows.column_names:
        raise ValueError(
            f"{args.dataset_name} has no column {args.image_column!r}; it has {rows.column_names}. Name it with `image_column`."
        )
    paths = [datasets.Value(name) for name in ("string", "large_string")]
    for name in [args.mask_column] if args.mask_column is not None else MASK_COLUMNS:
        feature = rows.features.get(name)
        if isinstance(feature, datasets.Image) or (args.mask_column is not None and feature in paths):
            return name
    wanted = f"no column {args.mask_column!r} of images"
    if not args.mask_column:
        wanted = "no column of masks that is known by its name"
    about = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
    raise ValueError(
        f"{args.dataset_name} has {wanted}; it has {about}. Name it with `mask_column`. In the metadata.csv of an image folder "
        "the column is called mask_file_name; a folder of images and one of masks become such data by "
        "dataset_scripts/image_mask_folder.py."
    )


def _find_classes(
    args: SegmentationDataArguments, rows: datasets.Dataset, mask_column: str, model_names: list[str] | None
) -> tuple[list[str], MaskEncoding]:
    """Names of the classes, and how mask values stand for them."""
    names = _given_names(args) or _names_next_to_data(args)
    if names is not None and (len(names) < 2 or len(set(names)) != len(names)):
        raise ValueError(f"Class names must be two or more different names, got {names}.")
    names = model_names if names is None else names
    values = tuple(args.mask_values) if args.mask_values else None
    if names is None:
        count = 0 if values is None else len(values)
        if values is None:
            present = values_in_masks(rows, mask_column)
            present = present[present != args.ignore_index]
            count = int(present.max(initial=-1)) + 1 - args.reduce_labels
            if count < 2:
                raise ValueError(
                    f"The masks of {args.dataset_name} have the values {present.tolist()} besides {args.ignore_index}, which is ignored "
                    "(`ignore_index`): that is a single class. `mask_values` names the value of each class, for example 0 255."
                )
        names = [str(index) for index in range(count)]
        logger.warning("The classes have no names: they are numbered 0 to %d. `class_names` names them.", count - 1)
    return names, MaskEncoding(len(names), args.ignore_index, args.reduce_labels, values)


def _given_names(args: SegmentationDataArguments) -> list[str] | None:
    if args.class_names is None:
        return None
    names = list(args.class_names)
    if len(names) == 1 and Path(names[0]).suffix in (".json", ".txt"):
        return read_class_names(Path(names[0]))
    return names


def _names_next_to_data(args: SegmentationDataArguments) -> list[str] | None:
    """The names in `id2label.json` of a local folder or a repository of the Hub, `None` if it has none."""
    path = Path(args.dataset_name).expanduser()
    if path.exists() or looks_local(args.dataset_name):
        file = (path if path.is_dir() else path.parent) / NAMES_FILE
        return read_class_names(file) if file.is_file() else None
    try:
        file = hf_hub_download(args.dataset_name, NAMES_FILE, repo_type="dataset", revision=args.dataset_revision)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    return read_class_names(Path(file))


def _first(rows: datasets.Dataset | None, count: int | None) -> datasets.Dataset | None:
    return rows if rows is None or count is None else rows.select(range(min(max(count, 0), len(rows))))


def build_samples(
    args: SegmentationDataArguments, opened: OpenedSegmentationData, crop_size: tuple[int, int], processor: Any
) -> dict[str, SegmentationDataset | None]:
    """Training samples of `crop_size` pixels (height, width), jointly augmented, and whole images of the other splits."""
    statistics, encoding = (processor.image_mean, processor.image_std), opened.encoding
    train_transform = SegmentationTrainTransform(
        crop_size,
        *statistics,
        encoding.label_ignore_index,
        augmentation=args.augmentation(),
        short_side=args.short_side,
        long_side=args.long_side,
    )
    columns = {"image_column": args.image_column, "mask_column": opened.mask_column}
    samples = {}
    for name, rows in (("training", opened.train), ("evaluation", opened.evaluation), ("test", opened.test)):
        transform = train_transform if name == "training" else SegmentationEvalTransform(*statistics)
        samples[name] = rows and SegmentationDataset(rows, transform, encoding, **columns, name=name)
    return samples


def check_samples(
    samples: dict[str, SegmentationDataset | None], class_names: list[str], decode: Callable[[int], bool]
) -> ClassCounts | None:
    """Looks at all rows, and decodes all images of parts where `decode`, given their number, says so; returns the pixels of the training classes, and warns of classes that cannot be learned."""
    counts = {name: part.check_rows(decode(len(part))) for name, part in samples.items() if part is not None}
    training = counts.get("training")
    if training is not None and not training.pixels.all():
        absent = [name for name, pixels in zip(class_names, training.pixels) if not pixels]
        listed = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        logger.warning("No training mask has %s: the model cannot learn them.", listed)
    return training
