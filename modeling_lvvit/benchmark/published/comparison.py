"""The published comparison, with what is counted and timed here next to it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from ...data.files.atomic_files import write_json
from ..comparison import count_size, model_entry, relative_speed
from ..interleaved_timing import time_interleaved
from ..measure import device_name
from ..models import BenchmarkModel, Setting
from .results import PublishedRow


REFERENCE = "lvvit_s_224"
MEGABYTES_A_PARAMETER = 4e-6  # float32


def compare_published(
    rows: tuple[PublishedRow, ...], setting: Setting, rounds: int, options: frozenset[str], record: Path | None = None
) -> Iterator[dict[str, object]]:
    """Counts and times the model of each row.

    A model is taken in turn with LV-ViT-S alone, because all of them together do not fit into memory.

    Args:
        rounds: Times that each is taken; 0: nothing is timed.
        options: Of every model, see `OPTIONS`.
        record: JSON file that is written after each row; a row that stands in it already is taken from there.

    Yields:
        One after the other the fields of each `PublishedRow`, with `parameters`, `counted_gmacs` (multiply-adds in 10^9 of convolutions
        and matrix products), `megabytes` of the weights in float32, and where it was timed `images_per_second`, `ratio` to LV-ViT-S in the
        same rounds and `peak_megabytes`; a row whose model cannot be had has only a note next to its fields.
    """
    settings = {name: str(value) for name, value in asdict(setting).items()} | {"rounds": rounds}
    settings |= {"options": sorted(options), "torch": torch.__version__, "timm": version("timm")}
    settings |= {"threads": torch.get_num_threads(), "device_name": device_name(setting.device)}
    results = {_key(row): row for row in _read_rows(record, settings)}
    for row in rows:
        published = asdict(row)
        key = _key(published)
        measured = results.get(key) or _measured(row, setting, rounds, options)
        results[key] = {**measured, **published, "note": measured.get("note", published["note"])}
        if record is not None:
            write_json(record, {"settings": settings, "rows": list(results.values())})
        yield results[key]


def _key(row: dict[str, object]) -> str:
    """What tells rows apart, as JSON, because tuples become lists in the file."""
    return json.dumps([row[name] for name in ("network", "train_size", "test_size", "model", "arguments")])


def _read_rows(record: Path | None, settings: dict[str, object]) -> list[dict[str, object]]:
    """Those of an earlier run with the same settings; a `ValueError` if the file is something else."""
    if record is None or not record.is_file():
        return []
    try:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        rows, before = earlier["rows"], earlier["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`output_file` {record} is no record of such a table. Name another file.") from error
    if before != settings:
        raise ValueError(
            f"`output_file` {record} was measured in another way: {before}, now {settings}. Name another file."
        )
    return rows


def _measured(row: PublishedRow, setting: Setting, rounds: int, options: frozenset[str]) -> dict[str, object]:
    model = find_benchmark_model(row, options)
    if model is None:
        return {"note": row.note or f"timm {version('timm')} has no {row.model}"}
    parameters, flops = count_size(model, setting.num_classes)
    counts = {"parameters": parameters, "counted_gmacs": flops / 2e9, "megabytes": parameters * MEGABYTES_A_PARAMETER}
    if not rounds:
        return counts
    models = {"reference": replace(BenchmarkModel.parse(REFERENCE), options=options), "model": model}
    entries = {name: model_entry("inference", each, setting) for name, each in models.items()}
    times = time_interleaved(entries, setting.device, rounds)
    return counts | relative_speed(times["model"], times["reference"], setting.batch_size)


def find_benchmark_model(row: PublishedRow, options: frozenset[str] = frozenset()) -> BenchmarkModel | None:
    """The model of a row; `None` if there is none, or not in the installed version of timm."""
    if row.model is None:
        return None
    try:
        return replace(BenchmarkModel.parse(row.model), options=options, arguments=row.arguments)
    except ValueError:
        return None


# heading -> what stands below it
COLUMNS: dict[str, Callable[[dict], str]] = {
    "network": lambda row: row["network"],
    "train, test size": lambda row: f"{row['train_size']}, {row['test_size']}",
    "top-1": lambda row: f"{row['top1']:.1f}",
    "ReaL": lambda row: _number(row["real_top1"], ".1f"),
    "parameters": lambda row: f"{row['million_parameters']:g}M",
    "FLOPs": lambda row: _number(row["gmacs"], ".1f", "G"),
    "measured": lambda row: f"`{row['model']}`" if "parameters" in row else "",
    "its parameters": lambda row: _number(row.get("parameters", 0) / 1e6 or None, ".1f", "M"),
    "its FLOPs": lambda row: _number(row.get("counted_gmacs"), ".1f", "G"),
    "MB": lambda row: _number(row.get("megabytes"), ",.0f"),
    "images/s": lambda row: _number(row.get("images_per_second"), ".3g"),
    "times LV-ViT-S": lambda row: _number(row.get("ratio"), ".2g"),
}


def published_table(rows: list[dict[str, object]], heading: str) -> str:
    """Markdown: what is published and what was measured, and below it how they were timed (`heading`) and notes on single rows."""
    is_timed = any("ratio" in row for row in rows)
    names = [name for name in COLUMNS if is_timed or name not in ("images/s", "times LV-ViT-S")]
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    lines = ["| " + " | ".join(names) + " |", "| --- " * 2 + "| ---: " * (len(names) - 2) + "|"]
    for row in rows:
        cells = [COLUMNS[name](row) for name in names]
        if row["note"]:
            cells[0] += f" [{notes.index(row['note']) + 1}]"
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", heading + (" [n]: see below." if notes else ""), ""]
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
