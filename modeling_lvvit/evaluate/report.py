"""Results of an evaluation as a Markdown table and as JSON."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from ..cli.model_card import library_versions
from ..data.classes.multi_label import label_counts
from ..data.files.atomic_files import write_json
from ..data.sources import short_name
from ..token_labeling.multi_label import METRICS
from ..training.checkpoints.record import data_record, read_data_record
from .scores import ALEXNET_ERRORS, missing_corruptions
from .test_sets import TestSet


MEASURES = {"accuracy": "top-1", "top5_accuracy": "top-5", "real_accuracy": "ReaL"}
TEXTS = ("model", "input", "test set")  # headings of columns to the left


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each model and test set, accuracies in per cent; a row for the corruptions with their mean error (AlexNet 100). Test sets
    whose images have several classes have a table of their own."""
    head = ("model", "parameters", "input", "test set", "images")
    single = [(*head, *MEASURES.values(), "mCE")]
    several = [(*head, "mAP", "micro F1", "macro F1", "all classes right")]
    for record in results:
        shape = " x ".join(map(str, record["input_size"]))
        model = (short_name(record["model"]), f"{record['parameters'] / 1e6:.1f}M", shape)
        for name, scores in record["results"].items():
            row = (*model, f"{short_name(name)} ({scores['split']})", f"{scores['images']:,}")
            if "accuracy" not in scores:
                several.append((*row, *(_percent(scores[measure]) for measure in METRICS)))
            else:
                single.append((*row, *(_percent(scores.get(measure)) for measure in MEASURES), ""))
        if "corruptions" in record:
            number, error = len(record["corruptions"]["errors"]), _percent(record["corruptions"].get("mce"))
            single.append((*model, f"{number} corruptions", "", *("" for _ in MEASURES), error))
    tables = [table for table in (single, several) if len(table) > 1] or [single]
    return "\n".join(["\n\n".join(map(_as_markdown, tables)), *notes_below(results)])


def _as_markdown(table: Sequence[Sequence[str]]) -> str:
    """A table with its heading, without the columns that have no value in any row."""
    columns = [column for column in zip(*table) if any(column[1:])] or list(zip(*table))
    marks = ["---" if column[0] in TEXTS else "---:" for column in columns]
    heading, *rows = zip(*columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, marks, *rows))


def notes_below(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the table does not say, a line each: see `notes_on`, and why there is no mean corruption error."""
    notes = {  # each once for all models
        f"- {short_name(name)}: {note}": None
        for record in results
        for name, scores in [*record["results"].items(), ("corruptions", record.get("corruptions", {}))]
        for note in scores.get("notes", ())
    }
    return ["", *notes] if notes else []


def notes_on(
    scores: dict[str, Any], test_set: TestSet, label_column: str, num_model_classes: int, has_real: bool
) -> list[str]:
    """What a reader of some scores must know: measures that are missing and why, and of which images and classes they are.

    Args:
        label_column: Column of class ids.
        num_model_classes: Number of classes of the model.
        has_real: Whether there were re-assessed labels.
    """
    images, classes = scores["images"], len(test_set.class_names)
    shown = np.count_nonzero(label_counts(test_set.rows, label_column))
    notes = []
    if images < test_set.num_rows:
        notes.append(f"{images:,} of its {test_set.num_rows:,} images")
    if shown < classes:
        notes.append(f"images of {shown:,} of its {classes:,} classes")
    if classes < num_model_classes:
        best = "for" if test_set.is_multi_label else "the best of"
        notes.append(f"predictions are {best} its {classes:,} classes, of {num_model_classes:,} of the model")
    if "top5_accuracy" not in scores and not test_set.is_multi_label:
        notes.append(f"no top-5 accuracy, which says little of {classes} classes")
    if has_real and scores.get("real_images", 0) < images:
        about = "accuracy is" if "real_accuracy" in scores else "accuracy would be"
        notes.append(
            f"ReaL {about} of {scores.get('real_images', 0):,} of {images:,} images: the others have no such label"
        )
    return notes


def note_on_training(model: str, test_set: TestSet) -> str | None:
    """A note if a model in a folder was trained on the split that it is evaluated on, as far as its record says."""
    if read_data_record(model) != data_record(test_set.name, test_set.split):
        return None
    return (
        f"{short_name(model)} was trained on {test_set.split} of {short_name(test_set.name)}, by its record: it has seen all or most of these "
        "images, and does worse on new ones"
    )


def notes_on_corruptions(errors: dict[str, Any], images: dict[str, int]) -> list[str]:
    """Why there is no mean corruption error, and whether it is one of equal sets.

    Args:
        errors: By corruption.
        images: Number of images of each corruption and severity.
    """
    notes = []
    if missing := missing_corruptions(errors):
        absent = f"{len(missing)} of {len(ALEXNET_ERRORS)} are missing, {', '.join(missing)}"
        notes.append(f"no mean corruption error (mCE): {absent}")
    usual = mode(images.values()) if images else 0
    if others := [f"{name} {count:,}" for name, count in images.items() if count != usual]:
        notes.append(
            f"{len(others)} of {len(images)} sets have not {usual:,} images as the others: {', '.join(others[:5])}"
        )
    return notes


def save_results(path: Path, results: Sequence[dict[str, Any]], args: Any) -> None:
    """Writes results, options and versions as JSON; an older file is replaced when the new one is complete."""
    record = {"results": list(results), "options": dataclasses.asdict(args), "versions": library_versions()}
    write_json(path, record)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
