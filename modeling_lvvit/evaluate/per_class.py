"""Scores of each class of the test sets of an evaluation, and the files that hold them."""

import re
from pathlib import Path

from ..data.sources import short_name
from ..per_class.report import describe_classes, write_class_report
from ..per_class.scores import MAX_CLASSES, ConfusionMatrix
from .test_sets import TestSet


class PerClassReports:
    """What is said of the classes of each classifier and test set.

    Args:
        output: JSON file of the results, next to which figures and scores are written; `None` writes none.

    Attributes:
        texts: For the terminal, one of each pair.
    """

    def __init__(self, output: str | None):
        self.output = None if output is None else Path(output)
        self.texts: list[str] = []
        self._stems: set[str] = set()

    def matrix_for(self, class_names: list[str]) -> ConfusionMatrix | None:
        """What counts the images of a test set; `None`, which is said, for more classes than it can count."""
        if len(class_names) <= MAX_CLASSES:
            return ConfusionMatrix(len(class_names))
        text = f"no scores of each class: {len(class_names):,} classes are more than {MAX_CLASSES:,}"
        if text not in self.texts:
            self.texts.append(text)
        return None

    def add(
        self, confusion: ConfusionMatrix, classifier: str, test_set: TestSet, is_main_process: bool
    ) -> dict[str, float]:
        """Averages over the classes; all processes must call it, and the main one writes.

        Args:
            confusion: Filled by `evaluate`.
            classifier: Its name.
        """
        measures = confusion.compute()
        confusions = measures.pop("confusions")
        if not is_main_process:
            return measures
        model, name, images = short_name(classifier), short_name(test_set.name), int(confusions.counts.sum())
        about = f"{model} on {images:,} images of {name} ({test_set.split})"
        if self.output is None:
            files = "--output FILE.json writes the confusion matrix (PNG) and these scores (JSON) next to it"
            self.texts.append(f"{about}: {describe_classes(test_set.class_names, confusions)}\n{files}")
            return measures
        self.output.parent.mkdir(parents=True, exist_ok=True)
        stem = self._stem(f"{self.output.stem}_{model}_{name}")
        text = write_class_report(self.output.parent, test_set.class_names, confusions, about, f"{stem}_")
        self.texts.append(f"{about}: {text}")
        return measures

    def _stem(self, wanted: str) -> str:
        """Start of file names that no other pair has."""
        plain = re.sub(r"[^\w.-]+", "_", wanted)
        stem = next(
            name for name in (plain, *(f"{plain}_{number}" for number in range(2, 1000))) if name not in self._stems
        )
        self._stems.add(stem)
        return stem
