"""Files and folders that are whole or not there: written next to their place, and moved there when all of them is on the disk."""

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from ..failures import naming_file
from .folder_lock import LOCK, FolderLock


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with an open binary file and puts it in place of `path` once it is on the disk."""
    with naming_file(path):
        _write_atomically(path, write)


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, record: Any) -> None:
    """Writes a record as indented JSON; its folder is made where it is missing."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def check_new_directory(path: Path) -> None:
    """Raises a `FileExistsError` if there is something at the place of a new folder but an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; remove it or choose another folder.")


@contextmanager
def atomic_directory(path: Path, is_shared: bool = False) -> Iterator[Path]:
    """A folder next to its place, to be filled in a `with` block. When the block ends it is moved there, after an error removed;
    one that a process which was killed was filling is removed by the next.

    Args:
        is_shared: Whether several processes may fill one for the same place, of which the first to end wins.

    Raises:
        FileExistsError: If there is something but an empty folder; nothing in it is touched.
        ValueError: If another process fills one for the same place.
    """
    check_new_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if is_shared else FolderLock(path, path.parent / f".{path.name}{LOCK}"):
        if not is_shared:  # else others may be filling theirs
            for left in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}.partial"):
                shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        try:
            with naming_file(path):
                yield partial
            partial.chmod(0o755)
            if path.exists():
                path.rmdir()
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
