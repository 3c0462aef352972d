"""Measures of semantic segmentation from a confusion matrix, whose size does not depend on the number of images."""

from typing import Any

import numpy as np
import torch

from ..training.metrics import AccumulatingMetric


def confusion_matrix(
    predictions: torch.Tensor, labels: torch.Tensor, num_labels: int, ignore_index: int = 255
) -> torch.Tensor:
    """Numbers of pixels by true class (rows) and predicted class (columns).

    Args:
        predictions: Class ids of any shape, in `[0, num_labels)`.
        labels: The same shape; `ignore_index` is not counted.

    Returns:
        int64 `(C, C)` on the device of the predictions.

    Raises:
        ValueError: If shapes differ, or there are other ids.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"Predictions {tuple(predictions.shape)} and labels {tuple(labels.shape)} differ in shape.")
    predictions, labels = predictions.long(), labels.long()  # an ignore index may not fit into their own types
    counted = labels != ignore_index
    truth, predicted = labels[counted], predictions[counted]
    for name, ids in (("label", truth), ("prediction", predicted)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < num_labels:
            raise ValueError(
                f"A {name} is {int(ids.min() if ids.min() < 0 else ids.max())}; expected ids in [0, {num_labels})"
                + (f" or {ignore_index}, which is ignored." if name == "label" else ".")
            )
    return torch.bincount(truth * num_labels + predicted, minlength=num_labels**2).view(num_labels, num_labels)


def scores_of(confusion: np.ndarray) -> dict[str, Any]:
    """Measures of a confusion matrix `(C, C)`, rows true classes.

    Returns:
        `mean_iou`, `pixel_accuracy` and `mean_accuracy` in [0, 1], `measured_classes`, the number of classes that the mean IoU is the
        mean of, and lists of C values `class_iou` and `class_accuracy`. The
        intersection over union of a class is `hits / (true + predicted - hits)`; a class that is neither true nor predicted
        anywhere has `nan` and does not enter the mean, and so has the accuracy of one that is nowhere true.

    Example: 3 pixels of class 0, of which 1 is taken for class 1, and 1 of class 1: IoU 2/3 and 1/2, mean 7/12, pixel accuracy 3/4.
    """
    confusion = np.asarray(confusion, dtype=np.int64)
    hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = hits / (true + predicted - hits)
        accuracy = hits / true
        pixel_accuracy = hits.sum() / confusion.sum()
    return {
        "mean_iou": _mean(iou),
        "pixel_accuracy": float(pixel_accuracy),
        "mean_accuracy": _mean(accuracy),
        "measured_classes": int((~np.isnan(iou)).sum()),
        "class_iou": iou.tolist(),
        "class_accuracy": accuracy.tolist(),
    }


def _mean(values: np.ndarray) -> float:
    measured = values[~np.isnan(values)]
    return float(measured.mean()) if len(measured) else float("nan")


class SegmentationScores(AccumulatingMetric):
    """Mean IoU, pixel accuracy and values of each class; pixels with the label `ignore_index` do not count."""

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs: Any):
        if 0 <= ignore_index < num_labels:
            raise ValueError(f"`ignore_index` ({ignore_index}) is the id of one of the {num_labels} classes.")
        super().__init__((num_labels, num_labels), **kwargs)
        self.num_labels, self.ignore_index = num_labels, ignore_index

    def describe(self) -> tuple[str, str]:
        """What is measured, and what predictions and references are."""
        return (
            "Intersection over union of predicted and true regions, and shares of pixels that are right.",
            "predictions and references: maps of class ids of the same shape.",
        )

    def measures(self, counts: np.ndarray) -> dict[str, Any]:
        """See `scores_of`."""
        return scores_of(counts)

    def add_batch(self, *, predictions: Any, references: Any, **kwargs: Any) -> None:
        """Counts maps of class ids: arrays or tensors of one shape, or lists of such of any sizes."""
        for maps in zip(predictions, references, strict=True):
            matrix = confusion_matrix(*map(torch.as_tensor, maps), self.num_labels, self.ignore_index)
            self.counts += matrix.cpu()
