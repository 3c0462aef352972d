"""Folders of Parquet shards that a program writes one after another, with a record of how they were made; stopped and continued.

    FOLDER/RECORD                     settings, versions, and in the end a report
    FOLDER/data/NAME.parquet          shards
    FOLDER/data/.SHA256SUMS.*         digests of the shards that are written, a list of each process
    FOLDER/SHA256SUMS                 in the end, digests of all

A shard depends on the settings and its rows alone, not on who writes it or when. Whatever was finished when a run was killed is kept, and
the result is the same, byte for byte, as that of a run that was not. What was damaged since is found by its digest, and made again.
"""

import json
import uuid
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from ..failures import WriteError
from .atomic_files import write_atomically, write_json
from .digests import DIGESTS, digest_line, file_digest, parse_digests, read_digests, write_digests
from .folder_lock import FolderLock, is_lock


logger = logging.get_logger(__name__)
DATA = "data"


def default_rows_per_shard(num_rows: int) -> int:
    """Between 64 and 4096, about 64 shards: small sets are shared by processes and lose little when they are killed."""
    return min(4096, max(64, -(-num_rows // 64)))


def package_versions(*modules: Any) -> dict[str, str]:
    """Versions of modules, and of the libraries on which the bytes of a shard depend."""
    return {module.__name__: module.__version__ for module in (*modules, datasets, np, pa)}


class ShardFolder:
    """Shards in a folder. A subclass says what the record is called (`record_name`), what messages call the whole (`kind`), and where a
    shard is (`path`).

    Args:
        settings: Whatever the content of the shards depends on, JSON values. A run that continues must have the same.
        versions: Versions of the libraries, kept for the record.
    """

    record_name: ClassVar[str]
    kind: ClassVar[str]

    def __init__(self, folder: Path, settings: dict[str, Any], versions: dict[str, str]):
        self.folder, self.settings, self.versions = folder, settings, versions
        self.record = folder / self.record_name
        self._lock: FolderLock | None = None
        self._list: Path | None = None  # of digests of what this process has written

    def __getstate__(self) -> dict[str, Any]:
        """The lock stays with the process that took it."""
        return {**self.__dict__, "_lock": None, "_list": None}

    def begin(self) -> None:
        """Makes the folder, or finds out that it holds an unfinished run of the same settings; in one process only.

        Raises:
            ValueError: If the folder holds something else, or another run writes to it.
            OSError: If nothing can be written there.
        """
        data = self.folder / DATA
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a {self.kind} is a folder.")
        if self.record.is_file():
            self._check_same_settings()
        elif self.folder.is_dir() and any(not self._may_precede_record(path) for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other files. Choose an empty or new folder.")
        data.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.folder, parts=(DATA,))
        lock.acquire()
        self._lock = lock
        if not self.record.is_file():
            write_json(self.record, {"settings": self.settings, "versions": self.versions})
        else:  # a full disk or a read-only folder should show now, not after an hour
            write_atomically(data / ".probe", lambda file: file.write(b"."))
            (data / ".probe").unlink()
        if not self._digests():  # of before there were any
            for path in filter(self._is_readable, sorted(data.glob("*.parquet"))):
                self._note_digest(path)

    def release(self) -> None:
        """Lets other runs write to the folder."""
        if self._lock is not None:
            self._lock.release()

    def _may_precede_record(self, path: Path) -> bool:
        """Whether a file may come from a run that was killed before it had written its record."""
        if path.name == DATA:
            return path.is_dir() and not any(path.iterdir())
        return is_lock(path) or path.match(f".{self.record_name}.*.partial")

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
                f"{self.folder} holds a {self.kind} with other settings, as {self.record.name} there says. Continue with the same "
                "ones, or choose another folder.\n  " + "\n  ".join(differing)
            )
        if versions != self.versions:
            logger.warning("%s was begun with %s; now %s. Results may differ.", self.folder, versions, self.versions)

    def path(self, shard: Hashable) -> Path:
        """File of a shard."""
        raise NotImplementedError

    def is_written(self, shard: Hashable) -> bool:
        """Whether a shard is there and can be read; a damaged one is removed, to be made again."""
        path = self.path(shard)
        if not path.is_file():
            return False
        digest = self._digests().get(self._name(path))
        if digest is not None and digest == file_digest(path):
            return True
        what = "was not noted before the run ended" if digest is None else "is damaged"
        logger.warning("%s %s and is made again.", path, what)
        path.unlink(missing_ok=True)
        return False

    def _is_readable(self, path: Path) -> bool:
        try:
            return pq.read_metadata(path).num_rows > 0
        except (pa.ArrowException, OSError) as error:
            logger.warning("%s is damaged (%s) and is made again.", path, error)
            path.unlink(missing_ok=True)
            return False

    def _name(self, path: Path) -> str:
        return f"{DATA}/{path.name}"

    def _digests(self) -> dict[str, str]:
        """Of all shards that were written, by their path in the folder."""
        digests = read_digests(self.folder) or {}
        for path in sorted((self.folder / DATA).glob(f".{DIGESTS}.*")):
            digests |= parse_digests(path.read_text(encoding="utf-8"))
        return digests

    def _note_digest(self, path: Path) -> None:
        if self._list is None:
            self._list = path.parent / f".{DIGESTS}.{uuid.uuid4().hex[:12]}"
        with self._list.open("a", encoding="utf-8") as file:
            file.write(digest_line(self._name(path), file_digest(path)))

    @contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Around the writing of a shard, whose digest is noted then; an `OSError` says what to do."""
        try:
            yield
            self._note_digest(path)
        except OSError as error:
            what = error if isinstance(error, WriteError) else f"{path} cannot be written: {error.strerror or error}"
            raise OSError(
                f"{what}. The shards that are finished are kept; make room and start the same command again."
            ) from error

    def check_no_others(self, shards: Iterable[Hashable]) -> None:
        """Raises a `ValueError` if there are shards besides those that belong there."""
        expected = {self.path(shard) for shard in shards}
        for extra in set((self.folder / DATA).glob("*.parquet")) - expected:
            raise ValueError(f"{extra} does not belong to this {self.kind} of {len(expected)} shards.")

    def complete_record(self, report: dict[str, Any]) -> dict[str, Any]:
        """Writes the digests of all shards, and the record with a report; returns it."""
        names = {self._name(path) for path in (self.folder / DATA).glob("*.parquet")}
        write_digests(self.folder, {name: digest for name, digest in self._digests().items() if name in names})
        for path in (self.folder / DATA).glob(f".{DIGESTS}.*"):
            path.unlink()
        self._list = None
        record = {"settings": self.settings, "versions": self.versions, "report": report}
        write_json(self.record, record)
        return record
