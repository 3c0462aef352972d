"""Comparisons: what is measured of each model, and its table."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain, repeat

import datasets
import torch
from accelerate.utils import send_to_device

from ..data.sources import open_splits
from .data_loading import loader_call, synthetic_rows, token_label_loader, with_label_maps
from .interleaved_timing import Entry, Times, median_ratio, time_interleaved
from .measure import count_flops, matmul_ceiling
from .models import BenchmarkModel, Setting, inference_call, training_call


SYNTHETIC_IMAGES = 256
# FLOPs of a training step in those of a forward pass: the backward pass has two products for each of the forward
TRAINING_FLOPS = 3
COLUMNS = {
    "model": "{}",
    "parameters": "{:,}",
    "gflops": "{:.2f}",
    "milliseconds": "{:.1f}",
    "images_per_second": "{:.1f}",
    "ratio": "{:.2f}",
    "ratio_per_flop": "{:.2f}",
    "ceiling_share": "{:.0%}",
    "peak_megabytes": "{:,.0f}",
}


def compare_models(
    mode: str, specifications: list[str], setting: Setting, rounds: int, images: str | None, with_ceiling: bool
) -> list[dict[str, object]]:
    """Times models in turn.

    Args:
        mode: `"inference"`; `"training"`, steps on one batch; `"run"`, steps that take a new batch each.
        specifications: See `BenchmarkModel.parse`; the first is what the others are compared with.
        images: Source of images for `"run"`; default: synthetic ones.

    Returns:
        A row for each, with `parameters`, `gflops` (of one image forward), `milliseconds` (median) and `seconds` (all),
        `images_per_second`, `ratio`, `peak_megabytes` and asked for `ceiling_share`.
    """
    models = {text: BenchmarkModel.parse(text) for text in specifications}
    entries = {text: model_entry(mode, model, setting, images) for text, model in models.items()}
    times = time_interleaved(entries, setting.device, rounds)
    first = times[specifications[0]]
    rows = []
    for text, model in models.items():
        parameters, flops = count_size(model, setting.num_classes)
        row = {"mode": mode, "model": text, "batch_size": setting.batch_size, "parameters": parameters}
        row |= {"gflops": flops / 1e9, **relative_speed(times[text], first, setting.batch_size)}
        row["ratio_per_flop"] = row["ratio"] * row["gflops"] / (rows[0]["gflops"] if rows else row["gflops"])
        if with_ceiling:
            speed = flops * row["images_per_second"] * (1 if mode == "inference" else TRAINING_FLOPS)
            row["ceiling_share"] = speed / matmul_ceiling(setting.device, model.dtype)
        rows.append(row)
    return rows


def compare_loaders(
    names: list[str], setting: Setting, rounds: int, images: str | None = None
) -> list[dict[str, object]]:
    """Times loaders in turn, an epoch of 224 x 224 at a time, on one thread each."""
    rows = image_rows(images, 1000)
    if len(rows) < setting.batch_size:
        raise ValueError(f"{images} has {len(rows)} images, fewer than a batch of {setting.batch_size}.")
    entries = {name: Entry(partial(loader_call, name, rows, setting.batch_size), threads=1) for name in names}
    times = time_interleaved(entries, torch.device("cpu"), rounds)
    images_an_epoch = len(rows) // setting.batch_size * setting.batch_size
    return [
        {"mode": "data", "model": name, "batch_size": setting.batch_size}
        | relative_speed(times[name], times[names[0]], images_an_epoch)
        for name in names
    ]


def model_entry(mode: str, model: BenchmarkModel, setting: Setting, images: str | None = None) -> Entry:
    """A model that takes part, see `compare_models`."""
    return Entry(partial(_call, mode, model, setting, images), torch.get_num_threads(), "kept_memory" in model.options)


def count_size(model: BenchmarkModel, num_classes: int | None) -> tuple[int, float]:
    """Parameters, and FLOPs of one image forward, before any option."""
    plain = replace(model, options=frozenset())
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in plain.build(num_classes).parameters())
    return parameters, count_flops(lambda: plain.build(num_classes), plain.image_size())


def relative_speed(times: Times, reference: Times, images: int) -> dict[str, object]:
    """What is said of the speed of a model or loader that takes so many images a turn."""
    median = statistics.median(times.seconds)
    return {
        "milliseconds": 1000 * median,
        "images_per_second": images / median,
        "ratio": median_ratio(reference.seconds, times.seconds),
        "peak_megabytes": times.peak_bytes / 1e6,
        "seconds": times.seconds,
    }


def _call(mode: str, model: BenchmarkModel, setting: Setting, images: str | None) -> Callable[[], object]:
    if mode == "inference":
        return inference_call(model, setting)
    num_classes = model.num_classes(setting.num_classes)
    rows = image_rows(images, num_classes, setting.batch_size if mode == "training" else None)
    torch.manual_seed(0)
    has_maps = "plain" not in model.options or mode == "training"
    loader = token_label_loader(rows, setting.batch_size, model.image_size(), model.grid_size(), has_maps)
    if mode == "run":
        return training_call(model, setting, chain.from_iterable(repeat(loader)))
    batch = send_to_device(next(iter(loader)), setting.device)
    return training_call(model, setting, repeat(batch))


def image_rows(images: str | None, num_classes: int, count: int | None = None) -> datasets.Dataset:
    """Training rows of a source with synthetic label maps, or synthetic photographs where there is none, so many of them."""
    if images is None:
        return synthetic_rows(count or SYNTHETIC_IMAGES, num_classes)
    splits = open_splits(images)
    return with_label_maps(splits.get("train", next(iter(splits.values()))), num_classes)


def table(rows: list[dict[str, object]], columns: dict[str, str] = COLUMNS) -> str:
    """The columns that any row has, aligned; `columns` has the format of each."""
    names = [name for name in columns if any(name in row for row in rows)]
    cells = [[columns[name].format(row[name]) if name in row else "" for name in names] for row in rows]
    lines = [[name.replace("_", " ") for name in names], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
