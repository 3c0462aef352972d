"""Which split trains, which one evaluates, and rows held out where there is none."""

import math
from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .classes.class_labels import read_column
from .classes.multi_label import is_list, rarest_classes


logger = logging.get_logger(__name__)
SUBSET_SEED = 0
EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "test")


def find_eval_split(
    splits: datasets.DatasetDict | datasets.IterableDatasetDict,
    name: str,
    train_split: str,
    eval_split: str | None,
    label_column: str | None = None,
) -> str | None:
    """Name of the split to evaluate on, `None` if there is none and training rows must be held out.

    Args:
        name: What messages call the dataset.
        eval_split: The split that was asked for; default: the first of `EVALUATION_SPLITS` that is there.
        label_column: Column of class labels; splits without labels are passed over with a warning.

    Raises:
        ValueError: If a split that was asked for is not there, or both are the same.
    """
    for split in (train_split, eval_split or train_split):
        if split not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {list(splits)}.")
    if eval_split == train_split:
        raise ValueError(f"Split {train_split!r} cannot serve both training and evaluation.")
    others = [split for split in EVALUATION_SPLITS if split in splits and split != train_split]
    if eval_split is not None:
        return eval_split
    for split in others:
        if label_column is None or _has_labels(splits[split], label_column):
            return split
        logger.warning("Split %s of %s has no labels, so it cannot be evaluated on.", split, name)
    return None


def _has_labels(rows: datasets.Dataset | datasets.IterableDataset, column: str) -> bool:
    """Whether a column is there, and holds any label: hidden labels are null, or class -1."""
    if not isinstance(rows, datasets.Dataset):
        return rows.column_names is None or column in rows.column_names
    if column not in rows.column_names:
        return False
    values = read_column(rows, column).drop_null()
    return len(values) > 0 and not (pa.types.is_integer(values.type) and pc.max(values).as_py() < 0)


def select_subset(num_rows: int, count: int | None, classes: np.ndarray | None = None) -> np.ndarray:
    """Rows of a subset to try things out on, ascending int64. The draw is the same in every program and for every seed, and a smaller
    subset is part of a larger one.

    Args:
        count: Size of the subset; `None` for all rows.
        classes: Class of each row: each class gets its share, and at least one row where there are enough.
    """
    if count is None or count >= num_rows:
        return np.arange(num_rows)
    order = np.random.default_rng(SUBSET_SEED).permutation(num_rows)
    if classes is not None:
        by_class = np.argsort(classes[order], kind="stable")
        _, starts, sizes = np.unique(classes[order][by_class], return_index=True, return_counts=True)
        rank = np.arange(num_rows) - np.repeat(starts, sizes)
        # the first row of each class, then rows by the part of their class that comes before them, else by chance
        order = order[by_class[np.lexsort((by_class, rank / np.repeat(sizes, sizes), rank > 0))]]
    return np.sort(order[: max(count, 0)])


def split_to_evaluate(
    splits: datasets.DatasetDict, wanted: str | None, preferred: Sequence[str] = EVALUATION_SPLITS
) -> str | None:
    """Name of the split that a trained model is evaluated on: the wanted one, else the first of some names, else the only one; `None` if
    there is none of these."""
    only = list(splits) if len(splits) == 1 else []
    candidates = [*preferred, *only] if wanted is None else [wanted]
    return next((name for name in candidates if name in splits), None)


def take_subset(rows: datasets.Dataset | None, count: int | None, label_column: str | None = None) -> datasets.Dataset:
    """The rows of `draw_subset`; all without a `count`."""
    return rows if rows is None or count is None else rows.select(draw_subset(rows, count, label_column))


def draw_subset(rows: datasets.Dataset, count: int | None, label_column: str | None = None) -> np.ndarray:
    """Row numbers of `select_subset`, by the classes in a column (ids or names, or lists of them) if it is there."""
    classes = classes_of_rows(rows, label_column) if label_column in rows.column_names else None
    return select_subset(len(rows), count, classes)


def classes_of_rows(rows: datasets.Dataset, column: str) -> np.ndarray:
    """A number of the class of each row, `(n,)` int64, -1 for none; of several classes the rarest, see `rarest_classes`."""
    labels = read_column(rows, column)
    return rarest_classes(labels) if is_list(labels.type) else pd.factorize(labels.to_pandas(), sort=True)[0]


def hold_out(
    num_rows: int,
    fraction: float,
    seed: int,
    name: str,
    split: str,
    classes: np.ndarray | None = None,
    is_unlabeled: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Training rows that stay, those that are held out for evaluation, and what the latter are called.

    Args:
        fraction: Share of the training rows to evaluate on, in (0, 1).
        name, split: What messages call the dataset, and its training split.
        classes: Class of each row; no class is held out wholly, unless all have a single row.
        is_unlabeled: Bool `(num_rows,)`, rows without a human label, which are not held out unless no row has one.

    Raises:
        ValueError: If there are too few.
    """
    logger.warning("No evaluation split: %.0f %% of the training rows are held out for it.", 100 * fraction)
    if is_unlabeled is not None and 0 < is_unlabeled.sum() < num_rows:
        labeled = np.flatnonzero(~is_unlabeled)
        parts = _hold_out_rows(len(labeled), fraction, seed, name, classes[labeled])
        training, held_out = (labeled[part] for part in parts)
        training = np.concatenate([training, np.flatnonzero(is_unlabeled)])
    else:
        training, held_out = _hold_out_rows(num_rows, fraction, seed, name, classes)
    return training, held_out, f"{100 * fraction:.0f} % of {split}, held out"


def _hold_out_rows(
    num_rows: int, fraction: float, seed: int, name: str, classes: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """`hold_out` where all rows have a label, or none."""
    if num_rows < 2:
        raise ValueError(f"{name} has {num_rows} rows, too few for training and evaluation.")
    order = np.random.default_rng(seed).permutation(num_rows)
    count = math.ceil(fraction * num_rows)
    held_out, training = order[:count], order[count:]
    if classes is not None:
        _keep_all_classes(training, held_out, classes - classes.min())  # hidden labels are -1
    return training, held_out


def _keep_all_classes(training: np.ndarray, held_out: np.ndarray, classes: np.ndarray) -> None:
    """Exchanges held-out rows of classes without a training row for training rows of classes that have several, in place."""
    left = np.bincount(classes[training], minlength=classes.max() + 1)
    places = iter(range(len(training)))  # a class that has a single row gets no second one
    for place, row in enumerate(held_out):
        if left[classes[row]]:
            continue
        other = next((index for index in places if left[classes[training[index]]] > 1), None)
        if other is None:
            return
        held_out[place], training[other] = training[other], row
        left[classes[row]] += 1
        left[classes[held_out[place]]] -= 1
