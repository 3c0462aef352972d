"""Probabilities of images as a CSV file, and which classes follow from them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.files.atomic_files import write_text


COLUMNS = ("path", "predicted_class", "probability")
ERROR = "error"
SEPARATORS = (";", "|", "/", " ")  # between several classes of an image: the first that is in no name
MAX_NAMED = 10


@dataclass(frozen=True)
class Decision:
    """How probabilities become classes.

    Args:
        class_names: By id.
        is_multi_label: Whether an image may have several classes, or none: those with at least `threshold`.
        threshold: Probability in [0, 1]; `None` for the best class, whatever it has. Of two classes the positive one is predicted from it
            on, else the other one. Of more than two the best class is predicted from it on, else none.
        positive: Id of the positive one of two classes.
    """

    class_names: Sequence[str]
    is_multi_label: bool = False
    threshold: float | None = None
    positive: int | None = None

    def classes(self, probabilities: torch.Tensor) -> list[list[int]]:
        """Ids of the classes of each image, the most probable first; `probabilities` `(B, C)`."""
        order = probabilities.argsort(dim=-1, descending=True, stable=True)
        if self.positive is not None and self.threshold is not None:
            is_positive = (probabilities[:, self.positive] >= self.threshold).tolist()
            return [[self.positive if one else 1 - self.positive] for one in is_positive]
        if not self.is_multi_label:
            order = order[:, :1]
        reached = probabilities.gather(1, order) >= (0.0 if self.threshold is None else self.threshold)
        return [
            [index for index, is_reached in zip(*row) if is_reached] for row in zip(order.tolist(), reached.tolist())
        ]


@dataclass(frozen=True)
class Prediction:
    """What is known of an image.

    Args:
        row: Number of the image.
        classes: Predicted class ids, the most probable first.
        probabilities: Of those.
        listed: Probabilities of all classes, by id; or, of the best ones, ids and probabilities.
        error: Why it cannot be read; then it has nothing else.
    """

    row: int
    classes: Sequence[int] = ()
    probabilities: Sequence[float] = ()
    listed: Sequence[float] | Sequence[tuple[int, float]] = ()
    error: str = ""


def read_threshold(word: str | None) -> tuple[float | None, str | None]:
    """A threshold in [0, 1] and, from a file, the positive class that it is for.

    Args:
        word: A number, or a JSON file with `threshold` and `positive_class`, as `lvvit evaluate` writes for two classes.

    Raises:
        FileNotFoundError: If it is no number, and there is no such file.
        ValueError: If it is no probability, or the file holds something else.
    """
    if word is None:
        return None, None
    try:
        threshold, positive = float(word), None
    except ValueError:
        path = Path(word).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"`threshold` is a number in [0, 1] or a JSON file of an evaluation; there is no file {word}."
            ) from None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            threshold, positive = float(record["threshold"]), str(record["positive_class"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} has no `threshold` and `positive_class`: expected the file that an evaluation of two classes writes "
                f"(..._roc.json), got an error at {error}."
            ) from error
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must lie in [0, 1], got {threshold}.")
    return threshold, positive


def find_positive(class_names: Sequence[str], wanted: str | None) -> int:
    """Id of the positive one of two classes, by default the second; a `ValueError` if there is no such class, or there are not two."""
    if len(class_names) != 2:
        raise ValueError(f"`positive_class` is one of two classes, and there are {len(class_names)}. Leave it out.")
    if wanted is None:
        return 1
    if wanted not in class_names:
        raise ValueError(f"`positive_class` must be {' or '.join(class_names)}, got {wanted}.")
    return list(class_names).index(wanted)


def write_table(
    path: Path,
    paths: Sequence[str],
    predictions: Sequence[Prediction],
    decision: Decision,
    top_k: int | None,
    has_errors: bool,
) -> None:
    """Writes a row for each image: path, predicted class and its probability (several classes with a separator), then the probability
    of every class, or name and probability of the best `top_k`; and why an image has none of them, where that may be.

    An older file is replaced when the new one is complete.
    """
    names = list(decision.class_names)
    separator = next((text for text in SEPARATORS if not any(text in name for name in names)), "\t")
    if top_k is None:
        taken = Counter([*COLUMNS, ERROR, *names])
        listed = [name if taken[name] == 1 else f"{name} (class {index})" for index, name in enumerate(names)]
    else:
        listed = [f"{title}_{rank}" for rank in range(1, top_k + 1) for title in ("class", "probability")]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([*COLUMNS, *listed, *([ERROR] if has_errors else [])])
    for prediction in predictions:
        classes = separator.join(names[index] for index in prediction.classes)
        cells = [paths[prediction.row], classes, separator.join(map(_number, prediction.probabilities))]
        if prediction.error:
            cells += [""] * len(listed)
        elif top_k is None:
            cells += map(_number, prediction.listed)
        else:
            cells += [cell for index, value in prediction.listed for cell in (names[index], _number(value))]
        table.writerow([*cells, *([prediction.error] if has_errors else [])])
    write_text(path, file.getvalue())


def _number(value: float) -> str:
    return f"{value:.6g}"


def describe_predictions(predictions: Sequence[Prediction], decision: Decision) -> list[str]:
    """Sentences about what was predicted: how often which class, images without any, and classes that no image has."""
    names = decision.class_names
    counts = Counter(index for prediction in predictions for index in prediction.classes)
    lines = [
        "predicted: " + (_listed([f"{names[index]} {count:,}" for index, count in counts.most_common()]) or "no class")
    ]
    without = sum(not prediction.classes and not prediction.error for prediction in predictions)
    if without:
        lines.append(
            f"{without:,} of {len(predictions):,} images have no class with a probability of {decision.threshold:g} or more"
        )
    if decision.threshold is not None and (never := [name for index, name in enumerate(names) if not counts[index]]):
        lines.append(f"of no image, at the threshold {decision.threshold:g}: {_listed(never)}")
    if damaged := sum(bool(prediction.error) for prediction in predictions):
        lines.append(f"{damaged:,} of {len(predictions):,} images cannot be read, their rows say why (column {ERROR})")
    return lines


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - MAX_NAMED:,} more" if len(words) > MAX_NAMED else ""
    return ", ".join(words[:MAX_NAMED]) + more
