"""The runs of a study: each an own process of `train_tl.py`, begun, continued or found finished."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..token_labeling.whole_files import write_json
from .arms import Arm


PROGRAM = Path(__file__).parents[2] / "train_tl.py"
LOG, DONE = "log.txt", "study_run.json"
LINES_OF_ERROR = 12
PATCH_LOSS = "token_loss"  # of the Trainer's log


class RunError(RuntimeError):
    """A run that failed; says which, and the end of its log."""


@dataclass(frozen=True)
class Run:
    """One training of a study.

    Args:
        arm: How it trains.
        seed: Of weights, order and augmentation.
        folder: Where `train_tl.py` writes.
        options: What all arms share: recipes and options of `train_tl.py`.
    """

    arm: Arm
    seed: int
    folder: Path
    options: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        """What stands behind `train_tl.py`, without what says where the run goes on."""
        return [*self.options, *self.arm.options, "--seed", str(self.seed), "--output_dir", str(self.folder)]

    @property
    def record(self) -> dict[str, object]:
        """What the finished run is known by."""
        return {"options": [*self.options, *self.arm.options], "seed": self.seed}

    def is_finished(self) -> bool:
        """Whether it ended as it should.

        Raises:
            ValueError: If another run, with other options, stands in its folder.
        """
        file = self.folder / DONE
        if not file.is_file():
            return False
        found = json.loads(file.read_text(encoding="utf-8"))
        if found != self.record:
            raise ValueError(
                f"{self.folder} holds a run with {shlex.join(found['options'])}, wanted: {shlex.join(self.record['options'])}. "
                "Choose another --output_dir, or delete that folder."
            )
        return True

    def state(self) -> dict[str, object]:
        """`trainer_state.json` of the finished run."""
        return json.loads((self.folder / "trainer_state.json").read_text(encoding="utf-8"))


def run_all(
    runs: Sequence[Run], jobs: int, threads: int | None = None, launcher: Sequence[str] = (sys.executable,)
) -> Iterator[Run]:
    """Trains what is not finished yet, several at a time.

    Args:
        runs: In the order in which they are begun.
        jobs: Processes at a time.
        threads: Of PyTorch in each of them; default: their own choice.
        launcher: What stands before `train_tl.py` on the command line.

    Yields:
        Each run when it is finished, in the order in which they are.

    Raises:
        RunError: If one fails; those beside it are ended.
    """
    processes: dict[Run, subprocess.Popen] = {}
    waiting = [run for run in runs if not run.is_finished()]
    yield from (run for run in runs if run not in waiting)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_train, run, threads, launcher, processes): run for run in waiting}
        try:
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield futures.pop(future)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes.values():
                process.terminate()
            raise


def _train(run: Run, threads: int | None, launcher: Sequence[str], processes: dict[Run, subprocess.Popen]) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [*launcher, str(PROGRAM), *run.arguments, *_continuation(run), "--disable_tqdm", "true"]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    with (run.folder / LOG).open("w", encoding="utf-8") as log:
        processes[run] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        status = processes[run].wait()
    if status != 0:
        end = (run.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_ERROR:]
        raise RunError(
            f"arm {run.arm.name}, seed {run.seed} ended with status {status}; {run.folder / LOG} ends with:\n"
            + "\n".join(end)
        )
    if run.arm.needs_token_labels and not any(PATCH_LOSS in entry for entry in run.state()["log_history"]):
        raise RunError(f"arm {run.arm.name} trained with plain labels: the data has no dense labels.")
    write_json(run.folder / DONE, run.record)


def _continuation(run: Run) -> list[str]:
    """Options that let a run go on from its last checkpoint, or begin anew where there is none."""
    if any(run.folder.glob("checkpoint-*/trainer_state.json")):
        return ["--resume_from_checkpoint", "last"]
    return ["--overwrite_output_dir", "true"]
