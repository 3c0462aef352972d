"""Weights of classes in the loss (`--class_weights`), for data that has many more images, or pixels, of some classes than of others."""

import csv
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.classes.class_matching import listed, normalized


BALANCED, MEDIAN_FREQUENCY = "balanced", "median_frequency"  # words for weights that are counted
UNEVEN = 5  # times as many images in the largest class as in the smallest are worth a word
HELP = (
    "Weight of each class in the loss: balanced (inverse to its frequency in the training data), a JSON or CSV file with a weight for "
    "each class name, or a number for each class in their order; {}default: all alike."
)


def check_class_weights(words: Sequence[str] | None) -> None:
    """Raises a `ValueError` if `class_weights` is no word that it may be, no file, and not numbers of at least 0."""
    if words is None or list(words) in ([BALANCED], [MEDIAN_FREQUENCY]) or _file(words) is not None:
        return
    try:
        weights = [float(word) for word in words]
    except ValueError:
        weights = []
    if not weights or not _are_weights(weights):
        raise ValueError(
            f"`class_weights` must be {BALANCED}, {MEDIAN_FREQUENCY}, a JSON or CSV file, or a number for each class, at least 0, got "
            f"{' '.join(map(str, words))!r}" + (" (there is no such file)." if len(words) == 1 else ".")
        )


def given_class_weights(words: Sequence[str] | None, class_names: Sequence[str]) -> list[float] | None:
    """The weights that were given as numbers or in a file, by class id; `None` where there are none, or they are to be counted.

    Raises:
        ValueError: If they are not those of the classes; of a file the message names the class.
    """
    check_class_weights(words)
    if words is None or list(words) in ([BALANCED], [MEDIAN_FREQUENCY]):
        return None
    if (path := _file(words)) is not None:
        return read_class_weights(path, class_names)
    if len(words) != len(class_names):
        raise ValueError(f"`class_weights` has {len(words)} numbers; the data has {len(class_names)} classes.")
    return [float(word) for word in words]


def read_class_weights(path: Path, class_names: Sequence[str]) -> list[float]:
    """Weights by class id from a file.

    Args:
        path: JSON object, class name to weight; or CSV rows `class name, weight`, of which the first may be a heading. Names are
            compared without case, hyphens and underscores. Every class needs a weight.

    Raises:
        ValueError: If it cannot be read, a weight is no finite number of at least 0, a name is unknown (the nearest ones are named)
            or comes twice, or a class is missing.
    """
    ids = {normalized(name): index for index, name in enumerate(class_names)}
    weights: dict[int, float] = {}
    for name, value in _pairs(path, ids):
        if (index := ids.get(normalized(name))) is None:
            nearest = [class_names[ids[key]] for key in difflib.get_close_matches(normalized(name), ids)]
            advice = listed("the nearest are", nearest) or listed("there are", class_names)
            raise ValueError(f"`class_weights` {path}: {name!r} is none of the {len(class_names)} classes; {advice}.")
        if index in weights:
            raise ValueError(f"`class_weights` {path} has {class_names[index]!r} twice.")
        weights[index] = _number(value)
        if not 0 <= weights[index] < math.inf:
            raise ValueError(
                f"`class_weights` {path}: the weight of {name!r} must be a number of at least 0, got {value!r}."
            )
    if missing := [name for index, name in enumerate(class_names) if index not in weights]:
        raise ValueError(
            f"`class_weights` {path} has weights of {len(weights)} of {len(class_names)} classes; {listed('it lacks', missing)}."
        )
    if not any(weights.values()):
        raise ValueError(f"`class_weights` {path}: all weights are 0.")
    return [weights[index] for index in range(len(class_names))]


def _file(words: Sequence[str]) -> Path | None:
    path = Path(words[0]).expanduser() if len(words) == 1 else None
    return path if path is not None and path.is_file() else None


