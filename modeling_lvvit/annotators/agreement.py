"""Whether the dense labels that were just made agree with the human labels of their images."""

from pathlib import Path

import datasets
import numpy as np

from ..data.classes.class_labels import class_ids, with_class_ids
from ..labels.label_crops import top_classes
from ..labels.label_set import LabelSet
from ..labels.reader import LabelMapReader


MAX_COMPARED = 2000  # maps
LOW = 0.5  # share of maps whose first class is the human label
OFTEN, MUCH = 1.5, 0.1  # times as often, and share of all maps more, than the data has a class


def compare_with_labels(folder: Path, rows: datasets.Dataset, name: str, split: str, label_column: str) -> list[str]:
    """Compares the first class of at most 2,000 maps with the human labels; lines for the user, none where there are no labels.

    Args:
        folder: Of a finished label set.
        rows: The images that it was made for, in its order.
        name: What messages call the data.
    """
    if label_column not in rows.column_names:
        return []
    labels = LabelSet.open(str(folder), split)
    if rows.features[label_column] != datasets.ClassLabel(names=labels.class_names):
        try:
            rows = with_class_ids(rows, name, label_column, class_names=labels.class_names, may_be_missing=True)
        except ValueError as error:
            return [f"not compared with the human labels: {error}"]
    classes = class_ids(rows, label_column)
    compared = np.flatnonzero(~labels.is_empty & (classes >= 0))
    if not len(compared):
        return []
    compared = compared[np.unique(np.linspace(0, len(compared) - 1, MAX_COMPARED).astype(int))]
    maps = LabelMapReader(labels.rows).fetch(compared)
    return describe_first_classes(top_classes(maps, len(labels.class_names)), classes[compared], labels.class_names)


def describe_first_classes(first: np.ndarray, classes: np.ndarray, names: list[str]) -> list[str]:
    """How often first classes of maps are the human labels, and warnings where that is rare, or one class comes too often.

    Args:
        first, classes: Class ids of maps and of their images, `(n,)`.
        names: Of the classes, by id.
    """
    number, agreeing = len(first), float((first == classes).mean())
    lines = [f"{100 * agreeing:.1f} % of {number:,} maps have the human label as their first class"]
    if agreeing < LOW:
        lines.append(
            "WARNING: most maps have another first class than the human label of their image. Look at them (lvvit check LABEL_SET IMAGES "
            "--contact_sheet labels.png) before training: do the ids mean the same classes, and is the annotator made for such images?"
        )
    shares = [np.bincount(ids, minlength=len(names)) / number for ids in (first, classes)]
    index = int((shares[0] - shares[1]).argmax())
    there, expected = float(shares[0][index]), float(shares[1][index])
    by_chance = 3 * (expected * (1 - expected) / number) ** 0.5  # of a sample this small
    if there >= OFTEN * expected and there - expected > max(MUCH, by_chance):
        times = f", {there / expected:.1f} times as often" if expected else ""
        lines.append(
            f"WARNING: {names[index]} is the first class of {100 * there:.0f} % of the maps, and the label of {100 * expected:.0f} % of "
            f"the images{times}: the annotator prefers it."
        )
    return lines
