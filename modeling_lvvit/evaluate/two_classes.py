"""Two classes: the ROC of a classifier, and the thresholds that follow from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..data.files.atomic_files import write_atomically, write_json


@dataclass(frozen=True)
class Wish:
    """What the threshold of the positive class shall reach, in [0, 1]; without a wish it is the best by Youden's J.

    Args:
        min_recall: The highest threshold with at least this recall.
        min_precision: The lowest threshold with at least this precision.
    """

    min_recall: float | None = None
    min_precision: float | None = None

    def __post_init__(self):
        for name in ("min_recall", "min_precision"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must lie in (0, 1], got {value}.")
        if self.min_recall is not None and self.min_precision is not None:
            raise ValueError("Give `min_recall` or `min_precision`, not both: one threshold follows from each.")

    @property
    def words(self) -> str:
        """What it is, for people."""
        if self.min_recall is not None:
            return f"the highest with a recall of at least {self.min_recall:g}"
        if self.min_precision is not None:
            return f"the lowest with a precision of at least {self.min_precision:g}"
        return "best by Youden's J, recall minus false-positive rate"


@dataclass
class RocCurve:
    """The receiver operating characteristic of the probabilities of a positive class.

    Args:
        scores: Probability of the positive class, `(n,)`.
        is_positive: Bool `(n,)`; both classes are there.

    Attributes:
        thresholds: From high to low, at each of which recall or false-positive rate changes; the first is infinite.
        recall, false_positive_rate, precision: In [0, 1], of the same shape, for images with a probability of at least the threshold;
            precision is 1 where there are none.
    """

    scores: np.ndarray
    is_positive: np.ndarray

    def __post_init__(self):
        from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve  # a second, for this alone

        values = roc_curve(self.is_positive, self.scores, drop_intermediate=False)
        self.false_positive_rate, self.recall, self.thresholds = values
        hits, mistakes = self.recall * self.is_positive.sum(), self.false_positive_rate * (~self.is_positive).sum()
        self.precision = np.where(hits + mistakes > 0, hits / np.maximum(hits + mistakes, 1), 1.0)
        self.area = float(roc_auc_score(self.is_positive, self.scores))
        self.average_precision = float(average_precision_score(self.is_positive, self.scores))

    def best(self, wish: Wish) -> int | None:
        """Place of the threshold of a wish; `None` if no threshold has such a precision."""
        if wish.min_recall is not None:
            return int(np.argmax(self.recall >= wish.min_recall - 1e-12))
        if wish.min_precision is not None:
            places = np.flatnonzero(self.precision[1:] >= wish.min_precision - 1e-12) + 1
            return int(places[-1]) if len(places) else None
        return int(np.argmax((self.recall - self.false_positive_rate)[1:])) + 1

    def at(self, place: int) -> dict[str, float]:
        """Threshold, recall, precision, false-positive rate and accuracy at a place."""
        positives, share = int(self.is_positive.sum()), float(self.is_positive.mean())
        accuracy = share * self.recall[place] + (1 - share) * (1 - self.false_positive_rate[place])
        names = ("recall", "precision", "false_positive_rate")
        values = {name: float(getattr(self, name)[place]) for name in names}
        return {
            "threshold": float(self.thresholds[place]),
            **values,
            "accuracy": float(accuracy),
            "positives": positives,
        }

    def record(self, positive_class: str, wish: Wish, about: str) -> dict[str, Any]:
        """What the JSON file says: `threshold` is the one of the wish, `null` if none reaches it; `curve` has the corners of the curve,
        whose first threshold, `null`, is above every probability."""
        place = self.best(wish)
        chosen = None if place is None else self.at(place)
        corners = _corners(self.false_positive_rate, self.recall)
        thresholds = [None if np.isinf(value) else float(value) for value in self.thresholds[corners]]
        rates = {
            name: getattr(self, name)[corners].tolist() for name in ("false_positive_rate", "recall", "precision")
        }
        return {
            "evaluated": about,
            "positive_class": positive_class,
            "threshold": None if chosen is None else chosen["threshold"],
            "chosen": wish.words,
            "at_threshold": chosen,
            "youden": self.at(self.best(Wish())),
            "roc_auc": self.area,
            "average_precision": self.average_precision,
            "images": len(self.scores),
            "curve": {"threshold": thresholds, **rates},
        }


def _corners(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Places of points that do not lie on the line between their neighbors."""
    turns = np.diff(x, 2).round(12).astype(bool) | np.diff(y, 2).round(12).astype(bool)
    return np.flatnonzero(np.concatenate([[True], turns, [True]]))


def describe_curve(record: dict[str, Any], is_chosen_by_user: bool) -> str:
    """What the terminal says of `RocCurve.record`; `is_chosen_by_user` whether the user named the positive class."""
    default = "" if is_chosen_by_user else " (the second one; `positive_class` names another)"
    text = (
        f"positive class {record['positive_class']}{default}: ROC AUC {100 * record['roc_auc']:.2f} %, average precision "
        f"{100 * record['average_precision']:.2f} %"
    )
    chosen = record["at_threshold"]
    if chosen is None:
        return f"{text}\nno threshold is {record['chosen']}; Youden's J is best at {record['youden']['threshold']:.4g}"
    return (
        f"{text}\nthreshold {chosen['threshold']:.4g} ({record['chosen']}): recall {100 * chosen['recall']:.2f} %, precision "
        f"{100 * chosen['precision']:.2f} %, false-positive rate {100 * chosen['false_positive_rate']:.2f} %, accuracy {100 * chosen['accuracy']:.2f} %"
    )


def save_roc_figure(path: Path, record: dict[str, Any]) -> None:
    """Draws the curve with the chosen threshold, and the line of chance."""
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    curve = record["curve"]
    axes.plot(curve["false_positive_rate"], curve["recall"], label=f"ROC, area {record['roc_auc']:.3f}")
    axes.plot([0, 1], [0, 1], color="gray", linestyle=":", label="chance")
    if (chosen := record["at_threshold"]) is not None:
        label = f"threshold {chosen['threshold']:.3g}"
        axes.plot(chosen["false_positive_rate"], chosen["recall"], "o", color="tab:red", label=label)
    axes.set(xlabel="false-positive rate", ylabel="recall (true-positive rate)", aspect="equal")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(f"{record['positive_class']}: {record['evaluated']}", fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))


def save_curve(stem: Path, record: dict[str, Any]) -> tuple[Path, Path]:
    """Writes `STEM_roc.json` and `STEM_roc.png`, and returns their paths."""
    table, figure = (stem.with_name(f"{stem.name}_roc{ending}") for ending in (".json", ".png"))
    write_json(table, record)
    save_roc_figure(figure, record)
    return table, figure
