"""Evaluating semantic segmentation: inference in windows and at several scales, and its measures."""

from .inference import multi_scale_probabilities, sliding_window_logits
from .metrics import SegmentationScores, confusion_matrix, scores_of


__all__ = [
    "SegmentationScores",
    "confusion_matrix",
    "multi_scale_probabilities",
    "scores_of",
    "sliding_window_logits",
]
