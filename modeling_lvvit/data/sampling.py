"""Randomness that belongs to a sample, not to the process that happens to draw it."""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import Sampler


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


class ShardedEvalSampler(Sampler[int]):
    """The rows of one of several processes: every one of them once in all, in contrast to the samplers of PyTorch and accelerate, which
    repeat rows to give all processes as many."""

    def __init__(self, num_rows: int, process_index: int, num_processes: int):
        self.rows = range(process_index, num_rows, num_processes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
