"""What ends a program though its input is right: a disk that is full, and worker processes that the system has ended."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# what writing raises: of libraries that do not write through Python
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
OF_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter")
OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")
WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly)"
)
SHARED_MEMORY = re.compile(r"shared memory|shm|</torch_\w+>")
NO_SPACE = os.strerror(errno.ENOSPC)
MORE_SHARED_MEMORY = (
    "use fewer (`num_workers`), or give it more: a container gets more by docker run --shm-size 8g, or --ipc host"
)


class WriteError(OSError):
    """A file cannot be written; the message names it and says why."""


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Around the writing of a file or folder: what says that the disk is the reason becomes a `WriteError` that names it."""
    try:
        yield
    except WRITE_ERRORS as error:
        reason = _disk_reason(error)
        if reason is None or isinstance(error, WriteError):
            raise
        raise WriteError(f"{path} cannot be written: {reason}") from error


def describe_failure(error: BaseException) -> str | None:
    """What happened and what helps, in the words of a user and without a full stop; `None` if the error is none of these failures."""
    if isinstance(error, WriteError):
        return str(error)
    if (text := _describe_worker(error)) is not None:
        return text
    reason = _disk_reason(error)
    if reason is None:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None) or "A file"
    return f"{name} cannot be written: {reason}"


def _disk_reason(error: BaseException) -> str | None:
    """Why the disk did not take a file, in words; `None` if an error says nothing of that."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in DISK_ERRORS else None
    if isinstance(error, SafetensorError):
        number = OF_SAFETENSORS.search(str(error))
        return os.strerror(int(number[1])) if number is not None and int(number[1]) in DISK_ERRORS else None
    if isinstance(error, RuntimeError) and OF_TORCH_WRITER.search(str(error)):
        return "PyTorch could not write all of it; most likely the disk is full"
    return None


def _describe_worker(error: BaseException) -> str | None:
    text = str(error)
    if not isinstance(error, RuntimeError):
        return None
    if NO_SPACE in text and SHARED_MEMORY.search(text):
        return f"The shared memory through which worker processes hand over images is full: {MORE_SHARED_MEMORY}"
    found = WORKER.search(text)
    if found is None:
        return None
    worker, name = f"The data loader's worker (pid {found[1].strip()})", (found[2] or "").strip()
    if name == "Bus error":
        return f"{worker} was ended by a bus error; most likely the shared memory is full: {MORE_SHARED_MEMORY}"
    if name == "Killed":
        return (
            f"{worker} was killed, most likely because the machine or the container ran out of memory: use fewer (`num_workers`), or "
            "let them load less ahead"
        )
    return f"{worker} ended unexpectedly{f' ({name})' if name else ''}: with `num_workers` 0 the reason shows"
