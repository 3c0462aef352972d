"""Test sets: rows of any data, which classes of a model they have, and the folders of ImageNet-C."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ..data.classes.class_labels import check_columns, names_in_data, pair_classes
from ..data.classes.class_matching import ClassMap
from ..data.classes.multi_label import are_lists_named, class_names, has_lists, labelled, with_labels
from ..data.sources import open_splits
from ..data.splits import draw_subset, split_to_evaluate


VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
SEVERITIES = ("1", "2", "3", "4", "5")
MIN_COMPARED, MIN_AGREEMENT = (
    50,
    0.3,
)  # images, and share of them whose label people see too, below which something is mixed up


@dataclass
class TestSet:
    """Labelled images to evaluate on.

    Args:
        name: What results call it.
        rows: With an image column, and one of `ClassLabel` or of lists of them.
        class_names: Names of its classes, by id.
        are_named: Whether they are more than numbers.
        split: Name of the split.
        num_rows: Rows of the split, also where a subset is evaluated.
        row_numbers: Which of them are evaluated, ascending int64.
        is_multi_label: Whether an image may have several classes, or none.
    """

    __test__ = False  # not a test of pytest

    name: str
    rows: datasets.Dataset
    class_names: list[str]
    are_named: bool
    split: str
    num_rows: int
    row_numbers: np.ndarray
    is_multi_label: bool = False


def open_test_set(
    name: str,
    split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    max_samples: int | None = None,
    label_separator: str | None = None,
    label_column_names: list[str] | None = None,
) -> TestSet:
    """Opens a split of a dataset.

    Args:
        name: Hub name, image folder, folder of Parquet files, or one of these.
        split: Default: the first of validation, val, valid, dev, test, or the only one.
        config_name, revision: On the Hub.
        image_column, label_column: Column names.
        max_samples: Size of a subset, see `select_subset`.
        label_separator, label_column_names: Of images with several classes, see `labelled`.

    Raises:
        FileNotFoundError: If there is no such data.
        ValueError: If split or columns are missing or unfit.
    """
    splits = open_splits(name, config_name, revision)
    split_name = split_to_evaluate(splits, split)
    if split_name is None and split is None:
        raise ValueError(f"{name} has the splits {list(splits)}. Name one with `split`.")
    if split_name is None:
        raise ValueError(f"{name} has no split {split!r}; it has {list(splits)}.")
    rows = labelled(splits[split_name], name, label_column, label_separator, label_column_names)
    check_columns(rows, name, image_column, label_column)
    if not isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image())
    is_multi_label = has_lists(rows, label_column)
    are_named = are_lists_named(rows, label_column) if is_multi_label else names_in_data(rows, name, label_column)[1]
    rows = with_labels(rows, name, label_column)
    num_rows = len(rows)
    row_numbers = draw_subset(rows, max_samples, label_column)
    rows = rows.select(row_numbers)
    if not len(rows):
        raise ValueError(f"{name} has no rows in split {split_name}.")
    names = class_names(rows, label_column)
    return TestSet(name, rows, names, are_named, split_name, num_rows, row_numbers, is_multi_label)


def model_class_map(model_names: Sequence[str], test_set: TestSet, class_map: str | None = None) -> ClassMap | None:
    """Which classes of a model those of a test set are; `None` if both number them alike.

    Classes are paired by name, synonym or WordNet id; a test set of fewer classes (ImageNet-A, ImageNet-R) takes the best of these
    only, as usual for such sets. Folders that are called by numbers (ImageNet-V2) name class ids, unless the classes of the model are
    called so.

    Args:
        model_names: Class names of the model, by id.
        test_set: Its names are read.
        class_map: See `pair_classes`.

    Raises:
        ValueError: If classes do not match or cannot be compared.
    """
    numbers = [name for name in test_set.class_names if name.isdecimal()]
    are_numbers = test_set.are_named and len(numbers) == len(test_set.class_names)
    if class_map is None and are_numbers:
        names = list(model_names)
        # a model that was trained on such folders has their names, in their order; others count their classes
        ids = [names.index(name) if set(numbers) <= set(names) else int(name) for name in numbers]
        if ids == list(range(len(names))):
            return None
        if max(ids) >= len(model_names):
            raise ValueError(
                f"{test_set.name} has a class folder {max(ids)}; the model has the classes 0 to {len(model_names) - 1}."
            )
        return ClassMap(tuple((index,) for index in ids), len(model_names))
    pairs, _ = pair_classes(model_names, test_set.class_names, test_set.are_named, class_map, True, test_set.name)
    return None if pairs is not None and pairs.is_identity else pairs


def reassessed_labels(
    test_set: TestSet, image_column: str, label_column: str, labels: Sequence[Sequence[int]]
) -> list[frozenset[int] | None]:
    """Re-assessed labels of every row: by the number in its file name (`ILSVRC2012_val_00000001`), else by its place.

    Args:
        test_set: Of the classes of ImageNet-1k in their order.
        image_column, label_column: Its columns.
        labels: See `scores.read_real_labels`.

    Raises:
        ValueError: If they do not belong to the rows, or name other classes; in ImageNet nine in ten hold the label of their image.
    """
    rows = test_set.rows.select_columns([image_column, label_column]).cast_column(
        image_column, datasets.Image(decode=False)
    )
    paths, human = [], []
    # chunk by chunk: all images in one array would be copied, and 2 GB are the most it can hold
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        paths += [path for chunk in batch[image_column].chunks for path in chunk.field("path").to_pylist()]
        human += batch[label_column].to_pylist()
    matches = [VALIDATION_NUMBER.search(path or "") for path in paths]
    if all(matches):
        numbers = [int(match.group(1)) - 1 for match in matches]
    elif len(labels) == test_set.num_rows:
        numbers = test_set.row_numbers.tolist()
    else:
        raise ValueError(
            f"{test_set.name} has {test_set.num_rows} images, there are {len(labels)} re-assessed labels, and files are not called "
            "ILSVRC2012_val_00000001...: no one can tell which label is whose."
        )
    highest = max((index for classes in labels for index in classes), default=0)
    if max(numbers) >= len(labels) or highest >= len(test_set.class_names):
        raise ValueError(
            f"The re-assessed labels are of {len(labels)} images and at least {highest + 1} classes; {test_set.name} has images up to "
            f"{max(numbers) + 1} and {len(test_set.class_names)} classes."
        )
    real = [frozenset(labels[number]) or None for number in numbers]
    agree = [label in classes for label, classes in zip(human, real) if classes]
    if len(agree) >= MIN_COMPARED and np.mean(agree) < MIN_AGREEMENT:
        raise ValueError(
            f"Only {100 * np.mean(agree):.0f} % of the re-assessed labels hold the label of their image in {test_set.name}: they belong to "
            "other images, or its classes are not in the order of ImageNet-1k."
        )
    return real


def corruption_folders(root: Path) -> dict[str, dict[str, Path]]:
    """The image folders of ImageNet-C: corruption -> severity -> folder of class folders.

    Args:
        root: Folder with `CORRUPTION/SEVERITY/CLASS/...`; archives may have brought their own folder (`noise/gaussian_noise/...`).

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are no corruptions, one lacks severities, or a severity lacks classes that others have.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of corruptions {root}.")
    folders: dict[str, dict[str, Path]] = {}
    patterns = [
        f"{above}/{severity}" for above in ("*", "*/*") for severity in SEVERITIES
    ]  # no deeper: there are a million files
    for folder in sorted({path.parent for pattern in patterns for path in root.glob(pattern) if path.is_dir()}):
        severities = {severity: folder / severity for severity in SEVERITIES if (folder / severity).is_dir()}
        if any(name.name not in SEVERITIES for name in folder.iterdir() if name.is_dir()):
            continue  # a class folder that is called 1
        if len(severities) != len(SEVERITIES):
            raise ValueError(
                f"{folder} has the severities {', '.join(severities)}; expected {', '.join(SEVERITIES)}: complete it, or move it away "
                "(without all 15 corruptions there is no mean corruption error)."
            )
        if folder.name in folders:
            raise ValueError(f"{root} has {folder.name} twice: {folders[folder.name]['1'].parent} and {folder}.")
        folders[folder.name] = severities
    if not folders:
        raise ValueError(f"{root} has no folders CORRUPTION/SEVERITY/CLASS.")
    _check_same_classes([folder for severities in folders.values() for folder in severities.values()])
    return folders


def _check_same_classes(folders: Sequence[Path]) -> None:
    """Raises a `ValueError` if a folder lacks class folders of another: decisions among fewer classes are easier."""
    classes = {folder: {path.name for path in folder.iterdir() if path.is_dir()} for folder in folders}
    everywhere = set().union(*classes.values())
    incomplete = [folder for folder in folders if len(classes[folder]) < len(everywhere)]
    if incomplete:
        absent = ", ".join(sorted(everywhere - classes[incomplete[0]])[:3])
        raise ValueError(
            f"{len(incomplete)} of {len(folders)} folders of corruptions lack classes that others have; {incomplete[0]} has "
            f"{len(classes[incomplete[0]])} of {len(everywhere)} and lacks {absent}, for example. Complete the copy."
        )
