"""What is logged of training besides its loss: the parts of the loss, the speed, and how much of the time it waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LossComponents:
    """Means of the parts of the loss since the last log."""

    def __init__(self):
        self.count, self._sums = 0, {}

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        """Adds the parts of a step; nothing is read from the device."""
        for name in ("cls_loss", "token_loss"):
            value = losses[name].detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self.count += 1

    def take(self) -> dict[str, torch.Tensor]:
        """The means; begins again."""
        means = {name: total / self.count for name, total in self._sums.items()}
        self.count, self._sums = 0, {}
        return means


class Throughput:
    """Clock of a training run; evaluation and saving do not count.

    A share of waiting near 0 says that the loader keeps up. On a GPU the processor works ahead of the device, so that a small
    share need not slow anything.

    Attributes:
        waited_seconds, paused_seconds: Of all intervals.
    """

    def __init__(self):
        self.waited_seconds = self.paused_seconds = 0.0
        self.start()

    def start(self) -> None:
        """Begins an interval."""
        self._started, self._waited, self._paused, self._images = time.perf_counter(), 0.0, 0.0, 0

    def count(self, images: int) -> None:
        """Adds images that enter a step."""
        self._images += images

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which training waits for a batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin
        self.waited_seconds += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin
        self.paused_seconds += time.perf_counter() - begin

    def report(self, annotation_seconds: float | None = None) -> dict[str, float]:
        """`images_per_second`, and `data_wait` and perhaps `annotation` as shares of the time in [0, 1], since the interval began; begins
        a new one."""
        seconds = max(time.perf_counter() - self._started - self._paused, 1e-9)
        figures = {
            "images_per_second": round(self._images / seconds, 1),
            "data_wait": round(min(1.0, self._waited / seconds), 4),
        }
        if annotation_seconds is not None:
            figures["annotation"] = round(annotation_seconds / seconds, 4)
        self.start()
        return figures
