"""Taking turns: every model in a process of its own, so that none finds the heap or the caches that another left."""

import multiprocessing
import signal
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker

import torch

from ..launching import keep_freed_memory, start_worker
from .measure import memory_now, peak_memory, time_call


# on a GPU calls are queued: enough of them between two looks at the clock that these do not count
MIN_SECONDS_BETWEEN_SYNCHRONIZATIONS = 0.05
# threads of the one before look out for work for some milliseconds before they sleep
PAUSE_SECONDS = 0.05


@dataclass(frozen=True)
class Entry:
    """What takes part.

    Args:
        prepare: Makes the call that is timed; run in the process of its own, so that it must be picklable.
        threads: Of PyTorch on the CPU.
        keeps_memory: Whether freed memory stays in the process, see `keep_freed_memory`.
    """

    prepare: Callable[[], Callable[[], object]]
    threads: int
    keeps_memory: bool = False


@dataclass
class Times:
    """Seconds of each call, and the most bytes in use above those before `prepare`."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def time_interleaved(
    entries: dict[str, Entry], device: torch.device, rounds: int, warmup: int = 2
) -> dict[str, Times]:
    """Times calls in turn, so that whatever slows the machine down slows all of them.

    Args:
        entries: What to time, by name.
        rounds: Times that each is taken; every round begins with another of them.
        warmup: Untimed calls of each before.
    """
    # forked from a process that has imported all but not computed yet, where there is such a thing
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["modeling_lvvit.benchmark.comparison"])
        resource_tracker.ensure_running()  # it unblocks the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C goes to it too, while it imports
        forkserver.ensure_running()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    times = {name: Times() for name in entries}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, context, start_worker)) for name in entries}
        repeats = {
            name: processes[name].submit(_begin, entry, device, warmup).result() for name, entry in entries.items()
        }
        names = list(entries)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                time.sleep(PAUSE_SECONDS)
                times[name].seconds.append(processes[name].submit(_take, repeats[name]).result())
        for name in names:
            times[name].peak_bytes = processes[name].submit(_peak).result()
    return times


_this_process: tuple[torch.device, int, Callable[[], object]] | None = None  # device, bytes before, call


def _begin(entry: Entry, device: torch.device, warmup: int) -> int:
    """Prepares the call of this process; returns how often it is to be made at each turn."""
    global _this_process
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    torch.set_num_threads(entry.threads)
    if entry.keeps_memory:
        keep_freed_memory()
    before = memory_now(device)
    call = entry.prepare()
    _this_process = device, before, call
    for _ in range(warmup):
        call()
    if device.type == "cpu":
        return 1
    return max(1, round(MIN_SECONDS_BETWEEN_SYNCHRONIZATIONS / _take(3)))


def _take(repeats: int) -> float:
    device, _, call = _this_process
    return time_call(call, device, repeats)


def _peak() -> int:
    device, before, _ = _this_process
    return peak_memory(device, before)


def median_ratio(reference: list[float], seconds: list[float]) -> float:
    """How many times as fast as the reference: the median over the rounds of both times' quotient."""
    return statistics.median(a / b for a, b in zip(reference, seconds, strict=True))
