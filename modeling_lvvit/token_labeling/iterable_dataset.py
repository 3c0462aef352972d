"""Training samples from a dataset that is read one row after another, with the label maps of a label set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import compress, islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from ..annotators.image_batches import column_values
from ..data.decoding import EncodedImage
from ..data.image_keys import path_keys, value_keys
from ..data.images import PixelLimit, SampleError, UndecodableError
from ..data.sampling import fold_in, temporary_seed
from ..labels.columns import LabelMapError
from ..labels.label_set import LabelLookup, LabelSet
from ..labels.reader import LabelMapReader, turn_with_images
from .dataset import transformed


ROWS_AT_ONCE = 32  # whose label maps are fetched together


class TokenLabelStream(torch.utils.data.IterableDataset):
    """An endless stream of training samples; the Trainer stops it after `max_steps`.

    Images with an empty label are passed over. Every process and every worker of a `DataLoader` reads its own part of the
    rows, so that nothing is read twice. What a transform draws for a sample depends on the seed, the process, the worker and
    the place of the sample in their part.

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
        rows = dataset.cast_column(image_column, datasets.Image(decode=False))
        if shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.rows = split_dataset_by_node(rows, process_index, num_processes)
        self.transform = transform
        self.image_column, self.label_column, self.key_column = image_column, label_column, key_column
        self.lookup = None if labels is None else LabelLookup(labels, key_pattern)
        self.label_maps: LabelMapReader | None = None if labels is None else self.lookup.label_maps

    @property
    def has_label_maps(self) -> bool:
        """Whether samples carry dense labels."""
        return self.label_maps is not None

    def check_num_classes(self, num_classes: int) -> None:
        """Raises a `ValueError` if the class names of the data are not as many as the model's outputs."""
        if self.label_feature.num_classes != num_classes:
            raise ValueError(f"The data has {self.label_feature.num_classes} classes, the model {num_classes}.")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        part = (self.seed, self.process_index, worker.id if worker is not None else 0)
        epoch = 0
        while True:
            self.rows.set_epoch(epoch)
            count = used = 0
            rows = iter(self.rows)
            while waiting := list(islice(rows, ROWS_AT_ONCE)):
                count += len(waiting)
                for sample in self._samples(waiting, (*part, epoch, count)):
                    used += 1
                    yield sample
            if count and not used:
                raise SampleError("No image of the stream has a label map that is not empty.")
            if not count:  # more workers than files: this one has nothing to read
                return
            epoch += 1

    def _samples(self, rows: list[dict[str, Any]], place: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        maps = None
        if self.has_label_maps:
            rows, places = self._with_labels(rows)
            try:
                maps = turn_with_images(self.label_maps.fetch(places), [row[self.image_column] for row in rows])
            except LabelMapError as error:
                raise SampleError(f"The label map of {self._key(rows[error.row])!r}: {error}.") from error
        for offset, row in enumerate(rows):
            with self._reading(row), temporary_seed(seed := fold_in(*place, offset)):
                image = EncodedImage.open(row[self.image_column])
                sample = transformed(self.transform, image, maps, offset)
            yield {**sample, "labels": self._label(row), "seed": seed}

    def _label(self, row: dict[str, Any]) -> int:
        label = row[self.label_column]
        if label is None or not 0 <= label < self.label_feature.num_classes:
            name = (row[self.image_column] or {}).get("path")
            raise SampleError(f"Image {name} of the stream has the label {label}, not one of its classes.")
        return label

    def _with_labels(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The rows whose label is not empty, and the places of their maps."""
        keys = [self._key(row) for row in rows]
        places = self.lookup.find(keys)
        if (places == -1).any():
            raise SampleError(f"Image {keys[int(np.argmin(places))]!r} has no label map in the label set.")
        has_label = ~self.lookup.is_empty[places]
        return list(compress(rows, has_label)), places[has_label]

    def _key(self, row: dict[str, Any]) -> str:
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
    def _reading(self, row: dict[str, Any]) -> Iterator[None]:
        value = row[self.image_column]
        if value is None:
            raise SampleError("A row of the stream has no image.")
        try:
            yield
        except UndecodableError as error:
            name = value.get("path") or "without a path"
            raise SampleError(f"Image {name} of the stream cannot be decoded ({error}).") from error


def stream_loader(
    stream: TokenLabelStream, collator: Callable, batch_size: int, args: TrainingArguments
) -> DataLoader:
    """Batches of a stream, moved to the device of this process."""
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        drop_last=args.dataloader_drop_last,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )
    # as if there were one process: accelerate would pass over the samples of the others once more
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
