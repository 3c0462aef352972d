"""Semantic segmentation: training, inference in windows and at several scales, and its measures."""

from .inference import InferenceSettings, multi_scale_probabilities, predict_classes, sliding_window_logits
from .metrics import SegmentationScores, confusion_matrix, scores_of


__all__ = [
    "InferenceSettings",
    "SegmentationScores",
    "confusion_matrix",
    "multi_scale_probabilities",
    "predict_classes",
    "scores_of",
    "sliding_window_logits",
]
