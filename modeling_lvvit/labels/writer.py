"""Writing a label set: shards that many processes write, a record of how they were made, a card; stopped and continued.

    FOLDER/token_labels.json           settings, versions, and in the end a report
    FOLDER/data/train-00000.parquet    rows 0 to rows_per_shard - 1, and so on
    FOLDER/README.md                   card, written last (`label_set_publishing`)

A shard depends on the settings and its rows alone, not on who writes it or when. Whatever was finished when a run was
killed is kept, and the result is the same, byte for byte, as that of a run that was not.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from transformers.utils import logging

from ..data.atomic_files import write_atomically, write_json
from ..data.image_keys import MAX_NAMED, repeated_keys
from .storage import KEY_COLUMN, NOTE_COLUMN, OUTSIDE_COLUMN, PALETTE_COLUMN, LabelSetLayout, write_shard


logger = logging.get_logger(__name__)
RECORD, DATA, LOCK = "token_labels.json", "data", ".lock"
FORMAT = 2  # packed maps; an unfinished set of another format is not continued, its shards would differ


def default_rows_per_shard(num_rows: int) -> int:
    """Between 64 and 4096, about 64 shards: small sets are shared by processes and lose little when they are killed."""
    return min(4096, max(64, -(-num_rows // 64)))


class LabelSetWriter:
    """Shards of one split in a folder.

    Args:
        layout: What the rows share.
        settings: Whatever the content of the shards depends on, JSON values. A run that continues must have the same.
        versions: Versions of the libraries, kept for the record.
        rows_per_shard: Rows of every shard but the last.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        layout: LabelSetLayout,
        settings: dict[str, Any],
        versions: dict[str, str],
        rows_per_shard: int,
    ):
        self.folder, self.split, self.layout = folder, split, layout
        self.versions, self.rows_per_shard = versions, rows_per_shard
        stored = {"split": split, "k": layout.k, "map_size": list(layout.map_size), "score_type": layout.score_type}
        stored |= {"rows_per_shard": rows_per_shard, "num_classes": len(layout.class_names), "format": FORMAT}
        self.settings = {**settings, **stored}
        self.record = folder / RECORD
        self._lock: FileLock | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The lock stays with the process that took it."""
        return {**self.__dict__, "_lock": None}

    def begin(self) -> None:
        """Makes the folder, or finds out that it holds an unfinished run of the same settings; in one process only.

        Raises:
            ValueError: If the folder holds something else.
            OSError: If nothing can be written there.
        """
        data = self.folder / DATA
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a label set is a folder.")
        if self.record.is_file():
            self._check_same_settings()
        elif self.folder.is_dir() and any(not self._may_precede_record(path) for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files. Choose an empty or new folder.")
        data.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"Another run is writing to {self.folder}. Wait for its end, or stop it.") from error
        for partial in [*data.glob(".*.partial"), *self.folder.glob(".*.partial")]:  # of a run that was killed
            partial.unlink()
        if not self.record.is_file():
            write_json(self.record, {"settings": self.settings, "versions": self.versions})
        else:  # a full disk or a read-only folder should show now, not after an hour
            write_atomically(data / ".probe", lambda file: file.write(b"."))
            (data / ".probe").unlink()

    def release(self) -> None:
        """Lets other runs write to the folder."""
        if self._lock is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.release()

    def _may_precede_record(self, path: Path) -> bool:
        """Whether a file may come from a run that was killed before it had written its record."""
        if path.name == DATA:
            return path.is_dir() and not any(path.iterdir())
        return path.name == LOCK or path.match(f".{RECORD}.*.partial")

    def _check_same_settings(self) -> None:
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            settings, versions = record["settings"], record["versions"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record} is damaged ({error!r}). Remove {self.folder} and start again.") from error
        now = json.loads(json.dumps(self.settings))
        differing = [
            f"{name}: {settings.get(name)!r} there, {now.get(name)!r} now"
            for name in sorted({*settings, *now})
            if settings.get(name) != now.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.folder} holds a label set with other settings. Continue with the same ones, or choose another "
                "folder.\n  " + "\n  ".join(differing)
            )
        if versions != self.versions:
            logger.warning("%s was begun with %s; now %s. Results may differ.", self.folder, versions, self.versions)

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / DATA / f"{self.split}-{shard:05d}.parquet"

    def is_written(self, shard: int) -> bool:
        """Whether a shard is there and can be read; a damaged one is removed, to be made again."""
        path = self.path(shard)
        if not path.is_file():
            return False
        try:
            return pq.read_metadata(path).num_rows > 0
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s is damaged (%s) and is made again.", path, error)
            path.unlink(missing_ok=True)
            return False

    def write(self, shard: int, table: pa.Table) -> None:
        """Writes a shard; raises an `OSError` that says what to do if it cannot be written."""
        try:
            write_shard(self.path(shard), table)
        except OSError as error:
            raise OSError(
                f"{self.path(shard)} cannot be written: {error.strerror or error}. The shards that are finished are kept; "
                "make room and start the same command again."
            ) from error

    def finish(self, num_shards: int) -> dict[str, Any]:
        """Looks over all shards and completes the record; in one process, when all are there.

        Raises:
            ValueError: If an image key comes more than once.
        """
        for extra in set((self.folder / DATA).glob("*.parquet")) - {self.path(shard) for shard in range(num_shards)}:
            raise ValueError(f"{extra} does not belong to this label set of {num_shards} shards.")
        record = {"settings": self.settings, "versions": self.versions, "report": self._report(num_shards)}
        write_json(self.record, record)
        return record

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


def package_versions(*modules: Any) -> dict[str, str]:
    """Versions of modules, and of the libraries on which the bytes of a shard depend."""
    return {module.__name__: module.__version__ for module in (*modules, datasets, np, pa)}
