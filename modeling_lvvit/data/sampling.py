"""Randomness that belongs to a sample, not to the process that happens to draw it."""

import hashlib
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Sampler, WeightedRandomSampler


BALANCED = "balanced"  # a `train_sampling_strategy`


def fold_in(*parts: int) -> int:
    """A seed of 63 bits from several integers of 64 bits, for example seed, epoch and row: their BLAKE2b digest."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def temporary_seed(seed: int | None) -> Iterator[None]:
    """Python's and PyTorch's generators started from `seed` within a `with` block, and put back after it.

    What is drawn in the block depends on the seed alone: not on the process, the worker, the batch or what was drawn before.
    `None` leaves the generators as they are.
    """
    if seed is None:
        yield
        return
    with preserve_rng_state():
        seed_generators(seed)
        yield


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Python's and PyTorch's generators are after the `with` block as they were before."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)


def seed_generators(seed: int) -> None:
    """Starts Python's and PyTorch's generators for the CPU from `seed`."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)


class BalancedSampler(WeightedRandomSampler):
    """As many rows as there are, drawn with replacement, of every class with the same probability.

    The draws of an epoch depend on seed and epoch alone, so that all processes have the same and a continued run goes on with them.
    A row that comes again is a pair of its number and how often it came before: `ImageDataset` augments it in another way.

    Args:
        class_ids: `(n,)` class of each row.
        seed_and_epoch: Called at the start of each epoch.

    Example: of 900 rows of class 0 and 100 of class 1 an epoch has about 500 draws of each, every row of class 1 about 5 times.
    """

    def __init__(self, class_ids: np.ndarray, seed_and_epoch: Callable[[], tuple[int, int]]):
        _, places, counts = np.unique(class_ids, return_inverse=True, return_counts=True)
        super().__init__(1 / counts[places], len(class_ids), replacement=True, generator=torch.Generator())
        self.seed_and_epoch = seed_and_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.generator.manual_seed(fold_in(*self.seed_and_epoch()))
        draws: Counter[int] = Counter()
        for row in super().__iter__():
            yield row, draws[row]
            draws[row] += 1


class ShardedEvalSampler(Sampler[int]):
    """The rows of one of several processes: every one of them once in all, in contrast to the samplers of PyTorch and accelerate, which
    repeat rows to give all processes as many."""

    def __init__(self, num_rows: int, process_index: int, num_processes: int):
        self.rows = range(process_index, num_rows, num_processes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
