"""Clocks and gauges: alternating timing, peak memory, FLOPs, and what the device can do at best."""

import functools
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


# on a GPU calls are queued: enough of them between two looks at the clock that these do not count
MIN_SECONDS_BETWEEN_SYNCHRONISATIONS = 0.05


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_alternating(
    calls: dict[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn, so that whatever slows the machine down slows all of them.

    Args:
        calls: What to time, by name.
        device: Where it runs.
        rounds: Times that each is taken; every round begins with another of them.
        warmup: Untimed calls of each before.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        repeats[name] = 1
        if device.type != "cpu":
            seconds = _seconds(call, device, 3)
            repeats[name] = max(1, round(MIN_SECONDS_BETWEEN_SYNCHRONISATIONS / seconds))
    names = list(calls)
    seconds = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_seconds(calls[name], device, repeats[name]))
    return seconds


def _seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def median_ratio(reference: list[float], seconds: list[float]) -> float:
    """How many times as fast as the reference: the median over the rounds of both times' quotient."""
    return statistics.median(a / b for a, b in zip(reference, seconds, strict=True))


@functools.cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large matrix product found, plain or as a 1 x 1 convolution (on CPUs another library).

    Multiplications and additions are counted one each.
    """
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        picture = left.view(1, 1, size, size).permute(0, 3, 1, 2)  # (1, size, 1, size), channels last
        calls = {
            "product": lambda left=left, right=right: left @ right,
            "convolution": lambda picture=picture, right=right: nn.functional.conv2d(picture, right[:, :, None, None]),
        }
        with torch.no_grad():
            for seconds in time_alternating(calls, device, rounds=5).values():
                best = max(best, 2 * size**3 / min(seconds))
    return best


def count_flops(build: Callable[[], nn.Module], image_size: tuple[int, int]) -> float:
    """FLOPs of a forward pass of one image; multiplications and additions count one each. Nothing is computed.

    Args:
        build: Makes the model; called on the meta device.
        image_size: Height and width in pixels.
    """
    # fused attention is not counted on every device, so that it is written out here
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model = build().eval()
        counter = FlopCounterMode(display=False)
        with counter:
            model(torch.randn(1, 3, *image_size))
    return counter.get_total_flops()


def memory_now(device: torch.device) -> int:
    """Bytes in use, from which `peak_memory` counts; begins a new peak on an accelerator."""
    if device.type == "cpu":
        return _peak_resident_bytes()
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    return torch.accelerator.memory_allocated(device)


def peak_memory(device: torch.device, before: int) -> int:
    """Bytes by which the peak lies above `before`. On a CPU this is the peak of the whole process, ever: use a fresh one."""
    if device.type == "cpu":
        return _peak_resident_bytes() - before
    return torch.accelerator.max_memory_allocated(device) - before


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its `ru_maxrss` also counts the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text()).group(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
