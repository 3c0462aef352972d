"""Evaluating image classifiers, ours and others, on the test sets of ImageNet and on any other data."""

from .scores import ClassificationScores, mean_corruption_error, read_real_labels


__all__ = ["ClassificationScores", "mean_corruption_error", "read_real_labels"]
