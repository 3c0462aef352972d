"""Means of a few seeds with their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval (of Student's t), `nan` for a single value."""

    mean: float
    half_width: float


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values with its interval.

    Example: 1, 2, 3: 2 ± 4.303 * 1 / sqrt(3) = 2 ± 2.484.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan)
    return Estimate(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * stats.sem(values)))


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of `values - others`, pairs of the same seeds, with its interval."""
    return estimate([value - other for value, other in zip(values, others, strict=True)])
