"""Dividing the rows of an evaluation between processes."""

from collections.abc import Iterator

from torch.utils.data import Sampler


class SharedSampler(Sampler[int]):
    """The rows of one of several processes: every one of them once in all, in contrast to the samplers of PyTorch and accelerate, which
    repeat rows to give all processes as many.

    Args:
        num_rows: Rows of the data set.
        process_index, num_processes: Which process.
    """

    def __init__(self, num_rows: int, process_index: int, num_processes: int):
        self.rows = range(process_index, num_rows, num_processes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
