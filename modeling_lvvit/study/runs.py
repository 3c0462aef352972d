"""The runs of a study: each is a process of `train_tl.py` that is started, continued, or finished already."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from ..cli.parser import parse
from ..data.files.atomic_files import write_json
from ..launching import LAUNCHER_VARIABLE
from ..training.checkpoints.whole import last_whole_checkpoint
from .arms import Arm


PROGRAM = Path(find_spec("train_tl").origin)  # a module next to the package, wherever that is
LOG, RECORD = "log.txt", "study_run.json"
LINES_OF_ERROR = 12
MAX_NAMED = 3  # options that a message names
# options that say where a run lies or how it goes on, not what it is
PLACES = ("output_dir", "run_name", "logging_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm")


class RunError(RuntimeError):
    """A run that failed; says which, and the end of its log."""


@dataclass(frozen=True)
class Run:
    """One training of a study, in `folder`; `options` are recipes and options of `train_tl.py` that all arms share."""

    arm: Arm
    seed: int
    folder: Path
    options: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """Of `train_tl.py`, without those that say where the run goes on."""
        return [*self.options, *self.arm.options, "--seed", str(self.seed), "--output_dir", str(self.folder)]

    @cached_property
    def settings(self) -> dict[str, str]:
        """Every option with its value, recipes resolved; a `ValueError` if one is unknown or does not fit a study."""
        parsed = parse(self.arguments)
        options = {field.name: str(getattr(part, field.name)) for part in parsed for field in dataclasses.fields(part)}
        if options["push_to_hub"] == "True" or options["resume_from_checkpoint"] != "None":
            raise ValueError("A recipe sets push_to_hub or resume_from_checkpoint, which a study sets for each run.")
        if options["label_crop"] == "authors" and options["annotator"] != "None":
            raise ValueError(
                f"Arm {self.arm.name}: an annotator labels the crops themselves, so that label_crop changes nothing. Leave the arm out."
            )
        return {name: value for name, value in options.items() if name not in PLACES}

    def read_record(self) -> dict[str, object]:
        """The record of the run: `settings`, `is_finished` and `seconds` of its processes; empty where it has not begun.

        Raises:
            ValueError: If another run, with other options, is in its folder.
        """
        file = self.folder / RECORD
        if not file.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} holds something that is no run of a study. Choose another `output_dir`."
                )
            return {}
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            before, now = record["settings"], self.settings
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}). Delete its folder, and the run is made again."
            ) from error
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            about = "; ".join(f"{name} {before.get(name)}, now {now[name]}" for name in differing[:MAX_NAMED])
            raise ValueError(
                f"{self.folder} holds a run with other options ({about}). Choose another `output_dir`, or delete that folder."
            )
        return record

    def is_finished(self) -> bool:
        """Whether it ended as it should; see `read_record`."""
        return bool(self.read_record().get("is_finished"))


class Runner:
    """Trains what is not finished yet with `launcher`, `jobs` processes at a time, each with so many `threads` of PyTorch (default: their
    own choice)."""

    def __init__(self, jobs: int, threads: int | None = None, launcher: Sequence[str] = (sys.executable,)):
        self.jobs, self.threads, self.launcher = jobs, threads, launcher
        self._processes: list[subprocess.Popen] = []
        self._lock, self._is_stopping = threading.Lock(), False
        self._failure: RunError | None = None  # the first one; those next to it end because of it

    def run_all(self, runs: Sequence[Run]) -> Iterator[Run]:
        """Yields each run when it is finished, those first that were before.

        Raises:
            RunError: If one fails; those next to it are ended, as they are when this is interrupted.
        """
        waiting = [run for run in runs if not run.is_finished()]
        yield from (run for run in runs if run not in waiting)
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._train, run): run for run in waiting}
            try:
                while futures:
                    done, _ = wait(futures, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        yield futures.pop(future)
            except BaseException:
                self._stop()
                raise

    def _stop(self) -> None:
        with self._lock:
            self._is_stopping = True
            for process in self._processes:
                process.terminate()

    def _train(self, run: Run) -> None:
        record = run.read_record() or {"settings": run.settings, "seconds": 0.0}
        command = [*self.launcher, str(PROGRAM), *run.arguments, *_continuation(run), "--disable_tqdm", "true"]
        variables = {LAUNCHER_VARIABLE: str(os.getpid())}  # it ends with the study
        if self.threads is not None:
            variables["OMP_NUM_THREADS"] = str(self.threads)
        start = time.monotonic()
        with self._lock:
            if self._is_stopping:
                return
            write_json(run.folder / RECORD, record | {"is_finished": False})
            with (run.folder / LOG).open("a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **variables}
                )
            self._processes.append(process)
        status = process.wait()
        record["seconds"] += time.monotonic() - start
        write_json(run.folder / RECORD, record | {"is_finished": status == 0})
        if status != 0:
            end = (run.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_ERROR:]
            text = f"arm {run.arm.name}, seed {run.seed} ended with status {status}; {run.folder / LOG} ends with:\n"
            with self._lock:
                self._failure = self._failure or RunError(text + "\n".join(end))
            self._stop()  # at once, so that this thread does not begin the next one
            raise self._failure


def _continuation(run: Run) -> list[str]:
    """Options that let a run go on from its last whole checkpoint, or begin again where there is none."""
    if last_whole_checkpoint(run.folder) is not None:
        return ["--resume_from_checkpoint", "last"]
    return ["--overwrite_output_dir", "true"]
