"""Clocks and gauges: alternating timing, peak memory, FLOPs, and what the device can do at best."""

import functools
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


# the first round warms up; a GPU is given enough work that waiting for it does not count
CEILING_ROUNDS, CEILING_REPEATS = 6, 3


def device_name(device: torch.device) -> str:
    """What computes: the kind of CPU, or the name of the GPU."""
    return platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on an accelerator."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_call(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Mean duration of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


@functools.cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest large matrix product found, plain or as a 1 x 1 convolution (on CPUs another library).

    Multiplications and additions are counted one each.
    """
    best = 0.0
    for size in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        image = left.view(1, 1, size, size).permute(0, 3, 1, 2)  # (1, size, 1, size), channels last
        calls = (
            lambda left=left, right=right: left @ right,
            lambda image=image, right=right: nn.functional.conv2d(image, right[:, :, None, None]),
        )
        with torch.no_grad():
            seconds = min(time_call(call, device, CEILING_REPEATS) for call in calls for _ in range(CEILING_ROUNDS))
        best = max(best, 2 * size**3 / seconds)
    return best


def count_flops(build: Callable[[], nn.Module], image_size: tuple[int, int]) -> float:
    """FLOPs of a forward pass of one image; multiplications and additions count one each. All is on the meta device: nothing is computed."""
    # fused attention is not counted on every device, so that it is written out here
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model = build().eval().requires_grad_(False)  # the counter cannot follow parameters that go through modules
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
