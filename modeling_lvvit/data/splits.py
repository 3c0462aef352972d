"""Which split trains, which one evaluates, and rows held out where there is none."""

import math

import datasets
import numpy as np
from transformers.utils import logging


logger = logging.get_logger(__name__)
EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "test")


def find_eval_split(
    splits: datasets.DatasetDict | datasets.IterableDatasetDict, name: str, train_split: str, eval_split: str | None
) -> str | None:
    """Name of the split to evaluate on, `None` if there is none and training rows must be held out.

    Args:
        name: What messages call the dataset.
        eval_split: The split that was asked for; default: the first of `EVALUATION_SPLITS` that is there.

    Raises:
        ValueError: If a split that was asked for is not there, or both are the same.
    """
    for split in (train_split, eval_split or train_split):
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {list(splits)}.")
    if eval_split == train_split:
        raise ValueError(f"Split {train_split!r} cannot serve both training and evaluation.")
    others = [split for split in EVALUATION_SPLITS if split in splits and split != train_split]
    return eval_split or next(iter(others), None)


def split_to_evaluate(splits: datasets.DatasetDict, wanted: str | None) -> str | None:
    """Name of the split that a trained model is evaluated on: the wanted one, else one that is called so, else the only one; `None` if
    there is none of these."""
    only = list(splits) if len(splits) == 1 else []
    candidates = [*EVALUATION_SPLITS, *only] if wanted is None else [wanted]
    return next((name for name in candidates if name in splits), None)


def hold_out(num_rows: int, fraction: float, seed: int, name: str, split: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Training rows that stay, those that are held out for evaluation, and what the latter are called.

    Args:
        fraction: Share of the training rows to evaluate on, in (0, 1).
        name, split: What messages call the dataset, and its training split.

    Raises:
        ValueError: If there are too few.
    """
    logger.warning("No evaluation split: %.0f %% of the training rows are held out for it.", 100 * fraction)
    if num_rows < 2:
        raise ValueError(f"{name} has {num_rows} rows, too few for training and evaluation.")
    order = np.random.default_rng(seed).permutation(num_rows)
    count = math.ceil(fraction * num_rows)
    return order[count:], order[:count], f"{100 * fraction:.0f} % of {split}, held out"
