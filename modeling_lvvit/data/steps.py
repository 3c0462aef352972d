"""Which images an optimizer step takes, and which process and micro-batch of it takes which: the same images in the same steps, however many
processes there are.

A step takes the next `images_per_step` images of the order. Its micro-batches are consecutive parts of them, dealt to the processes in turn:
of two processes with two micro-batches of 8 images the first takes images 0 to 7 and 16 to 23, the second 8 to 15 and 24 to 31. One process
with four micro-batches of 8 takes the same micro-batches one after another.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import BatchSampler, Sampler


@dataclass(frozen=True)
class StepDivision:
    """Parts of an optimizer step.

    Args:
        batch_size: Images of a micro-batch.
        num_processes: Processes that take micro-batches at the same time, a round of them.
        accumulation_steps: Micro-batches of each process in a step.
    """

    batch_size: int
    num_processes: int
    accumulation_steps: int

    @property
    def images_per_round(self) -> int:
        """Images that all processes take at the same time."""
        return self.batch_size * self.num_processes

    @property
    def images_per_step(self) -> int:
        """Images of a whole step."""
        return self.images_per_round * self.accumulation_steps


class StepBatchSampler(BatchSampler):
    """The micro-batches of one process. Every image comes once in an epoch; the last step of an epoch takes those that are left.

    Where a process has none left in the last round, it gets images of another process again, which `weights` lets count nothing: all
    processes must take part in a step.

    Args:
        sampler: Numbers of images in the order of an epoch, the same in all processes. Without a length it is endless.
        drop_last: Whether a last step with fewer images is left out.
        epoch: Says which epoch begins; for samplers with a `set_epoch`.
    """

    def __init__(
        self,
        sampler: Sampler,
        division: StepDivision,
        process_index: int = 0,
        drop_last: bool = False,
        epoch: Callable[[], int] = int,
    ):
        super().__init__(sampler, division.batch_size, drop_last)
        self.division, self.process_index, self.epoch = division, process_index, epoch

    @property
    def num_images(self) -> int:
        """Images of an epoch; a `TypeError` if it has no end."""
        images = len(self.sampler)
        return images - images % self.division.images_per_step if self.drop_last else images

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch; a `TypeError` if it has no end."""
        return math.ceil(self.num_images / self.division.images_per_step)

    def __len__(self) -> int:
        return math.ceil(self.num_images / self.division.images_per_round)

    def __iter__(self) -> Iterator[list[Any]]:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(self.epoch())
        rows = iter(self.sampler)
        if not isinstance(self.sampler, EndlessSampler):
            rows = itertools.islice(rows, self.num_images)
        begin = self.process_index * self.batch_size
        while images := list(itertools.islice(rows, self.division.images_per_round)):
            yield images[begin : begin + self.batch_size] or images[: self.batch_size]

    def images(self, step: int) -> int:
        """Images that a step takes, over all processes; steps are counted from the beginning of training."""
        whole = self.division.images_per_step
        if isinstance(self.sampler, EndlessSampler):
            return whole
        return min(whole, self.num_images - step % self.num_steps * whole)

    def weights(self, step: int) -> list[float]:
        """How much the mean loss of each micro-batch of this process counts in a step, so that every image of the step counts alike when
        the losses are averaged over micro-batches and processes: 1 for each in a whole step."""
        images, division = self.images(step), self.division
        rounds = math.ceil(images / division.images_per_round)
        begins = [(part * division.num_processes + self.process_index) * self.batch_size for part in range(rounds)]
        counts = [min(max(images - begin, 0), self.batch_size) for begin in begins]
        return [count * division.num_processes * rounds / images for count in counts]


class EndlessSampler(Sampler[int]):
    """0, 1, 2, ... without end."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


@dataclass(frozen=True)
class StreamOrder:
    """In which order a run takes the images of a stream, whoever continues it: the one in which the processes and workers that began it, each
    with its own part of the stream, deliver them.

    Args:
        num_processes: That began the run.
        num_workers: Of each process, each with a part of its own. 0 in runs of former versions: `datasets` shuffles in another order without
            a worker than with one, which all runs have since.
        batch_size: Images of their micro-batches.
    """

    num_processes: int
    num_workers: int
    batch_size: int

    def place(self, number: int) -> tuple[int, int, int]:
        """Process and worker whose part an image of the run belongs to, and its number in that part."""
        batch, offset = divmod(number, self.batch_size)
        round_, process = divmod(batch, self.num_processes)
        turn, worker = divmod(round_, max(1, self.num_workers))
        return process, worker, turn * self.batch_size + offset

    def to_dict(self) -> dict[str, int]:
        """For a record."""
        return asdict(self)
