"""Scores of each class: precision, recall, F1, and which classes are taken for which."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..training.metrics import AccumulatingMetric, compute_accuracy


AVERAGES = ("balanced_accuracy", "macro_precision", "macro_f1")
MAX_CLASSES = 3000  # whose matrix is counted by `ConfusionMatrix`: 72 MB


@dataclass(frozen=True)
class Confusions:
    """A confusion matrix without its zeros.

    Args:
        true, predicted: `(P,)` class ids of each pair that there is.
        counts: `(P,)` images of the pair.
        num_classes: Number of classes C.
    """

    true: np.ndarray
    predicted: np.ndarray
    counts: np.ndarray
    num_classes: int

    @classmethod
    def from_classes(cls, true: Sequence[int], predicted: Sequence[int], num_classes: int) -> "Confusions":
        """From the true and the predicted class of each image."""
        pairs = np.asarray(true, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
        pairs, counts = np.unique(pairs, return_counts=True)
        return cls(pairs // num_classes, pairs % num_classes, counts, num_classes)

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> "Confusions":
        """From images by true (rows) and predicted class (columns), `(C, C)`."""
        true, predicted = np.nonzero(matrix)
        return cls(true, predicted, matrix[true, predicted], len(matrix))

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        """See `scores`, which several parts of a report ask for."""
        from sklearn.metrics import precision_recall_fscore_support  # takes a second, which not every program should

        if not len(self.counts):  # which scikit-learn refuses
            nothing = np.full(self.num_classes, np.nan)
            return {
                **dict.fromkeys(("precision", "recall", "f1"), nothing),
                "support": np.zeros(self.num_classes, int),
            }
        precision, recall, f1, support = precision_recall_fscore_support(
            self.true, self.predicted, labels=range(self.num_classes), sample_weight=self.counts, zero_division=0
        )
        absent = support == 0
        predicted = np.bincount(self.predicted, self.counts, self.num_classes)
        recall, f1 = (np.where(absent, np.nan, values) for values in (recall, f1))
        precision = np.where(absent & (predicted == 0), np.nan, precision)
        return {"precision": precision, "recall": recall, "f1": f1, "support": support.astype(np.int64)}

    def scores(self) -> dict[str, np.ndarray]:
        """`precision`, `recall` and `f1` in [0, 1] and `support`, the number of images, of each class, `(C,)`. The recall of a class
        without images is `nan`; the precision of one that is never predicted is 0 if it has images, else `nan`.

        Example: 3 images of class 0, of which 1 is taken for class 1, and 1 of class 1: precision 1 and 1/2, recall 2/3 and 1,
        F1 0.8 and 2/3.
        """
        return self._scores

    def averages(self) -> dict[str, float]:
        """`balanced_accuracy` (mean recall), `macro_precision` and `macro_f1`: means over the classes that have images, all alike, in
        [0, 1]; `nan` without images."""
        scores = self.scores()
        is_shown = scores["support"] > 0
        names = zip(AVERAGES, ("recall", "precision", "f1"))
        return {name: float(scores[key][is_shown].mean()) if is_shown.any() else float("nan") for name, key in names}

    def matrix(self, classes: Sequence[int]) -> np.ndarray:
        """Images by true and predicted class of some classes, `(k, k)` int64."""
        place = np.full(self.num_classes, -1)
        place[list(classes)] = np.arange(len(classes))
        rows, columns = place[self.true], place[self.predicted]
        is_among = (rows >= 0) & (columns >= 0)
        matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        matrix[rows[is_among], columns[is_among]] = self.counts[is_among]
        return matrix

    def mistakes(self) -> list[tuple[int, int, int]]:
        """True class, class that it is taken for, and number of images; the most frequent first."""
        wrong = np.flatnonzero(self.true != self.predicted)
        wrong = wrong[np.argsort(-self.counts[wrong], kind="stable")]
        columns = (self.true, self.predicted, self.counts)
        return list(zip(*(column[wrong].tolist() for column in columns)))


class ConfusionMatrix(AccumulatingMetric):
    """Images by true and predicted class, over all processes; of at most `MAX_CLASSES` classes."""

    def __init__(self, num_labels: int, **kwargs: Any):
        super().__init__((num_labels, num_labels), **kwargs)

    def describe(self) -> tuple[str, str]:
        """What is measured, and what predictions and references are."""
        return "Images by true and predicted class.", "predictions and references: class ids of each image."

    def add_batch(self, *, predictions: Any, references: Any, **kwargs: Any) -> None:
        """Counts images: predicted and true class ids, `(B,)` each."""
        truth, predicted = (torch.as_tensor(ids).cpu().long() for ids in (references, predictions))
        self.counts.view(-1).index_add_(0, truth * len(self.counts) + predicted, torch.ones_like(truth))

    def measures(self, counts: np.ndarray) -> dict[str, Any]:
        """`confusions`, and their averages."""
        confusions = Confusions.from_matrix(counts)
        return {"confusions": confusions, **confusions.averages()}


class ComputeClassMetrics:
    """`compute_metrics` of a Trainer whose predictions are ranked (`rank_classes`): accuracies, and averages over the classes.

    Attributes:
        confusions: Of the last evaluation.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.confusions: Confusions | None = None

    def __call__(self, prediction: Any) -> dict[str, float]:
        best = prediction.predictions[:, 0]
        self.confusions = Confusions.from_classes(prediction.label_ids, best, self.num_classes)
        return compute_accuracy(prediction) | self.confusions.averages()
