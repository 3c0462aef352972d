"""What label maps say of their whole images, and how often that is the human label."""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ...console import progress_bar
from ...data.classes.class_labels import class_ids, with_class_ids
from ...data.classes.class_matching import shown_names
from ..label_crops import top_classes, whole_image_classes
from ..label_set import LabelSet
from ..reader import LabelMapReader
from .report import ROWS_PER_BATCH


MAX_COMPARED = 2000  # maps of a set that was just made
LOW = 0.5  # share of maps whose first class is the human label
OF_CROPS = "Parts of images, enlarged, may look like something else to the annotator: compare with labels of whole images (lvvit annotate)."
OFTEN, MUCH = 1.5, 0.1  # times as often, and share of all maps more, than the data has a class


@dataclass(frozen=True)
class Agreement:
    """Label maps next to the human labels of their images.

    Args:
        first, classes: Class ids `(n,)`: that of the map, pooled over the image, and the human label.
        named: Share of maps that name the human label in any cell; `None` where every cell names all classes.
        are_crops: Whether the maps are of crops, not of whole images.
    """

    first: np.ndarray
    classes: np.ndarray
    named: float | None = None
    are_crops: bool = False

    @property
    def share(self) -> float:
        """Share of maps whose first class is the human label."""
        return float((self.first == self.classes).mean())

    def summary(self, maps: str = "maps") -> str:
        """One line for people, on what `maps` names."""
        also = "" if self.named is None else f", {100 * self.named:.1f} % name it"
        return f"{100 * self.share:.1f} % of {maps} have the human label as their first class{also}"

    def warnings(self, class_names: list[str]) -> list[str]:
        """What is suspicious: few maps agree, or one class comes first far more often than the data has it; with advice for crops."""
        lines, maps = [], "crops" if self.are_crops else "maps"
        if self.share < LOW:
            lines.append(
                f"most {maps} have another first class than the human label of their image. Look at them (lvvit check LABEL_SET IMAGES "
                "--contact_sheet labels.png) before training: do labels and images belong together, do the ids mean the same classes, "
                "and is the annotator made for such images?"
            )
        number = len(self.first)
        shares = [np.bincount(ids, minlength=len(class_names)) / number for ids in (self.first, self.classes)]
        index = int((shares[0] - shares[1]).argmax())
        there, expected = float(shares[0][index]), float(shares[1][index])
        by_chance = 3 * (expected * (1 - expected) / number) ** 0.5  # of a sample this small
        if there >= OFTEN * expected and there - expected > max(MUCH, by_chance):
            times = f", {there / expected:.1f} times as often" if expected else ""
            lines.append(
                f"{shown_names(class_names)[index]} is the first class of {100 * there:.0f} % of the {maps}, and the label of "
                f"{100 * expected:.0f} % of the images{times}: the annotator prefers it."
            )
        if lines and self.are_crops:
            lines[-1] += f" {OF_CROPS}"
        return lines

    def lines(self, class_names: list[str], maps: str = "maps") -> list[str]:
        """`summary` and `warnings`, these marked as such."""
        return [self.summary(maps), *(f"WARNING: {line}" for line in self.warnings(class_names))]


def compare(label_maps: LabelMapReader, classes: np.ndarray) -> Agreement:
    """Compares label maps with the human labels of their images, `classes` `(n,)`, as many as maps.

    Raises:
        LabelMapError: If a map cannot be read.
    """
    first, named, names_all = [], 0, True
    starts = range(0, len(classes), ROWS_PER_BATCH)
    for start in progress_bar(starts, desc="Comparing with labels", unit="batch", disable=len(starts) < 2):
        expected = classes[start : start + ROWS_PER_BATCH]
        maps = label_maps.fetch(range(start, start + len(expected)))
        first.append(top_classes(maps, label_maps.num_classes))
        named += sum(label in palette for label, palette in zip(expected, maps.palettes))
        names_all &= maps.index.shape[1] == label_maps.num_classes
    return Agreement(
        np.concatenate(first), classes, None if names_all else named / len(classes), label_maps.is_of_crops
    )


def spread_labelled(classes: np.ndarray, at_most: int) -> np.ndarray:
    """At most so many rows with a human label, spread over all of them: ascending int64. `classes` `(n,)` are -1 without one."""
    rows = np.flatnonzero(classes >= 0)
    return rows[np.unique(np.linspace(0, len(rows) - 1, at_most).astype(int))] if len(rows) else rows


def compare_some(label_maps: LabelMapReader, classes: np.ndarray, at_most: int) -> Agreement | None:
    """Compares at most so many label maps with the human labels of their images, `classes` `(n,)`; `None` where these are all -1.

    Raises:
        LabelMapError: If a map cannot be read.
    """
    rows = spread_labelled(classes, at_most)
    return compare(label_maps.select(rows), classes[rows]) if len(rows) else None


def compare_with_labels(folder: Path, rows: datasets.Dataset, name: str, split: str, label_column: str) -> list[str]:
    """Compares at most 2,000 maps with the human labels; lines for the user, none where there are no labels.

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
    return compare_set(labels, class_ids(rows, label_column))


def compare_set(labels: LabelSet, classes: np.ndarray) -> list[str]:
    """Compares at most 2,000 maps of a set with `classes` `(n,)`, -1 for none; lines for the user, none where there is nothing to compare."""
    maps = "maps of crops" if labels.is_of_crops else "maps"
    classes = np.where(labels.is_empty, -1, classes)
    result = compare_some(LabelMapReader(labels.rows), classes, MAX_COMPARED)
    return [] if result is None else result.lines(labels.class_names, f"{len(result.classes):,} {maps}")


def image_classes(label_maps: LabelMapReader, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What each label map says of its whole image: the most probable class `(n,)` int64, and its probability `(n,)` float32."""
    parts = []
    starts = range(0, len(label_maps), ROWS_PER_BATCH)
    for start in progress_bar(starts, desc="Reading label maps", unit="batch", disable=len(starts) < 2):
        rows = range(start, min(start + ROWS_PER_BATCH, len(label_maps)))
        parts.append(whole_image_classes(label_maps.fetch(rows), num_classes))
    classes, confidence = zip(*parts)
    return np.concatenate(classes), np.concatenate(confidence)
