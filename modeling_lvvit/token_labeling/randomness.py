"""Randomness that belongs to a sample, not to the process that happens to draw it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*parts: int) -> int:
    """A seed of 63 bits from several non-negative integers, for example seed, epoch and row (`numpy.random.SeedSequence`)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Python's and PyTorch's generators started from `seed` within a `with` block, and put back after it.

    What is drawn in the block hangs on the seed alone: not on the process, the worker, the batch or what was drawn before.
    `None` leaves the generators as they are.
    """
    if seed is None:
        yield
        return
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
