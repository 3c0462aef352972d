"""A full disk, and worker processes that the system has ended: what happened, in words, and what helps."""

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from torch.multiprocessing import reductions


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# what writing raises: of libraries that do not write through Python
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
FAILURES = (*WRITE_ERRORS, EOFError)  # what `describe_failure` may know: EOFError where a worker ended
OF_TORCH_WRITER = re.compile(r"inline_container|PytorchStreamWriter|iostream error")
OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")
WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly)"
)
SHARED_MEMORY = re.compile(r"shared memory|shm|</torch_\w+>")
NO_SPACE = os.strerror(errno.ENOSPC)
MORE_SHARED_MEMORY = (
    "use fewer (`num_workers`), or give it more: a container gets more by docker run --shm-size 8g, or --ipc host"
)
ENDED = "ended unexpectedly, most likely because memory or shared memory ran out: use fewer (`num_workers`); with 0 another reason would show"


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


def _is_lost_tensor(error: BaseException) -> bool:
    """Whether a batch was asked of a worker that is gone: tensors are handed over by open files, which it keeps until they are taken."""
    if not isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == reductions.__file__ for frame, _ in frames)


def _describe_worker(error: BaseException) -> str | None:
    text = str(error)
    if _is_lost_tensor(error):
        return f"A worker of the data loader {ENDED}"
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
    return f"{worker} {ENDED}"


def ignore_ended_workers() -> None:
    """Has PyTorch raise nothing more when workers end, as the others do now: it would, in the middle of what comes last."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def tell_uncaught_failures(message: Callable[[str], str]) -> None:
    """Has the interpreter tell in words also the failures that no `except` of a program could take.

    PyTorch says that a worker has ended from the handler of a signal. That may raise between any two steps of Python, and so also while an
    earlier error is on its way out of a `with` block, or within the `except` that has just taken it.

    Args:
        message: From what happened to what is printed; exit code 1 follows.
    """

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failure = describe_failure(error)
        if failure is None:
            sys.__excepthook__(kind, error, trace)
        else:
            print(message(failure), file=sys.stderr)

    sys.excepthook = tell
