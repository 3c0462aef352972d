"""Writing a label set: a `ShardFolder` of one split, and a card.

FOLDER/token_labels.json           settings, versions, and in the end a report
FOLDER/data/train-00000.parquet    rows 0 to rows_per_shard - 1, and so on
FOLDER/README.md                   card, written last (`publishing`)
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..data.files.shard_folder import DATA, ShardFolder
from ..data.image_keys import MAX_NAMED, repeated_keys
from .storage import KEY_COLUMN, NOTE_COLUMN, OUTSIDE_COLUMN, PALETTE_COLUMN, LabelSetLayout, write_shard


RECORD = "token_labels.json"
FORMAT = 2  # packed maps; an unfinished set of another format is not continued, its shards would differ


class LabelSetWriter(ShardFolder):
    """Shards of one split in a folder.

    Args:
        layout: What the rows share.
        settings: Whatever the content of the shards depends on, JSON values. A run that continues must have the same.
        versions: Versions of the libraries, kept for the record.
        rows_per_shard: Rows of every shard but the last.
    """

    record_name, kind = RECORD, "label set"

    def __init__(
        self,
        folder: Path,
        split: str,
        layout: LabelSetLayout,
        settings: dict[str, Any],
        versions: dict[str, str],
        rows_per_shard: int,
    ):
        stored = {"split": split, "k": layout.k, "map_size": list(layout.map_size), "score_type": layout.score_type}
        stored |= {"rows_per_shard": rows_per_shard, "num_classes": len(layout.class_names), "format": FORMAT}
        super().__init__(folder, {**settings, **stored}, versions)
        self.split, self.layout, self.rows_per_shard = split, layout, rows_per_shard

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / DATA / f"{self.split}-{shard:05d}.parquet"

    def write(self, shard: int, table: pa.Table) -> None:
        """Writes a shard; raises an `OSError` that says what to do if it cannot be written."""
        with self.writing(self.path(shard)):
            write_shard(self.path(shard), table)

    def finish(self, num_shards: int) -> dict[str, Any]:
        """Looks over all shards and completes the record; in one process, when all are there.

        Raises:
            ValueError: If an image key comes more than once.
        """
        self.check_no_others(range(num_shards))
        return self.complete_record(self._report(num_shards))

    def repeated_keys(self, keys: pa.ChunkedArray) -> list[str]:
        """The first of the keys of all rows that come more than once and may not."""
        return repeated_keys(keys)

    def _report(self, num_shards: int) -> dict[str, Any]:
        counts, examples = Counter(), defaultdict(list)
        all_keys, num_empty, outside, size = [], 0, [], 0
        for shard in range(num_shards):
            path = self.path(shard)
            table = pq.read_table(path, columns=[KEY_COLUMN, NOTE_COLUMN, OUTSIDE_COLUMN, PALETTE_COLUMN])
            size += path.stat().st_size
            all_keys += table[KEY_COLUMN].chunks
            num_empty += int((np.asarray(table[PALETTE_COLUMN].combine_chunks().value_lengths()) == 0).sum())
            outside.append(table[OUTSIDE_COLUMN].drop_null().to_numpy())
            for key, notes in zip(table[KEY_COLUMN].to_pylist(), table[NOTE_COLUMN].to_pylist()):
                for note in filter(None, (notes or "").split("; ")):
                    counts[note] += 1
                    if len(examples[note]) < MAX_NAMED:
                        examples[note].append(key)
        all_keys = pa.chunked_array(all_keys, pa.string())
        if duplicates := self.repeated_keys(all_keys):
            raise ValueError(
                f"Several images have the same key: {', '.join(map(repr, duplicates))}. Take keys from a column "
                "(`key_column`) or number the rows (`number_rows`), in another folder."
            )
        outside = np.concatenate(outside)
        return {
            "num_images": len(all_keys),
            "num_empty_labels": num_empty,
            "bytes_per_image": round(size / max(1, len(all_keys)), 1),
            "mean_outside_mass": round(float(outside.mean(dtype=np.float64)), 5) if len(outside) else None,
            "notes": {note: {"count": counts[note], "first": examples[note]} for note in sorted(counts)},
        }
