"""Worker processes that load images: how many there are, and what all of them share."""

import math
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..launching import num_cpu_cores, start_worker
from .sampling import ShardedEvalSampler, fold_in


logger = logging.get_logger(__name__)
MAX_WORKERS = 16  # of a process that trains or evaluates
PREFETCH_FACTOR = 4  # batches that each worker loads ahead
SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches, on Linux
# bytes; containers have 64 MiB unless told otherwise, and a worker that finds no room ends the run
NEEDED_SHARED_MEMORY = 2**30
NUM_WORKERS_HELP = (
    "Processes that load images for each process that computes; 0: that one itself; default: on a GPU one for each core that it may use, "
    f"at most {MAX_WORKERS}; on a CPU 0."
)


def processes_of_machine() -> int:
    """Processes of the program on this machine, those that load images not counted."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cores_of_process() -> int:
    """The share of a process in the cores that the program may use; at least 1."""
    return max(1, num_cpu_cores() // processes_of_machine())


def lacks_shared_memory() -> bool:
    """Whether there is too little of it for workers."""
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).total < NEEDED_SHARED_MEMORY


def default_num_workers(on_cpu: bool) -> int:
    """Processes that load images for each process that computes: one for each core of its share, at most `MAX_WORKERS`; none without
    shared memory.

    None either where the CPU computes: PyTorch keeps all of its cores busy, and a worker on one of them makes the threads of the others
    wait at the end of every operation. On two cores a step of the embedded job takes 102 ms without workers and 110 ms with one or two,
    one on photographs 251 ms without and 284 ms with one.
    """
    return 0 if on_cpu or lacks_shared_memory() else min(cores_of_process(), MAX_WORKERS)


def num_preparing_workers(given: int | None) -> int:
    """Processes that prepare images for each process of an annotator: those that were given, else one for each core of its share, at most
    `MAX_WORKERS`, also where the CPU computes: decoding is most of the work. Without shared memory none, which a line says."""
    if given is not None:
        return given
    if lacks_shared_memory():
        logger.warning(
            "%s is too small for worker processes, images are prepared one after another; a container gets more by docker run "
            "--shm-size 8g.", SHARED_MEMORY,
        )  # fmt: skip
        return 0
    return min(cores_of_process(), MAX_WORKERS)


def describe_workers(number: int, on_cpu: bool) -> str:
    """How many processes load images, in a line."""
    processes = processes_of_machine()
    each = f" for each of {processes} processes" if processes > 1 else ""
    if number:
        return f"images are loaded by {number} worker{'s' if number > 1 else ''}{each}"
    text = "images are loaded without workers, by the process that computes"
    if on_cpu or not lacks_shared_memory():
        return text
    return f"{text}: {SHARED_MEMORY} is too small for them; a container gets more by docker run --shm-size 8g"


def sharded_loader(
    samples: Dataset, batch_size: int, num_workers: int | None, state: PartialState, collate_fn: Callable | None = None
) -> DataLoader:
    """Batches of the share of this process in samples to evaluate, in their order.

    Args:
        num_workers: `None` for the default, but no more than there are batches.
    """
    sampler = ShardedEvalSampler(len(samples), state.process_index, state.num_processes)
    if num_workers is None:
        num_workers = min(default_num_workers(state.device.type == "cpu"), math.ceil(len(sampler) / batch_size))
    loader = DataLoader(
        samples,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        pin_memory=state.device.type == "cuda",
        collate_fn=collate_fn,
    )
    return prepare_loader(loader)


def prepare_loader(loader: DataLoader, *seed: int) -> DataLoader:
    """Gives a loader, also one that accelerate has wrapped, what all have in common, and returns it.

    - Its workers ignore the signals to stop, which terminals and schedulers send to all processes: they end with the main one, however
      that ends.
    - The seed of its workers comes from a generator of its own. It is drawn whenever workers start: with workers that outlive an epoch
      once in a run, and once more where that is resumed. Drawn from the generator of the process, as the library does, it would move
      drop path and all else that is drawn there.

    Args:
        seed: Of that generator, see `fold_in`.
    """
    inner = getattr(loader, "base_dataloader", loader)
    if inner.num_workers:
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn, _ending(os.getpid()))
    inner.generator = torch.Generator().manual_seed(fold_in(*seed))
    return loader


def end_workers(loader: DataLoader) -> None:
    """Ends workers that outlive an epoch, and drops the batches that they have loaded ahead; others start with the next epoch."""
    inner = getattr(loader, "base_dataloader", loader)
    if inner._iterator is not None:
        inner._iterator._shutdown_workers()
        inner._iterator = None


@cache
def _ending(pid: int) -> torch.Tensor:
    """Whether this process, which has the number `pid`, ends, bool, shared with its workers. When it ends, it sends a SIGTERM to those that
    are left, and waits."""
    is_ending = torch.zeros((), dtype=torch.bool).share_memory_()
    # not `atexit`, which processes that `multiprocessing` has started pass over
    Finalize(None, is_ending.fill_, args=(True,), exitpriority=100)
    return is_ending


def _start_worker(then: Callable[[int], Any] | None, is_ending: torch.Tensor, worker_id: int) -> None:
    def end_with_main_process(number: int, frame: Any) -> None:
        if is_ending:
            os._exit(0)

    start_worker()
    signal.signal(signal.SIGTERM, end_with_main_process)
    if then is not None:
        then(worker_id)