def _are_weights(weights: Sequence[float]) -> bool:
    return all(0 <= weight < math.inf for weight in weights) and any(weights)


def _pairs(path: Path, ids: dict[str, int]) -> list[tuple[str, object]]:
    """Names and weights as a file has them."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        if path.suffix == ".json":
            pairs = json.loads(text, object_pairs_hook=tuple)  # a dict would hide a name that comes twice
            if not isinstance(pairs, tuple):
                raise ValueError("it is no object")
            return list(pairs)
        rows = [(row[0].strip(), row[1].strip()) for row in csv.reader(text.splitlines()) if row]
    except (ValueError, IndexError, csv.Error) as error:
        raise ValueError(
            f"`class_weights` {path} must be a JSON object, class name to weight, or CSV rows of two columns: {error}"
        ) from error
    is_heading = bool(rows) and normalized(rows[0][0]) not in ids and math.isnan(_number(rows[0][1]))
    return rows[is_heading:]


def _number(value: object) -> float:
    """A value as a number, `nan` for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def balanced_weights(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Weights inverse to the numbers of images, or pixels, of the classes, `n / (C * n_c)` over the C classes that there are, as in
    scikit-learn's `class_weight="balanced"`: their mean over all images is 1. A class that is nowhere has weight 1.

    Example: 900 images of class 0 and 100 of class 1 give 1000 / (2 * 900) = 0.556 and 1000 / (2 * 100) = 5.
    """
    counts = np.asarray(counts, dtype=np.float64)
    is_present = counts > 0
    weights = np.ones(len(counts))
    weights[is_present] = counts.sum() / (is_present.sum() * counts[is_present])
    return weights


def training_weights(
    words: Sequence[str] | None, class_names: Sequence[str], counts: np.ndarray | None
) -> np.ndarray | None:
    """Weights of classes of images in the loss, scaled so that their mean over the training images is 1: then neither the scale of the
    loss nor the best learning rate depends on them.

    Args:
        words: As `class_weights` takes them; `median_frequency` divided by its mean is `balanced`, where each image has one class.
        counts: Training images of each class; `None` for a stream, whose images are not counted: weights are taken as they are given.

    Returns:
        `(C,)` float64, or `None` without weights.

    Raises:
        ValueError: See `given_class_weights`; or if weights are to be counted in a stream, or are 0 for all training images.
    """
    if words is None:
        return None
    given = given_class_weights(words, class_names)
    if counts is None:
        if given is None:
            raise ValueError(
                f"`class_weights` {words[0]} counts the training images, which a stream does not: give a file or numbers."
            )
        return np.asarray(given)
    weights = balanced_weights(counts) if given is None else np.asarray(given)
    mean = float((weights * counts).sum() / counts.sum())
    if not mean:
        raise ValueError("`class_weights` are 0 for all classes that have training images.")
    return weights / mean


def describe_weights(weights: np.ndarray, class_names: Sequence[str], counts: np.ndarray | None) -> str:
    """Smallest and largest weight, in a line."""
    least, most = int(weights.argmin()), int(weights.argmax())
    scale = ", scaled to a mean of 1 over the training images" if counts is not None else ", as given"
    return f"class weights from {weights[least]:.3g} ({class_names[least]}) to {weights[most]:.3g} ({class_names[most]}){scale}"


def note_uneven_classes(counts: np.ndarray, class_names: Sequence[str]) -> str | None:
    """A line that says that some classes have many more images than others and what helps; `None` where they have not."""
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return None
    least, most = present[counts[present].argmin()], present[counts[present].argmax()]
    if counts[most] < UNEVEN * counts[least]:
        return None
    return (
        f"imbalanced: {class_names[most]} has {counts[most] / counts[least]:.3g} times the training images of {class_names[least]}; "
        "--class_weights balanced or --train_sampling_strategy balanced make up for it, --metric_for_best_model balanced_accuracy "
        "judges by all classes alike"
    )
