"""Files that are whole or not there: written beside their place, and moved there when all of them is on the disk."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with an open binary file and puts it in place of `path` once it is on the disk."""
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
