"""Rows of an image dataset in batches that never cross the border of a shard, with their keys; images undecoded."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa

from ..data.image_keys import (
    NO_FIRST_PATH,
    Strings,
    hash_keys,
    path_keys,
    read_keys,
    repeated_keys,
    row_keys,
    value_keys,
)


@dataclass(frozen=True)
class ImageBatch:
    """Rows that follow each other within a shard, and whether it ends with them."""

    shard: int
    keys: list[str]
    is_last: bool


class ImageBatches:
    """Rows of a dataset that can be read at any place, with their keys."""

    def __init__(
        self, dataset: datasets.Dataset, image_column: str, keys: Strings, rows_per_shard: int, batch_size: int
    ):
        self.rows = dataset.select_columns(image_column).with_format("arrow")
        self.image_column, self.keys = image_column, keys
        self.rows_per_shard, self.batch_size = rows_per_shard, batch_size

    @property
    def num_shards(self) -> int:
        """Number of shards of all rows."""
        return -(-len(self.rows) // self.rows_per_shard)

    def shard_size(self, shard: int) -> int:
        """Number of rows of a shard."""
        return min(self.rows_per_shard, len(self.rows) - shard * self.rows_per_shard)

    def batches(self, shards: Iterable[int]) -> Iterator[tuple[ImageBatch, list[dict[str, Any] | None]]]:
        """Batches of the given shards with the values of their image column."""
        for shard in shards:
            first = shard * self.rows_per_shard
            end = first + self.shard_size(shard)
            for start in range(first, end, self.batch_size):
                stop = min(start + self.batch_size, end)
                values = [_value(item.as_py()) for item in self.rows[start:stop][self.image_column]]
                yield ImageBatch(shard, self.keys[start:stop].to_pylist(), stop == end), values


class StreamedImageBatches:
    """Rows of a dataset that can only be read from its start.

    Every process reads the stream and passes over the shards of others, without decoding their images.

    Args:
        key_column: Column of keys; `None` for paths where there are any.
        number_rows: Whether rows are known by their number.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        key_column: str | None,
        number_rows: bool,
        rows_per_shard: int,
        batch_size: int,
    ):
        self.rows = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.key_column, self.number_rows = image_column, key_column, number_rows
        self.rows_per_shard, self.batch_size = rows_per_shard, batch_size
        self.num_shards: int | None = None  # known at the end of the stream
        self.has_paths: bool | None = None  # known from the first row
        if key_column is not None and dataset.features is not None and key_column not in dataset.features:
            raise ValueError(
                f"There is no column {key_column!r} to take keys from; the data has {list(dataset.features)}."
            )

    def batches(self, is_wanted) -> Iterator[tuple[ImageBatch, list[dict[str, Any] | None]]]:
        """Batches of the shards for which `is_wanted(shard)` holds, with the values of their image column."""
        rows = iter(self.rows)
        following = next(rows, None)
        for shard in itertools.count():
            if following is None:
                self.num_shards = shard
                return
            wanted, left = is_wanted(shard), self.rows_per_shard
            while left and following is not None:
                batch = [following, *itertools.islice(rows, min(self.batch_size, left) - 1)]
                following = next(rows, None)
                if self.has_paths is None:  # the first row tells of what kind all keys are
                    first = _value(batch[0][self.image_column]) or {}
                    self.has_paths = not self.number_rows and first.get("path") is not None
                start = (shard + 1) * self.rows_per_shard - left
                left -= len(batch)
                if wanted:
                    about = ImageBatch(shard, self._keys(batch, start).to_pylist(), not left or following is None)
                    yield about, [_value(row[self.image_column]) for row in batch]

    def _keys(self, batch: list[dict[str, Any]], start: int) -> Strings:
        if self.key_column is not None:
            return value_keys(column_values(batch, self.key_column, self.rows.features), self.key_column, start)
        paths = pa.array([(_value(row[self.image_column]) or {}).get("path") for row in batch], pa.string())
        if self.has_paths:
            return path_keys(paths, start)
        if paths.null_count < len(paths) and not self.number_rows:
            raise ValueError(NO_FIRST_PATH)
        return row_keys(start, start + len(batch))


def distinct_keys(
    dataset: datasets.Dataset, image_column: str, key_column: str | None, number_rows: bool
) -> tuple[Strings, dict[str, Any]]:
    """Keys of images, and what the record says of them.

    Raises:
        ValueError: If keys are missing or not unique.
    """
    keys = read_keys(dataset, image_column, key_column, number_rows)
    if duplicates := repeated_keys(keys):
        raise ValueError(
            f"Several images have the same key: {', '.join(map(repr, duplicates))}. Name a column that tells them apart "
            "with `key_column`, or tell them apart by their row with `number_rows`."
        )
    return keys, {"num_rows": len(keys), "keys_sha256": hashlib.sha256(hash_keys(keys).tobytes()).hexdigest()}


def column_values(rows: list[dict[str, Any]], column: str, features: datasets.Features | None) -> pa.Array:
    """A column of streamed rows, of the type that it has in stored rows."""
    column_type = features.arrow_schema.field(column).type if features is not None else None
    return pa.array([row.get(column) for row in rows], column_type)


def _value(item: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The value of an image column; a column of plain paths has strings."""
    return {"bytes": None, "path": item} if isinstance(item, str) else item
