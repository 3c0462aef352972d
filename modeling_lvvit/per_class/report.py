"""Scores of each class for people: a table, a JSON file, and a figure of the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..data.classes.class_matching import shown_names
from ..data.files.atomic_files import write_atomically, write_json
from .scores import Confusions


FIGURE, SCORES = "confusion_matrix.png", "class_scores.json"
MAX_IN_TABLE, NUM_WORST = 20, 5  # classes of a table; of more, the worst
MAX_IN_FIGURE = 25  # classes of a figure; of more, those that are confused most
COLUMNS = ("precision", "recall", "f1", "support")


def short_names(class_names: Sequence[str], length: int = 24) -> list[str]:
    """`shown_names`, cut to so many characters."""
    return [name if len(name) <= length else f"{name[: length - 1]}…" for name in shown_names(class_names)]


def class_table(class_names: Sequence[str], confusions: Confusions) -> str | None:
    """A Markdown table of precision, recall and F1 in per cent and images of every class; `None` for more than `MAX_IN_TABLE`."""
    if len(class_names) > MAX_IN_TABLE:
        return None
    return _table(short_names(class_names), confusions, range(len(class_names)))


def worst_table(class_names: Sequence[str], confusions: Confusions) -> str:
    """The same table of the classes of the lowest F1, the worst first."""
    f1 = confusions.scores()["f1"]
    return _table(short_names(class_names), confusions, np.argsort(f1, kind="stable")[:NUM_WORST].tolist())


def _table(names: Sequence[str], confusions: Confusions, classes: Sequence[int]) -> str:
    scores = confusions.scores()
    lines = ["| class | precision | recall | F1 | images |", "| --- | ---: | ---: | ---: | ---: |"]
    for index in classes:
        values = [_percent(scores[name][index]) for name in COLUMNS[:3]]
        lines.append(f"| {' | '.join([names[index], *values, format(scores['support'][index], ',')])} |")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"


def describe_classes(class_names: Sequence[str], confusions: Confusions) -> str:
    """What the terminal says: averages, the table of all classes or of the worst, and the most frequent mistake."""
    averages = confusions.averages()
    text = (
        f"balanced accuracy {_percent(averages['balanced_accuracy'])} %, macro precision {_percent(averages['macro_precision'])} %, "
        f"macro F1 {_percent(averages['macro_f1'])} %"
    )
    table = class_table(class_names, confusions)
    if table is None:
        text += f"; of {len(class_names):,} classes those of the lowest F1:"
        table = worst_table(class_names, confusions)
    if mistakes := confusions.mistakes():
        names = short_names(class_names)
        true, predicted, count = mistakes[0]
        table += f"\nmost frequent mistake: {names[true]} taken for {names[predicted]}, {count:,} times"
    return f"{text}\n{table}"


def save_class_scores(path: Path, class_names: Sequence[str], confusions: Confusions, about: str) -> None:
    """Writes JSON: averages and, of every class, its scores in [0, 1] (null where there are none), its images (`support`), and for how
    many of them each class was predicted (`predicted_as`), where for any. `about` says what was evaluated."""
    scores = confusions.scores()
    predicted_as: list[dict[str, int]] = [{} for _ in class_names]
    for true, predicted, count in zip(confusions.true, confusions.predicted, confusions.counts):
        predicted_as[true][class_names[predicted]] = int(count)
    classes = {}
    for index, name in enumerate(class_names):
        values = {key: None if np.isnan(scores[key][index]) else scores[key][index].item() for key in COLUMNS}
        classes[name] = values | {"predicted_as": predicted_as[index]}
    averages = {name: None if np.isnan(value) else value for name, value in confusions.averages().items()}
    write_json(path, {"evaluated": about, **averages, "classes": classes})


def write_class_report(
    folder: Path, class_names: Sequence[str], confusions: Confusions, about: str, stem: str = ""
) -> str:
    """Writes figure and JSON file into a folder, and returns what the terminal says, with their paths; `stem` starts their names."""
    figure, scores = folder / f"{stem}{FIGURE}", folder / f"{stem}{SCORES}"
    save_confusion_figure(figure, class_names, confusions, about)
    save_class_scores(scores, class_names, confusions, about)
    return f"{describe_classes(class_names, confusions)}\nconfusion matrix: {figure}\nscores of each class: {scores}"


def figure_classes(confusions: Confusions) -> list[int]:
    """Ids of the classes that a figure shows: all, or of many those of the most frequent mistakes, then the first ones."""
    if confusions.num_classes <= MAX_IN_FIGURE:
        return list(range(confusions.num_classes))
    frequent = dict.fromkeys(index for pair in confusions.mistakes() for index in pair[:2])
    shown = list(dict.fromkeys([*frequent, *confusions.true.tolist(), *range(MAX_IN_FIGURE)]))[:MAX_IN_FIGURE]
    return sorted(shown)


def save_confusion_figure(path: Path, class_names: Sequence[str], confusions: Confusions, about: str) -> None:
    """Draws the confusion matrix: numbers of images, colored by their share of the true class; of many classes the most confused,
    with all others in a last column."""
    classes = figure_classes(confusions)
    matrix, names = confusions.matrix(classes), short_names(class_names)
    images = np.bincount(confusions.true, confusions.counts, confusions.num_classes)[classes].astype(np.int64)
    columns, title = [names[index] for index in classes], f"Confusion matrix: {about}"
    rows = list(columns)
    if len(classes) < confusions.num_classes:
        matrix = np.concatenate([matrix, (images - matrix.sum(axis=1))[:, None]], axis=1)
        columns.append("all others")
        title += f"\nthe {len(classes)} most confused of {confusions.num_classes:,} classes"
    side = max(3.2, 0.42 * len(columns))
    figure = Figure(figsize=(side + 2.6, side + 1.8), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(images, 1)[:, None]
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for row, column in zip(*np.nonzero(matrix)):
        color = "white" if shares[row, column] > 0.55 else "black"
        size = 10 if len(columns) <= 10 else 7
        axes.text(column, row, f"{matrix[row, column]:,}", ha="center", va="center", color=color, fontsize=size)
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=45 if len(columns) <= 10 else 90,
        ha="right" if len(columns) <= 10 else "center",
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize=11, wrap=True)
    figure.colorbar(shown, ax=axes, label="share of the true class", shrink=0.7)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
