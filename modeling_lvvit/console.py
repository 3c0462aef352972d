"""What programs say while they work: a bar on a terminal, plain lines elsewhere, and a last word when they are interrupted."""

import functools
import importlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import datasets
import huggingface_hub
from tqdm.asyncio import tqdm as console_tqdm
from tqdm.auto import tqdm
from transformers.utils import logging

from .launching import end_imports, end_launcher_at_interrupt, end_with_launcher, is_main_process, stop_launcher


SECONDS_BETWEEN_LINES = 30
INTERRUPTED = 128 + signal.SIGINT  # the status that shells give to a program that Ctrl-C ended


def is_terminal() -> bool:
    """Whether output and errors both go to a terminal: then a bar can stand below lines."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def is_notebook() -> bool:
    """Whether bars are widgets of a notebook."""
    return tqdm is not console_tqdm


class ProgressLines(console_tqdm):
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
    return (tqdm if sys.stderr.isatty() or is_notebook() else ProgressLines)(*args, **kwargs)


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
            end_imports()
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
