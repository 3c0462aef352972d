"""Saving that fails in one process ends all of them, with one message, and takes nothing away that was whole."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate.utils import gather_object
from torch import distributed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...data.failures import WriteError, naming_file


SECONDS_APART = 2.0  # of the times of checkpoints; what is less than a second the library does not go by


class SaveError(WriteError):
    """What a run saves cannot be written; raised in all processes."""


class Saving:
    """Remembers what could not be written until all processes have come to where they wait for each other: if one left before, the others
    would wait for it."""

    def __init__(self):
        self._failure: str | None = None

    @contextmanager
    def noting(self, path: str | Path) -> Iterator[None]:
        """Around the writing of something in a folder: a failure is kept for `agree`."""
        try:
            with naming_file(Path(path)):
                yield
        except SaveError:
            raise
        except WriteError as error:
            self._failure = self._failure or str(error)

    def agree(self) -> None:
        """Raises a `SaveError` in all processes if one of them has noted a failure; all must call it."""
        failures = [self._failure]
        if (
            distributed.is_available() and distributed.is_initialized()
        ):  # else alone, or the others have gone before an upload
            failures = gather_object(failures)
        self._failure = None
        if failure := next(filter(None, failures), None):
            raise SaveError(failure)


def age_checkpoints(folder: Path, name: str) -> None:
    """Makes sure that the checkpoint `name`, which is written next, will be the newest by the clock, by which the library tells which ones
    `save_total_limit` deletes: after the clock was set back, it would delete the one just written. Other checkpoints of a run in `folder`
    keep their order."""
    others = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name != name]
    latest = time.time() - SECONDS_APART
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if path.stat().st_mtime > latest:
            os.utime(path, (latest, latest))
        latest = min(latest, path.stat().st_mtime) - 1e-3
