"""Batches of images that worker processes prepare while the annotator runs on earlier ones."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..data.images import PixelLimit, SampleError
from ..launching import start_worker
from .pipeline import PreparedImage, prepare_image


BATCHES_AHEAD = 8  # of all workers together, at least one of each
# errors that are for people; others come from a worker with its traceback
ERRORS = (SampleError, OSError, ValueError)


def prepared_ahead(
    batches: Iterable[tuple[Any, list[dict[str, Any] | None]]], preprocessing: Callable, num_workers: int
) -> Iterator[tuple[Any, list[PreparedImage]]]:
    """`loaded_ahead` of image values, each of which `pipeline.prepare_image` reads and preprocesses."""
    return loaded_ahead(partial(_prepare_images, preprocessing=preprocessing), batches, num_workers)


def _prepare_images(values: list[dict[str, Any] | None], preprocessing: Callable) -> list[PreparedImage]:
    return [prepare_image(value, preprocessing) for value in values]


def loaded_ahead(
    load: Callable[[Any], list[PreparedImage]], batches: Iterable[tuple[Any, Any]], num_workers: int
) -> Iterator[tuple[Any, list[PreparedImage]]]:
    """Loads batches in worker processes while the caller works on earlier ones.

    Args:
        load: Called with the second of each pair; what it raises is raised here.
        batches: Pairs of anything and what is to be loaded.
        num_workers: Processes; 0 loads in this one, when a batch is asked for.

    Yields:
        The first of each pair with the prepared images, in order.
    """
    waiting: deque[Any] = deque()

    def places() -> Iterator[Any]:
        for about, place in batches:
            waiting.append(about)
            yield place

    loader = torch.utils.data.DataLoader(
        _Loads(load),
        batch_size=None,
        sampler=places(),
        num_workers=num_workers,
        prefetch_factor=max(1, BATCHES_AHEAD // num_workers) if num_workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # the program's own draws stay as they are
    )
    for images, pixels in loader:
        if isinstance(images, Exception):
            raise images
        parts = iter(pixels)
        yield waiting.popleft(), [replace(image, pixels=next(parts)) if has else image for image, has in images]


class _Loads(torch.utils.data.Dataset):
    """Loaded batches, their pixels in one tensor for each shape that follows: a tensor costs an open file on its way between processes."""

    def __init__(self, load: Callable[[Any], list[PreparedImage]]):
        self.load = load
        self.pixel_limit = PixelLimit()  # for the processes that load

    def __getitem__(self, place: Any) -> tuple[Any, torch.Tensor | list[torch.Tensor]]:
        try:
            images = self.load(place)
        except ERRORS as error:
            return error, []
        pixels = [image.pixels for image in images if image.pixels is not None]
        if len({part.shape for part in pixels}) == 1:
            pixels = torch.stack(pixels)
        return [(replace(image, pixels=None), image.pixels is not None) for image in images], pixels
