"""The shards of a reduced copy, and whether those of an earlier run belong to the same images."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files.atomic_files import write_atomically
from ..files.shard_folder import DATA, ShardFolder
from ..images import content_hash, read_content
from .record import RECORD, SOURCE_HASH, count_shards, shard_name
from .reduce import CopyFacts, ReducedRows


FACTS = b"reduced_copy"  # entry of the metadata of a file: the `CopyFacts` of its rows
BLOCK_ROWS, BLOCKS_PER_GROUP = 8, 16  # rows that a process makes at a time, and how many of these are a row group
SAMPLED_SHARDS, SAMPLED_ROWS = 8, 8  # whose images are looked at again, and how many of each
HASHED_ROWS = 65_536  # read at a time


@dataclass(frozen=True)
class Shard:
    """Rows of a split that become a file; `name` is that of the file."""

    split: str
    rows: range
    name: str

    def blocks(self) -> list[tuple[str, range]]:
        """Split and rows of its parts, as `ReducedRows` takes them."""
        starts = range(self.rows.start, self.rows.stop, BLOCK_ROWS)
        return [(self.split, range(start, min(start + BLOCK_ROWS, self.rows.stop))) for start in starts]


class CopyWriter(ShardFolder):
    """A folder of smaller images: `data/SPLIT-00000-of-00002.parquet` and a record."""

    record_name, kind = RECORD, "reduced copy"

    def shards(self) -> list[Shard]:
        """All of its files, split after split."""
        shards = []
        for split, about in self.settings["splits"].items():
            per_shard, num_rows = about["rows_per_shard"], about["num_rows"]
            number = count_shards(num_rows, per_shard)
            for shard in range(number):
                rows = range(shard * per_shard, min((shard + 1) * per_shard, num_rows))
                shards.append(Shard(split, rows, shard_name(split, shard, number)))
        return shards

    def path(self, shard: Shard) -> Path:
        """File of a shard."""
        return self.folder / DATA / shard.name

    def write(self, shard: Shard, schema: pa.Schema, blocks: Iterator[tuple[pa.Table, CopyFacts]]) -> None:
        """Writes a shard of the next of some blocks, those that `Shard.blocks` names."""

        def write_file(file: BinaryIO) -> None:
            left, total = len(shard.blocks()), CopyFacts()
            with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False) as writer:
                while left:
                    tables, facts = zip(*islice(blocks, min(left, BLOCKS_PER_GROUP)))
                    left, total = left - len(tables), reduce(add, facts, total)
                    writer.write_table(pa.concat_tables(tables), row_group_size=BLOCKS_PER_GROUP * BLOCK_ROWS)
                writer.add_key_value_metadata({FACTS: json.dumps(asdict(total)).encode()})

        with self.writing(self.path(shard)):
            write_atomically(self.path(shard), write_file)

    def facts(self, shards: Iterable[Shard]) -> CopyFacts:
        """What the files of some shards say of their images."""
        metadata = (pq.read_metadata(self.path(shard)).metadata[FACTS] for shard in shards)
        return reduce(add, (CopyFacts(**json.loads(text)) for text in metadata), CopyFacts())

    def finish(self) -> dict[str, Any]:
        """Completes the record when all shards are there; returns its report."""
        shards = self.shards()
        self.check_no_others(shards)
        size = sum(self.path(shard).stat().st_size for shard in shards)
        return self.complete_record({**asdict(self.facts(shards)), "bytes": size})["report"]

    def sample(self, shards: Sequence[Shard], column: str) -> Iterator[tuple[Shard, int, Any]]:
        """Some rows of some shards, spread over them: shard, row number in the split, and value of a column."""
        for number in _spread(len(shards), SAMPLED_SHARDS):
            shard, file = shards[number], pq.ParquetFile(self.path(shards[number]))
            values = file.read_row_group(0, columns=[column])[column]
            for offset in _spread(len(values), SAMPLED_ROWS):
                yield shard, shard.rows[offset], values[offset].as_py()

    def check_source(self, shards: Sequence[Shard], source: ReducedRows) -> None:
        """Compares some rows of shards with the images that they should be copies of.

        Raises:
            ValueError: If they are copies of others.
        """
        for shard, row, expected in self.sample(shards, SOURCE_HASH):
            values = source.splits[shard.split][row : row + 1]
            if SOURCE_HASH in values.column_names:
                found = values[SOURCE_HASH][0].as_py()
            else:
                found = content_hash(read_content(values[source.image_column][0].as_py()))
            if found != expected:
                raise ValueError(
                    f"{self.folder} holds a reduced copy of other images: row {row} of split {shard.split} is another file now. "
                    "Choose another folder."
                )


def _spread(length: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, length - 1, count).astype(np.int64)).tolist() if length else []


def rows_digest(rows: datasets.Dataset, source: ReducedRows) -> str:
    """SHA-256 of the paths of images, and of all columns of plain values, such as classes and keys; all rows in their stored order."""
    digest, table = hashlib.sha256(repr(rows.features).encode()), rows.data
    columns = [
        table.column(name) for name in table.column_names if not pa.types.is_nested(table.schema.field(name).type)
    ]
    # only the paths are read, not the images next to them
    paths = pc.struct_field(table.column(source.image_column), "path")
    for start in range(0, len(rows), HASHED_ROWS):
        digest.update(
            repr([source.stored_path(path) for path in paths.slice(start, HASHED_ROWS).to_pylist()]).encode()
        )
        for column in columns:
            digest.update(repr(column.slice(start, HASHED_ROWS).to_pylist()).encode())
    return digest.hexdigest()
