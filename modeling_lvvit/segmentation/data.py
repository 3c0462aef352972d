"""What a segmentation run reads: the rows of its splits, which column holds masks, and what the classes are called."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.utils import logging

from ..data.classes.class_labels import read_class_names
from ..data.masks import MANY_VALUES, NEAREST_VALUES, MaskEncoding, has_soft_borders, list_values
from ..data.sources import looks_local, open_splits
from ..data.splits import EVALUATION_SPLITS, find_eval_split, hold_out, split_to_evaluate, take_subset
from ..per_class.weights import given_class_weights
from .arguments import SegmentationDataArguments
from .dataset import ClassCounts, SegmentationDataset, count_mask_values
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
NAMES_FILE, MASKS_FILE = "id2label.json", "mask_settings.json"
LARGE_IGNORED_SHARE = 0.25  # of the pixels, from which on a class may be among them
MIN_PRESENT_SHARE = (
    0.25  # of the numbers up to the largest value, below which masks of unnamed classes do not count them
)


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
        if args.eval_split is None and eval_name == args.train_split:
            logger.warning(
                "%s has no evaluation split: all of %s is evaluated, also what was trained on.",
                args.dataset_name,
                eval_name,
            )
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
        "training": take_subset(train, args.max_train_samples),
        "evaluation": take_subset(evaluation, args.max_eval_samples),
        "test": take_subset(splits.get(args.test_split), args.max_eval_samples),
    }
    for name, part in rows.items():
        if part is not None and not len(part):
            raise ValueError(f"There are no {name} rows in {args.dataset_name}.")
    mask_column = find_mask_column(evaluation, args)
    parts = [part for part in rows.values() if part is not None]
    class_names, encoding = _find_classes(args, parts, mask_column, model_names)
    given_class_weights(args.class_weights, class_names)  # raises on those of other classes
    return OpenedSegmentationData(
        rows["training"], rows["evaluation"], eval_name, mask_column, class_names, encoding, test=rows["test"]
    )


def find_mask_column(rows: datasets.Dataset, args: SegmentationDataArguments) -> str:
    """The column of masks; a `ValueError` if there is no such column, or none of images."""
    if args.image_column_name not in rows.column_names:
        raise ValueError(
            f"{args.dataset_name} has no column {args.image_column_name!r}; it has {rows.column_names}. Name it with `image_column`."
        )
    paths = [datasets.Value(name) for name in ("string", "large_string")]
    for name in [args.mask_column_name] if args.mask_column_name is not None else MASK_COLUMNS:
        feature = rows.features.get(name)
        if isinstance(feature, datasets.Image) or (args.mask_column_name is not None and feature in paths):
            return name
    wanted = f"no column {args.mask_column_name!r} of images"
    if not args.mask_column_name:
        wanted = "no column of masks that is known by its name"
    about = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
    raise ValueError(
        f"{args.dataset_name} has {wanted}; it has {about}. Name it with `mask_column`. In the metadata.csv of an image folder "
        "the column is called mask_file_name; a folder of images and one of masks become such data by "
        "lvvit masks."
    )


def _find_classes(
    args: SegmentationDataArguments, parts: list[datasets.Dataset], mask_column: str, model_names: list[str] | None
) -> tuple[list[str], MaskEncoding]:
    """Names of the classes, and how mask values stand for them. `parts`: all rows that will be read."""
    _check_stated_settings(args)
    file = None if args.class_names else _file_next_to_data(args, NAMES_FILE)
    names = _given_names(args) if file is None else read_class_names(file)
    if names is not None and (len(names) < 2 or len(set(names)) != len(names)):
        raise ValueError(f"Class names must be two or more different names, got {names}.")
    names = model_names if names is None else names
    values = tuple(args.mask_values) if args.mask_values else None
    if names is None:
        count = _count_classes(args, parts, mask_column) if values is None else len(values)
        names = [str(index) for index in range(count)]
        logger.warning("The classes have no names: they are numbered 0 to %d. `class_names` names them.", count - 1)
    return names, MaskEncoding(len(names), args.ignored_value, args.reduce_labels, values)


def _count_classes(args: SegmentationDataArguments, parts: list[datasets.Dataset], mask_column: str) -> int:
    """The number of classes of masks whose classes nobody has named: the largest value tells.

    Raises:
        ValueError: If it does not, because there is one value, values are far apart, or they are gray levels.
    """
    pixels, jpegs = count_mask_values(parts, mask_column)
    values = np.flatnonzero(pixels)
    present = values[values != args.ignored_value]
    count = int(present.max(initial=-1)) + 1 - args.reduce_labels
    if count < 2:
        raise ValueError(
            f"The masks of {args.dataset_name} have the values {present.tolist()} besides {args.ignored_value}, which is ignored "
            "(`ignore_index`): that is a single class. `mask_values` names the value of each class, for example 0 255."
        )
    is_soft = has_soft_borders(pixels)
    if jpegs or is_soft:
        cause = (
            f"{jpegs} of them are JPEG files, which change values" if jpegs else "most in between are of few pixels"
        )
        raise ValueError(
            f"The masks of {args.dataset_name} have {len(values)} values from {values[0]} to {values[-1]}, and {cause}: they do not tell "
            f"the classes. Instead {NEAREST_VALUES}; or name the classes: `class_names`."
        )
    if len(present) < MIN_PRESENT_SHARE * count:
        raise ValueError(
            f"The masks of {args.dataset_name} have the values {list_values(present)} only, and {args.ignored_value} is ignored "
            f"(`ignore_index`): too few to count {count} classes by. `mask_values` {' '.join(map(str, values[:MANY_VALUES]))} makes a class "
            "of each value; `class_names` names all classes."
        )
    return count


def _given_names(args: SegmentationDataArguments) -> list[str] | None:
    if args.class_names is None:
        return None
    names = list(args.class_names)
    if len(names) == 1 and Path(names[0]).suffix in (".json", ".txt"):
        return read_class_names(Path(names[0]))
    return names


def _check_stated_settings(args: SegmentationDataArguments) -> None:
    """Raises a `ValueError` if the data says in `mask_settings.json` that its masks are read otherwise: classes would be shifted."""
    file = _file_next_to_data(args, MASKS_FILE)
    stated = json.loads(file.read_text(encoding="utf-8")).get("reduce_labels") if file is not None else None
    if stated is not None and stated != args.reduce_labels and args.mask_values is None:
        raise ValueError(
            f"{args.dataset_name} says in {MASKS_FILE} that 0 in its masks is {'no class and 1 the first one' if stated else 'a class'}: "
            f"give `reduce_labels` {str(stated).lower()}."
        )


def _file_next_to_data(args: SegmentationDataArguments, name: str) -> Path | None:
    """A file of a local folder or a repository of the Hub, `None` if it has no such file."""
    path = Path(args.dataset_name).expanduser()
    if path.exists() or looks_local(args.dataset_name):
        file = (path if path.is_dir() else path.parent) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(args.dataset_name, name, repo_type="dataset", revision=args.dataset_revision))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


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
    columns = {"image_column": args.image_column_name, "mask_column": opened.mask_column}
    samples = {}
    for name, rows in (("training", opened.train), ("evaluation", opened.evaluation), ("test", opened.test)):
        transform = train_transform if name == "training" else SegmentationEvalTransform(*statistics)
        samples[name] = rows and SegmentationDataset(rows, transform, encoding, **columns, name=name)
    return samples


def check_samples(
    samples: dict[str, SegmentationDataset | None],
    class_names: list[str],
    decode: Callable[[int], bool] = lambda num_rows: False,
) -> ClassCounts | None:
    """Looks at all rows, and decodes all images of parts where `decode`, given their number, says so; returns the pixels of the training
    classes, and warns of classes that cannot be learned and of many ignored pixels. Raises a `ValueError` if the training masks have a
    single class."""
    counts = {name: part.check_rows(decode(len(part))) for name, part in samples.items() if part is not None}
    for name, part in counts.items():
        is_single, text = np.count_nonzero(part.pixels) == 1, _describe_ignored(name, part, samples[name].encoding)
        if is_single:
            only = class_names[int(part.pixels.argmax())]
            text = f"All pixels of the {name} masks that count are of the class {only!r}. {text}"
        if is_single and name == "training":
            raise ValueError(f"{text} A model of a single class is no result.")
        if is_single or part.ignored_share > LARGE_IGNORED_SHARE:
            logger.warning("%s", text)
    training = counts.get("training")
    if training is not None and not training.pixels.all():
        is_absent = training.pixels == 0
        absent = [name for name, there_is_none in zip(class_names, is_absent) if there_is_none]
        listed = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        evaluated = sum(part.pixels for part in counts.values())[is_absent] > 0
        text = f" The evaluation has {evaluated.sum()} of them, which will score 0." if evaluated.any() else ""
        logger.warning("No training mask has %s: the model cannot learn them.%s", listed, text)
    return training


def _describe_ignored(name: str, counts: ClassCounts, encoding: MaskEncoding) -> str:
    """How many pixels are ignored, and how they would become a class."""
    if not counts.ignored:
        return "None is ignored."
    about = f"{100 * counts.ignored_share:.0f} % of the pixels of the {name} masks are ignored"
    if encoding.reduce_labels:
        return f"{about}: 0 is no class with `reduce_labels`. If it is one, leave that out."
    values = sorted({*np.array(encoding.class_values)[counts.pixels > 0].tolist(), encoding.ignore_index})
    listed = " ".join(map(str, values[:MANY_VALUES])) + (" ..." * (len(values) > MANY_VALUES))
    return f"{about} (`ignore_index` {encoding.ignore_index}). If {encoding.ignore_index} is a class, give `mask_values` {listed}."
