"""Training samples from a dataset that is read one row after another, with the label maps of a label set."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import compress, islice
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset

from ..annotators.image_batches import column_values
from ..data.decoding import EncodedImage
from ..data.image_keys import path_keys, value_keys
from ..data.images import PixelLimit, SampleError, UndecodableError
from ..data.sampling import fold_in, temporary_seed
from ..data.steps import StreamOrder
from ..labels.columns import LabelMapError
from ..labels.label_set import LabelLookup, LabelSet
from ..labels.reader import LabelMapReader, turn_with_images
from .dataset import transformed


ROWS_AT_ONCE = 32  # whose label maps are fetched together


class TokenLabelStream(Dataset):
    """An endless stream of training samples; the Trainer stops it after `max_steps`.

    Images with an empty label are passed over. Every process and every worker of a `DataLoader` that begin a run read their own part of
    the rows, so that nothing is read twice; `order` says in which order. Other numbers of processes and workers that continue the run go on
    in the same order: they read the parts of which they need images, and decode those alone. What a transform draws for a
    sample depends on the seed, the part and the place of the sample in it.

    `stream[number]` is a sample of the run; numbers may only rise, or the parts are read again. Iterating gives the samples of `process_index`
    alone, without workers.

    Args:
        dataset: Rows with an image column and a `ClassLabel` column.
        transform: Called with an image, and where there are maps with the palette positions, scores and region of its map;
            returns a dict of tensors (`TrainTransform`).
        labels: Label set; `None` for plain labels.
        key_column: Column of keys; default: paths.
        key_pattern: Regular expression that cuts the key out of both sides; see `LabelSet.join`.
        shuffle_buffer: Rows among which the next one is drawn; 0 keeps the stored order.

    Raises:
        ValueError: If keys of the label set come more than once, or are row numbers, which a stream does not know.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable,
        image_column: str,
        label_column: str,
        labels: LabelSet | None = None,
        key_column: str | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        key_pattern: str | None = None,
    ):
        self.label_feature = dataset.features[label_column]
        self.seed, self.process_index = seed, process_index
        self.pixel_limit = PixelLimit()  # for the processes that load
        self.rows = dataset.cast_column(image_column, datasets.Image(decode=False))
        if shuffle_buffer:
            self.rows = self.rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.transform = transform
        self.image_column, self.label_column, self.key_column = image_column, label_column, key_column
        self.lookup = None if labels is None else LabelLookup(labels, key_pattern)
        self.label_maps: LabelMapReader | None = None if labels is None else self.lookup.label_maps
        self.order = StreamOrder(num_processes, 1, 1)
        self._parts: dict[tuple[int, int], _Part] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the parts that are being read."""
        return {**self.__dict__, "_parts": {}}

    @property
    def has_label_maps(self) -> bool:
        """Whether samples carry dense labels."""
        return self.label_maps is not None

    def check_num_classes(self, num_classes: int) -> None:
        """Raises a `ValueError` if the class names of the data are not as many as the model's outputs."""
        if self.label_feature.num_classes != num_classes:
            raise ValueError(f"The data has {self.label_feature.num_classes} classes, the model {num_classes}.")

    def begin_order(self, num_processes: int, num_workers: int, batch_size: int) -> StreamOrder:
        """The order of a run that so many processes begin, each with so many workers, of which no more than there are files to read."""
        files = split_dataset_by_node(self.rows, 0, num_processes).num_shards
        return StreamOrder(num_processes, min(num_workers, files), batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._sample(*self.order.place(number))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            yield self._sample(self.process_index, 0, number)

    def _sample(self, process: int, worker: int, number: int) -> dict[str, Any]:
        part = self._parts.get((process, worker))
        if part is None or number < part.begin:
            part = self._parts[process, worker] = _Part(self, process, worker)
        return part.sample(number)

    def label(self, row: dict[str, Any]) -> int:
        """Class id of a row."""
        label = row[self.label_column]
        if label is None or not 0 <= label < self.label_feature.num_classes:
            name = (row[self.image_column] or {}).get("path")
            raise SampleError(f"Image {name} of the stream has the label {label}, not one of its classes.")
        return label

    def with_labels(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The rows whose label is not empty, and the places of their maps."""
        keys = [self.key(row) for row in rows]
        places = self.lookup.find(keys)
        if (places == -1).any():
            raise SampleError(f"Image {keys[int(np.argmin(places))]!r} has no label map in the label set.")
        has_label = ~self.lookup.is_empty[places]
        return list(compress(rows, has_label)), places[has_label]

    def key(self, row: dict[str, Any]) -> str:
        """What the label set calls a row."""
        if self.key_column is not None:
            values = column_values([row], self.key_column, self.rows.features)
            return value_keys(values, self.key_column)[0].as_py()
        path = (row[self.image_column] or {}).get("path")
        if path is None:
            raise SampleError(
                "An image of the stream has no path to take its key from. Name the column of keys (`key_column`) with which "
                "the images were annotated."
            )
        return path_keys(pa.array([path]))[0].as_py()

    @contextmanager
    def reading(self, row: dict[str, Any]) -> Iterator[None]:
        """Around the decoding of a row: a `SampleError` names an image that cannot be decoded."""
        value = row[self.image_column]
        if value is None:
            raise SampleError("A row of the stream has no image.")
        try:
            yield
        except UndecodableError as error:
            name = value.get("path") or "without a path"
            raise SampleError(f"Image {name} of the stream cannot be decoded ({error}).") from error


class _Part:
    """The rows that one of the processes and workers which began a run reads, again and again; `begin` is the number of the first one of the
    group that was read last."""

    def __init__(self, stream: TokenLabelStream, process: int, worker: int):
        self.stream, self.place = stream, (stream.seed, process, worker)
        # a copy: of an iterable dataset that is being read, `datasets` changes the state
        self.rows = split_dataset_by_node(copy.deepcopy(stream.rows), process, stream.order.num_processes)
        self.groups = self._groups()
        self.begin = self.end = 0

    def sample(self, number: int) -> dict[str, Any]:
        """A sample; rows before it are read and passed."""
        while number >= self.end:
            self.group = next(self.groups)
            self.begin, self.end = self.end, self.end + len(self.group.rows)
        return self.group.sample(number - self.begin)

    def _groups(self) -> Iterator["_Group"]:
        _, process, worker = self.place
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            count = used = 0
            with _as_worker(worker, self.stream.order.num_workers):
                rows = iter(self.rows)
                waiting = list(islice(rows, ROWS_AT_ONCE))
            while waiting:
                count += len(waiting)
                group = _Group(self.stream, waiting, (*self.place, epoch, count))
                used += len(group.rows)
                if group.rows:
                    yield group
                waiting = list(islice(rows, ROWS_AT_ONCE))
            if count and not used:
                raise SampleError("No image of the stream has a label map that is not empty.")
            if not count:
                raise SampleError(
                    f"The part of the stream for worker {worker} of process {process} has no rows: some of its files are empty. Use "
                    "`dataloader_num_workers` 0, or remove them."
                )


@contextmanager
def _as_worker(index: int, number: int) -> Iterator[None]:
    """Has `datasets` read the rows of one of several workers within a `with` block, whichever worker this is: it asks PyTorch. Of none if
    their number is 0."""
    original = torch.utils.data.get_worker_info
    worker = SimpleNamespace(id=index, num_workers=number) if number else None
    torch.utils.data.get_worker_info = lambda: worker
    try:
        yield
    finally:
        torch.utils.data.get_worker_info = original


class _Group:
    """Rows that are read together, without those whose label is empty. Their label maps are fetched when one is asked for."""

    def __init__(self, stream: TokenLabelStream, rows: list[dict[str, Any]], place: tuple[int, ...]):
        self.stream, self.place = stream, place
        self.rows, self.offsets, self.places = rows, range(len(rows)), None
        if stream.has_label_maps:
            self.rows, self.places = stream.with_labels(rows)

    @cached_property
    def maps(self) -> Any:
        """Label maps of the rows; `None` for plain labels."""
        stream = self.stream
        if self.places is None:
            return None
        try:
            images = [row[stream.image_column] for row in self.rows]
            return turn_with_images(stream.label_maps.fetch(self.places), images)
        except LabelMapError as error:
            raise SampleError(f"The label map of {stream.key(self.rows[error.row])!r}: {error}.") from error

    def sample(self, offset: int) -> dict[str, Any]:
        """Decodes and transforms a row."""
        stream, row = self.stream, self.rows[offset]
        with stream.reading(row), temporary_seed(seed := fold_in(*self.place, offset)):
            image = EncodedImage.open(row[stream.image_column])
            sample = transformed(stream.transform, image, self.maps, offset)
        return {**sample, "labels": stream.label(row), "seed": seed}
