"""What an evaluation says of classes, and the files next to its results: scores of each class, the ROC of two, average precisions of several."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from ..data.sources import short_name
from ..per_class.report import describe_classes, write_class_report
from ..per_class.scores import MAX_CLASSES, ConfusionMatrix
from ..token_labeling.multi_label import multi_label_metrics
from .prediction_table import find_positive
from .test_sets import TestSet
from .two_classes import RocCurve, Wish, describe_curve, save_curve


@dataclass
class CollectedProbabilities:
    """Probabilities and labels of the images of this process, and then of all."""

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    @classmethod
    def of(cls, test_set: TestSet) -> "CollectedProbabilities | None":
        """For a test set; `None` where nothing is measured with them."""
        return cls() if test_set.is_multi_label or len(test_set.class_names) == 2 else None

    def add(self, rows: torch.Tensor, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Row numbers `(B,)`, probabilities `(B, C)`, and class ids `(B,)` or 0 and 1 `(B, C)`."""
        self.parts.append(tuple(part.cpu().numpy() for part in (rows, probabilities, labels)))

    def gather(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities and labels of all images, in the order of their rows; all processes must call it."""
        rows, probabilities, labels = map(np.concatenate, zip(*gather_object(self.parts)))
        order = np.argsort(rows, kind="stable")
        return probabilities[order], labels[order]


class ReportNames:
    """Names of the files of each classifier and test set.

    Args:
        output: JSON file of the results, next to which they lie; `None` for no files.
    """

    def __init__(self, output: str | None):
        self.output = None if output is None else Path(output).expanduser()
        self._taken: set[str] = set()

    def next(self, classifier: str, test_set: TestSet) -> Path:
        """A path without ending that no other pair has."""
        wanted = re.sub(r"[^\w.-]+", "_", f"{self.output.stem}_{short_name(classifier)}_{short_name(test_set.name)}")
        names = (wanted, *(f"{wanted}_{number}" for number in range(2, 1000)))
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        return self.output.with_name(name)


class PerClassReports:
    """What is said of the classes of each classifier and test set.

    Args:
        output: JSON file of the results, next to which figures and scores are written; `None` writes none.

    Attributes:
        texts: For the terminal, one of each pair.
    """

    def __init__(self, output: str | None):
        self.names = ReportNames(output)
        self.texts: list[str] = []

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
        if self.names.output is None:
            files = "--output_file FILE.json writes the confusion matrix (PNG) and these scores (JSON) next to it"
            self.texts.append(f"{about}: {describe_classes(test_set.class_names, confusions)}\n{files}")
            return measures
        stem = self.names.next(classifier, test_set)
        stem.parent.mkdir(parents=True, exist_ok=True)
        text = write_class_report(stem.parent, test_set.class_names, confusions, about, f"{stem.name}_")
        self.texts.append(f"{about}: {text}")
        return measures


class ProbabilityReports:
    """What is said of two classes and of images with several, for each classifier and test set.

    Args:
        output: JSON file of the results, next to which ROC curves are written; `None` writes none.
        positive_class: Name of the positive one of two classes; `None` for the second.
        wish: What its threshold shall reach.

    Attributes:
        texts: For the terminal, one of each pair with two classes.
    """

    def __init__(self, output: str | None, positive_class: str | None = None, wish: Wish | None = None):
        self.names = ReportNames(output)
        self.positive_class, self.wish, self.texts = positive_class, wish or Wish(), []

    def add(
        self, collected: CollectedProbabilities, classifier: str, test_set: TestSet, is_main_process: bool
    ) -> dict[str, Any]:
        """The measures; all processes must call it, and the main one writes."""
        probabilities, labels = collected.gather()
        if test_set.is_multi_label:
            return self._several(probabilities, labels, test_set)
        positive = find_positive(test_set.class_names, self.positive_class)
        about = f"{short_name(classifier)} on {len(labels):,} images of {short_name(test_set.name)} ({test_set.split})"
        is_positive = labels == positive
        if is_positive.all() or not is_positive.any():
            self.texts.append(f"{about}: no ROC, as all of them have one class")
            return {}
        record = RocCurve(probabilities[:, positive], is_positive).record(
            test_set.class_names[positive], self.wish, about
        )
        names = ("roc_auc", "average_precision", "positive_class", "threshold", "at_threshold")
        scores = {name: record[name] for name in names}
        if not is_main_process:
            return scores
        text = f"{about}\n{describe_curve(record, self.positive_class is not None)}"
        if self.names.output is None:
            text += "\n`output_file` FILE.json writes the ROC (PNG) and its thresholds (JSON) next to it"
        else:
            table, figure = save_curve(self.names.next(classifier, test_set), record)
            text += f"\nROC: {figure}\nthresholds: {table} (lvvit predict --threshold {table})"
        self.texts.append(text)
        return scores

    def _several(self, probabilities: np.ndarray, labels: np.ndarray, test_set: TestSet) -> dict[str, Any]:
        from sklearn.metrics import average_precision_score

        precisions = {
            name: float(average_precision_score(labels[:, index], probabilities[:, index]))
            if labels[:, index].any()
            else None
            for index, name in enumerate(test_set.class_names)
        }
        return {**multi_label_metrics(probabilities, labels), "images": len(labels), "average_precisions": precisions}


def check_problem_types(is_multi_label: bool, classifier: str, test_set: TestSet) -> None:
    """Raises a `ValueError` if only one of classifier and test set has several classes of an image."""
    if is_multi_label == test_set.is_multi_label:
        return
    if is_multi_label:
        raise ValueError(
            f"{classifier} gives an image several classes (multi-label), the images of {test_set.name} have one class each. Evaluate it on labels that "
            "are lists of classes (`label_separator` and `label_column_names` read others)."
        )
    raise ValueError(
        f"Images of {test_set.name} have several classes (multi-label), and {classifier} chooses one of its classes: it was not trained on such "
        "labels. Evaluate a model with `problem_type` multi_label_classification, or name a column with one class of each image (`label_column`)."
    )
