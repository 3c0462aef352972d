"""Results of an evaluation as a Markdown table and as JSON."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli.model_card import library_versions
from ..data.atomic_files import write_json
from ..data.sources import short_name


MEASURES = {"accuracy": "top-1", "top5_accuracy": "top-5", "real_accuracy": "ReaL"}


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each model and test set, accuracies in per cent; a row for the corruptions with their mean error (AlexNet 100)."""
    lines = ["| model | parameters | input | test set | images | top-1 | top-5 | ReaL | mCE |"]
    lines.append("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for record in results:
        shape = " x ".join(map(str, record["input_size"]))
        head = f"| {short_name(record['model'])} | {record['parameters'] / 1e6:.1f}M | {shape}"
        for name, scores in record["results"].items():
            values = " | ".join(_percent(scores.get(measure)) for measure in MEASURES)
            lines.append(f"{head} | {short_name(name)} ({scores['split']}) | {scores['images']:,} | {values} | |")
        if "corruptions" in record:
            number = len(record["corruptions"]["errors"])
            lines.append(f"{head} | {number} corruptions | | | | | {_percent(record['corruptions'].get('mce'))} |")
    return "\n".join(lines)


def save_results(path: Path, results: Sequence[dict[str, Any]], args: Any) -> None:
    """Writes results, options and versions as JSON; an older file is replaced when the new one is complete."""
    record = {"results": list(results), "options": dataclasses.asdict(args), "versions": library_versions()}
    write_json(path, record)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
