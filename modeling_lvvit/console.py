"""What programs say while they work: a bar on a terminal, plain lines elsewhere, and a last word when they are interrupted, the disk is
full, or the system has ended a worker process."""

import errno
import functools
import importlib
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from safetensors import SafetensorError
from torch.multiprocessing import reductions
from tqdm.asyncio import tqdm as console_tqdm
from tqdm.auto import tqdm
from transformers.utils import logging

from .launching import end_launcher_at_interrupt, end_with_launcher, hear_interrupts, is_main_process, stop_launcher


SECONDS_BETWEEN_LINES = 30
INTERRUPTED = 128 + signal.SIGINT  # the status that shells give to a program that Ctrl-C ended
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# what writing raises: of libraries that do not write through Python
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
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


def is_terminal() -> bool:
    """Whether output and errors both go to a terminal: then a bar can stand below lines."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def is_notebook() -> bool:
    """Whether bars are widgets of a notebook."""
    return tqdm is not console_tqdm


class MonotonicClock:
    """The clock of a `tqdm`, which cannot be set: with that of the library a bar stands still after the system's was set back."""

    _time = property(lambda self: time.monotonic, lambda self, value: None)


class MonotonicBar(MonotonicClock, tqdm):
    """A bar on a terminal, or in a notebook."""


class ProgressLines(MonotonicClock, console_tqdm):
    """A `tqdm` without carriage returns: a line every half minute, and one at the end."""

    def __init__(self, *args: Any, **kwargs: Any):
        fixed = {"mininterval": SECONDS_BETWEEN_LINES, "delay": SECONDS_BETWEEN_LINES, "miniters": 1, "leave": False}
        super().__init__(*args, **kwargs | fixed)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes a line; an empty message, with which a bar is wiped out, is none."""
        if msg != "":
            self.fp.write(f"{self.line() if msg is None else msg}\n")
            self.fp.flush()
        return False

    def line(self) -> str:
        """The state in words, for example "Annotating: 300 of 1,000 images, 00:30 so far, 01:10 left"."""
        facts = self.format_dict
        number = f"{facts['n']:,}" + (f" of {facts['total']:,}" if facts["total"] else "")
        parts = [f"{number} {facts['unit']}{'es' if facts['unit'].endswith('ch') else 's'}"]
        parts.append(f"{self.format_interval(facts['elapsed'])} so far")
        if facts["total"] and 0 < facts["n"] < facts["total"]:
            left = facts["elapsed"] / (facts["n"] - facts["initial"] or 1) * (facts["total"] - facts["n"])
            parts.append(f"{self.format_interval(left)} left")
        return f"{facts['prefix'] or 'Progress'}: {', '.join(filter(None, [*parts, facts['postfix']]))}"

    def close(self) -> None:
        """Writes the last line."""
        if not getattr(self, "disable", True):
            self.display()
        super().close()


def progress_bar(*args: Any, **kwargs: Any) -> tqdm:
    """A `tqdm` with its arguments: a bar on a terminal and in a notebook, plain lines elsewhere, so that log files can be read."""
    return (MonotonicBar if sys.stderr.isatty() or is_notebook() else ProgressLines)(*args, **kwargs)


def quiet_libraries() -> None:
    """Switches off the bars of libraries that say nothing to a user: of reading and writing weights, and all of them where there is
    no terminal. Downloads keep theirs, which know themselves whether there is one."""
    logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # the line above has switched them off too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def program(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates the `main` of a program: Ctrl-C ends it with one line and status 130, also below `accelerate launch`, and it ends with
    the process that waits for it, see `end_with_launcher`.

    Args:
        name: What its messages start with.
    """

    def decorate(main: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(main)
        def run(*arguments: Any) -> None:
            hear_interrupts()
            end_with_launcher()
            end_launcher_at_interrupt()
            quiet_libraries()
            try:
                main(*arguments)
            except KeyboardInterrupt:
                end_interrupted(f"{name}: interrupted")

        return run

    return decorate


def require(extra: str, *packages: str) -> None:
    """Raises an `ImportError` that says what to install if a package of an extra of this one is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f'{error}. Install what is missing: pip install "modeling-lvvit[{extra}]"') from error


def end_interrupted(message: str) -> None:
    """Ends the program after Ctrl-C: a line of the main process, status 130, and nothing from its launcher."""
    if is_main_process():
        print(f"\n{message}" if sys.stderr.isatty() else message, file=sys.stderr, flush=True)
    stop_launcher()
    sys.exit(INTERRUPTED)


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
