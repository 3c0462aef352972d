"""Comparisons: what is measured of each contestant."""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat

import datasets
import torch

from ..token_labeling.data_sources import open_splits
from .contestants import Contestant, Setting, inference_call, training_call
from .data_path import endless, loader_calls, synthetic_rows, token_label_loader, with_label_maps
from .measure import (
    count_flops,
    matmul_ceiling,
    median_ratio,
    memory_now,
    peak_memory,
    time_alternating,
)


SYNTHETIC_IMAGES = 256
# FLOPs of a training step in those of a forward pass: the backward pass has two products for each of the forward
TRAINING_FLOPS = 3


def compare_models(
    mode: str,
    specifications: list[str],
    setting: Setting,
    rounds: int,
    images: str | None = None,
    with_memory: bool = False,
    with_ceiling: bool = False,
) -> list[dict[str, object]]:
    """Times models in turn.

    Args:
        mode: `"inference"`; `"training"`, steps on one batch; `"run"`, steps that take a new batch each.
        specifications: See `Contestant.parse`; the first is what the others are compared with.
        setting: What they share.
        rounds: Times that each is taken.
        images: Source of pictures for `"run"`; default: synthetic ones.

    Returns:
        A row for each, with `parameters`, `gflops` (of one image forward), `milliseconds` (median) and `seconds` (all),
        `images_per_second`, `ratio`; asked for `peak_megabytes` and `ceiling_share`.
    """
    contestants = {text: Contestant.parse(text) for text in specifications}
    calls = {text: _call(mode, contestant, setting, images) for text, contestant in contestants.items()}
    seconds = time_alternating(calls, setting.device, rounds)
    calls.clear()
    first = next(iter(seconds))
    rows = []
    for text, contestant in contestants.items():
        parameters, flops = _size(contestant, setting.num_classes)
        row = {"mode": mode, "contestant": text, "batch_size": setting.batch_size, "parameters": parameters}
        row |= {"gflops": flops / 1e9, **_speed(seconds[text], seconds[first], setting.batch_size)}
        row["ratio_per_flop"] = row["ratio"] * row["gflops"] / (rows[0]["gflops"] if rows else row["gflops"])
        if with_ceiling:
            speed = flops * row["images_per_second"] * (1 if mode == "inference" else TRAINING_FLOPS)
            row["ceiling_share"] = speed / matmul_ceiling(setting.device, contestant.dtype)
        if with_memory:
            row["peak_megabytes"] = _peak_memory(mode, text, setting, images) / 1e6
        rows.append(row)
    return rows


def compare_loaders(
    names: list[str], setting: Setting, rounds: int, images: str | None = None
) -> list[dict[str, object]]:
    """Times loaders in turn, an epoch of 224 x 224 at a time, in this process and on one thread."""
    rows = _image_rows(images, 1000)
    if len(rows) < setting.batch_size:
        raise ValueError(f"{images} has {len(rows)} pictures, fewer than a batch of {setting.batch_size}.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = loader_calls(names, rows, setting.batch_size, (224, 224), (14, 14))
        seconds = time_alternating(calls, torch.device("cpu"), rounds)
    finally:
        torch.set_num_threads(threads)
    return [
        {"mode": "data", "contestant": name, "batch_size": setting.batch_size}
        | _speed(seconds[name], seconds[names[0]], len(rows) // setting.batch_size * setting.batch_size)
        for name in names
    ]


def _size(contestant: Contestant, num_classes: int | None) -> tuple[int, float]:
    """Parameters, and FLOPs of one image forward, before any option."""
    plain = replace(contestant, options=frozenset())
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in plain.build(num_classes).parameters())
    return parameters, count_flops(lambda: plain.build(num_classes), plain.image_size())


def _speed(seconds: list[float], reference: list[float], images: int) -> dict[str, object]:
    median = statistics.median(seconds)
    return {
        "milliseconds": 1000 * median,
        "images_per_second": images / median,
        "ratio": median_ratio(reference, seconds),
        "seconds": seconds,
    }


def _call(mode: str, contestant: Contestant, setting: Setting, images: str | None) -> Callable[[], object]:
    if mode == "inference":
        return inference_call(contestant, setting)
    return training_call(contestant, setting, _batches(mode, contestant, setting, images))


def _batches(
    mode: str, contestant: Contestant, setting: Setting, images: str | None
) -> Iterator[dict[str, torch.Tensor]]:
    rows = _image_rows(
        images, contestant.num_classes(setting.num_classes), setting.batch_size if mode == "training" else None
    )
    torch.manual_seed(0)
    has_maps = "plain" not in contestant.options or mode == "training"
    loader = token_label_loader(rows, setting.batch_size, contestant.image_size(), contestant.grid_size(), has_maps)
    if mode == "run":
        return endless(loader)
    batch = next(iter(loader))
    return repeat({name: value.to(setting.device) for name, value in batch.items()})


def _image_rows(images: str | None, num_classes: int, count: int | None = None) -> datasets.Dataset:
    if images is None:
        return synthetic_rows(count or SYNTHETIC_IMAGES, num_classes)
    found = open_splits(images)
    rows = found["train"] if "train" in found else next(iter(found.values()))
    return with_label_maps(rows, num_classes)


def _peak_memory(mode: str, specification: str, setting: Setting, images: str | None) -> int:
    """Bytes that a model and its steps take at most, above those that the process had before; in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_memory, mode, specification, setting, images).result()


def _measure_memory(mode: str, specification: str, setting: Setting, images: str | None) -> int:
    contestant = Contestant.parse(specification)
    before = memory_now(setting.device)
    call = _call(mode, contestant, setting, images)
    for _ in range(2):
        call()
    return peak_memory(setting.device, before)
