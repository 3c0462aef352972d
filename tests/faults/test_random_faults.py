"""Faults at random moments: kill -9, signals, flipped bits, cut files, full disks and other numbers of processes, while runs train, segment,
annotate and publish. Each run goes on as documented, and ends with the weights or bytes of an undisturbed one, or refuses and names the file.

    python tests/faults/test_random_faults.py                        60 faults, three to five minutes on two cores
    python tests/faults/test_random_faults.py --trials 12 --seed 5   some, of every kind, by another seed
    python tests/faults/test_random_faults.py --only 17              one of them again

A line for each tells program, fault, moment and outcome. Programs and moments follow from the seed; what a process is doing at a moment does
not. Folders and logs of what failed are kept. On Linux, where root can mount a small disk, that one is full; else files cannot grow.
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest


if __name__ in ("__main__", "__mp_main__"):
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from lives import LAUNCHER, LIMIT, PROGRAMS, Life, Machine, free_port, rank_variables
from subjects import Annotation, Classification, Publishing, Segmentation, Subject

from support.local_hub import local_hub
from support.programs import ROOT


FAULTS = ("kill -9", "SIGTERM", "SIGINT", "flipped bit", "cut file", "full disk", "processes")
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
DISK_SIZE = 32 * 2**20  # bytes
# a thread of `multiprocessing` in a worker, while the process that it hands a batch to is ended
WORKER_GONE = 'Traceback (most recent call last):\n  File "' + resource_sharer.__file__
NOTHING = "There is no whole checkpoint in"


@dataclass
class Trial:
    """A fault that befalls a program.

    Args:
        after: Parts that are made before.
        delay: Seconds after them.
    """

    number: int
    subject: Subject
    fault: str
    after: int
    delay: float
    rng: np.random.Generator

    @property
    def moment(self) -> str:
        return f"after part {self.after} of {self.subject.parts} and {self.delay:.2f} s"


class Trials:
    """Makes the undisturbed runs, and tries faults.

    Args:
        folder: For all that is written.
        disk: A small one that can be filled; `None` where there is none.
    """

    def __init__(self, folder: Path, machine: Machine, hub, disk: Path | None):
        self.folder, self.machine, self.disk = folder, machine, disk
        self.logs = itertools.count()
        data = folder / "data"
        data.mkdir()
        self.check(Life("data", [str(data)], self.next_log(folder), "build"))
        self.subjects: list[Subject] = [Classification(data), Segmentation(data), Annotation(data)]
        for subject in self.subjects:
            self.check(Life(PROGRAMS[subject.name], subject.words(subject.reference), self.next_log(folder)))
        for kind in ("model", "dataset"):
            subject = Publishing(data, hub, kind)
            subject.prepare(subject.reference)
            self.check(Life(PROGRAMS[subject.name], subject.words(subject.reference), self.next_log(folder)))
            subject.parts = subject.progress(subject.reference)
            self.subjects.append(subject)

    def next_log(self, folder: Path) -> Path:
        return folder / f"{next(self.logs):04}.log"

    def check(self, life: Life) -> None:
        """Waits for a life that must end well."""
        status = life.wait()
        assert status == 0, f"status {status}: {life.said[-2000:]}"

    def deal(self, number: int, seed: int) -> list[Trial]:
        """Faults of every kind for every program, as many of one as of another, also where there are few."""
        rng = np.random.default_rng(seed)
        pairs = [
            (subject, fault)
            for subject in self.subjects
            for fault in FAULTS
            if fault != "processes" or subject.runs_anywhere
        ]
        used, trials = Counter(), []
        for index in range(number):
            subject, fault = min(
                pairs, key=lambda pair: (used[pair], used[pair[0].name] + used[pair[1]], rng.random())
            )
            used.update([(subject, fault), subject.name, fault])
            own = np.random.default_rng([seed, index])
            is_damage = fault in ("flipped bit", "cut file")  # of the newest of at least two
            after = int(own.integers(2 if is_damage else 0, subject.parts - 1))
            delay = float(own.uniform(0, subject.pause if after else 1.5))
            trials.append(Trial(index, subject, fault, after, delay, own))
        return trials

    def start(
        self, trial: Trial, words: list[str], processes: int, folder: Path, by_launcher: bool = False
    ) -> list[Life]:
        """The processes of a run; with `by_launcher` that of `lvvit`, which starts them."""
        name, words = trial.subject.name, [*words, *trial.subject.words_free(trial.rng)]
        if by_launcher:
            command = [name, "--cpu", "--num_processes", str(processes), *words]
            return [Life(LAUNCHER, command, self.next_log(folder), "run")]
        port = free_port()
        places = [rank_variables(rank, processes, port) if processes > 1 else {} for rank in range(processes)]
        return [Life(PROGRAMS[name], words, self.next_log(folder), **place) for place in places]

    def wait_until(self, trial: Trial, lives: list[Life], output: Path, parts: int) -> None:
        end = time.monotonic() + LIMIT
        while trial.subject.progress(output) < parts and not all(life.is_over for life in lives):
            assert time.monotonic() < end, f"no part {parts} within {LIMIT} s, see {lives[0].log}"
            time.sleep(0.002)

    def continue_run(self, trial: Trial, output: Path, folder: Path, processes: int = 1) -> tuple[str, str]:
        """As documented: the command with which it goes on; where that refuses, as there is nothing to go on with, the one that begins again.
        Returns all that they said, and the outcome in words."""
        subject, said = trial.subject, ""
        words = subject.words(output, processes)
        for further, outcome in ((subject.words_again(), "continued"), (subject.words_anew(), "began again")):
            lives = self.start(trial, [*words, *further], processes, folder)
            statuses = [life.wait() for life in lives]
            said += "\n".join(life.said for life in lives)
            if not any(statuses):
                return said, outcome
            if NOTHING not in said or "Traceback" in said:
                return said, f"refused, status {statuses}"
        raise AssertionError(f"it neither goes on nor begins again: {said[-2000:]}")

    def run(self, trial: Trial, folder: Path) -> str:
        """Tries one; returns the outcome in words, or raises an `AssertionError`."""
        subject, fault = trial.subject, trial.fault
        output = (
            self.disk / folder.name if self.disk and fault == "full disk" else folder
        ) / f"trial-{trial.number:03}"
        subject.prepare(output)
        if fault in SIGNALS:
            outcome = self.stop_life(trial, output, folder, subject.words(output), trial.after)
            if trial.rng.random() < 0.5:
                parts = subject.progress(output) + int(trial.rng.integers(4))
                words = [*subject.words(output), *subject.words_again()]
                outcome += f", then {self.stop_life(trial, output, folder, words, parts)}"
        elif fault == "processes":
            return self.change_processes(trial, output, folder)
        elif fault == "full disk":
            outcome = self.fill_disk(trial, output, folder)
        elif isinstance(subject, Publishing):
            return self.publish_damaged(trial, output, folder)
        else:
            return self.damage(trial, output, folder)
        said, continued = self.continue_run(trial, output, folder)
        assert continued in ("continued", "began again"), f"{outcome}, {continued}: {said[-2000:]}"
        self.machine.check_no_orphans()
        subject.check_equal(output, is_near=False)
        return f"{outcome}; {continued}, equal"

    def stop_life(self, trial: Trial, output: Path, folder: Path, words: list[str], parts: int) -> str:
        """A life that is stopped once there are so many parts, and a little later; returns what came of it in words."""
        (life,) = self.start(trial, words, 1, folder)
        self.wait_until(trial, [life], output, parts)
        time.sleep(trial.delay)
        number, what = SIGNALS[trial.fault], ""
        if number == signal.SIGKILL:
            what = self.kill(trial, life)
        else:
            life.send(number, to_group=number == signal.SIGINT)
        status = life.wait()
        self.machine.check_no_orphans()
        expected = {0, -number, 128 + number}
        if what == "a worker" or isinstance(trial.subject, Publishing) or NOTHING in life.said:
            expected.add(1)
        if trial.fault == "SIGINT" and "Exception ignored in" in life.said:
            return "lost by Python, which was in a place where it ignores exceptions"
        said = life.said.replace(WORKER_GONE, "")
        assert status in expected and "Traceback" not in said, f"status {status} {what}: {life.said[-2000:]}"
        if status == 143:
            assert "--resume_from_checkpoint last" in life.said
        return f"{what} status {status}".strip() if status else "too late"

    def kill(self, trial: Trial, life: Life) -> str:
        """Kills the process, its group, or a process that it has started."""
        what = ("the process", "its group", "a worker")[trial.rng.integers(3)]
        workers = life.children() if what == "a worker" else []
        if workers:
            workers[trial.rng.integers(len(workers))].kill()
            return what
        what = "the process" if what == "a worker" else what
        life.send(signal.SIGKILL, to_group=what == "its group")
        return what

    def fill_disk(self, trial: Trial, output: Path, folder: Path) -> str:
        sizes = [path.stat().st_size for path in self.reference_files(trial.subject)]
        (life,) = self.start(trial, trial.subject.words(output), 1, folder)
        self.wait_until(trial, [life], output, trial.after)
        time.sleep(trial.delay)
        left = int(trial.rng.integers(0, max(sizes)))
        if self.disk is None:
            life.limit_files(left)
            status = life.wait()
        else:
            with self.filled_disk(left):
                status = life.wait()
        self.machine.check_no_orphans()
        assert status >= 0 and (self.disk is None or "Traceback" not in life.said), (
            f"status {status}: {life.said[-2000:]}"
        )
        return f"{left:,} bytes left, status {status}"

    @contextmanager
    def filled_disk(self, left: int) -> Iterator[None]:
        """Leaves so many bytes free."""
        filler = self.disk / "filler"
        with filler.open("wb") as file:
            while (free := shutil.disk_usage(self.disk).free - left) > 0:
                with suppress(OSError):  # somebody else has taken some of it
                    os.posix_fallocate(file.fileno(), filler.stat().st_size, free)
        yield
        filler.unlink()

    def reference_files(self, subject: Subject) -> list[Path]:
        folder = subject.source if isinstance(subject, Publishing) else subject.reference
        return [path for path in folder.rglob("*") if path.is_file()]

    def break_file(self, trial: Trial, files: list[Path]) -> tuple[Path, str]:
        """Flips a random bit of a random file, or cuts off a random part of it; returns what was done in words."""
        files = sorted(path for path in files if path.stat().st_size)
        path = files[trial.rng.integers(len(files))]
        content = bytearray(path.read_bytes())
        place = int(trial.rng.integers(len(content)))
        if trial.fault == "cut file":
            path.write_bytes(content[:place])
            return path, f"{path.parent.name}/{path.name} cut to {place:,} of {len(content):,} bytes"
        content[place] ^= 1 << int(trial.rng.integers(8))
        path.write_bytes(content)
        return path, f"{path.parent.name}/{path.name} changed at {place:,} of {len(content):,} bytes"

    def damage(self, trial: Trial, output: Path, folder: Path) -> str:
        """A killed run whose newest part, or one of all, is damaged then."""
        subject = trial.subject
        (life,) = self.start(trial, subject.words(output), 1, folder)
        self.wait_until(trial, [life], output, trial.after)
        time.sleep(trial.delay)
        life.send(signal.SIGKILL)
        life.wait()
        self.machine.check_no_orphans()
        path, what = self.break_file(trial, subject.damageable(output))
        said, continued = self.continue_run(trial, output, folder)
        if continued.startswith("refused"):
            assert str(path) in said and "Traceback" not in said, f"{what}, refused without naming it: {said[-2000:]}"
            shutil.rmtree(output)
            _, again = self.continue_run(trial, output, folder)
            continued = f"{continued}, names it; removed, {again}"
        else:
            subject.check_noticed(path, said)
        self.machine.check_no_orphans()
        subject.check_equal(output, is_near=False)
        return f"{what}; {continued}, equal"

    def publish_damaged(self, trial: Trial, output: Path, folder: Path) -> str:
        subject = trial.subject
        before = {path: path.read_bytes() for path in subject.damageable(output)}
        path, what = self.break_file(trial, list(before))
        said, continued = self.continue_run(trial, output, folder)
        assert continued.startswith("refused"), f"{what}, and it was published"
        assert path.name in said and "Traceback" not in said, f"{what}, refused without naming it: {said[-2000:]}"
        assert not any(subject.uploads(output)), f"{what}, and some of it was uploaded"
        path.write_bytes(before[path])
        said, continued = self.continue_run(trial, output, folder)
        subject.check_equal(output, is_near=False)
        return f"{what}; refused, names it; mended, published, equal"

    def change_processes(self, trial: Trial, output: Path, folder: Path) -> str:
        """A run of one process that two continue, or of two that one continues. Of two, all or one may be killed, or their launcher."""
        subject, rng = trial.subject, trial.rng
        first, second = ((1, 2), (2, 1))[rng.integers(2)]
        by_launcher = first == 2 and rng.random() < 0.25
        lives = self.start(trial, subject.words(output, first), first, folder, by_launcher)
        self.wait_until(trial, lives, output, trial.after)
        time.sleep(trial.delay)
        number = (signal.SIGKILL, signal.SIGTERM)[rng.integers(2)]
        victims = lives
        if number == signal.SIGKILL and first == 2 and not by_launcher and rng.random() < 0.5:
            victims = [lives[rng.integers(2)]]
        for life in victims:
            life.send(number)
        statuses = [life.wait() for life in lives]
        self.machine.check_no_orphans()
        said, continued = self.continue_run(trial, output, folder, second)
        what = f"{first} process{'es by a launcher' if by_launcher else 'es' * (first > 1)}, {number.name} to {len(victims)}"
        assert not continued.startswith("refused"), f"{what}, status {statuses}; {continued}: {said[-2000:]}"
        self.machine.check_no_orphans()
        subject.check_equal(output, is_near=True)
        return f"{what}, status {statuses}; {continued} by {second}, equal"


@contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A disk of its own, where that can be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "none", str(place)]
    is_there = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield place if is_there else None
    finally:
        if is_there:
            subprocess.run(["umount", "--lazy", str(place)], check=False)


def try_all(folder: Path, number: int, seed: int, only: int | None) -> int:
    """Prints a line for each fault, and a summary; returns how many failed."""
    modules = os.pathsep.join(str(path) for path in (ROOT, ROOT / "tests", Path(__file__).parent))
    with local_hub() as hub, small_disk(folder / "disk") as disk:
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": modules}
        machine, began = Machine({**hub.environment(folder / "home"), **environment}), time.monotonic()
        failures, outcomes = 0, Counter()
        try:
            trials = Trials(folder, machine, hub, disk)
            for trial in trials.deal(number, seed):
                if only not in (None, trial.number):
                    continue
                place = folder / f"{trial.number:03} {trial.subject.name} {trial.fault}"
                place.mkdir()
                start, cpu = time.monotonic(), machine.cpu_seconds()
                try:
                    outcome = trials.run(trial, place)
                    shutil.rmtree(place)
                    if disk is not None:
                        shutil.rmtree(disk / place.name, ignore_errors=True)
                except (AssertionError, OSError) as error:
                    failures += 1
                    outcome = f"FAILED: {error} (see {place})"
                    machine.end()
                seconds = f"{time.monotonic() - start:.0f} s, {machine.cpu_seconds() - cpu:.0f} s of a core"
                outcomes[trial.subject.name, trial.fault] += 1
                about = f"{trial.number:3} {trial.subject.name:9}{trial.fault:12}{trial.moment:34}"
                print(f"{about} {outcome} [{seconds}]", flush=True)
        finally:
            machine.end()
        print(f"{sum(outcomes.values())} faults, {failures} failed, {len(outcomes)} kinds, seed {seed}: "
              f"{time.monotonic() - began:.0f} s, {machine.cpu_seconds():.0f} s of a core", flush=True)  # fmt: skip
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of the one to try")
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # the disk is given back, and lives end
    os.chdir(ROOT)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    failures = try_all(folder, args.trials, args.seed, args.only)
    if failures:
        sys.exit(f"{failures} failed; folders and logs: {folder}")
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found by a call of Linux")
def test_runs_survive_faults_of_every_kind():
    """Every kind once for every program, in two minutes at most; `LVVIT_FAULTS=60` tries so many."""
    number = os.environ.get("LVVIT_FAULTS", "27")
    command = [sys.executable, __file__, "--trials", number]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr[-3000:]}"
    for name in (*PROGRAMS, *FAULTS):
        assert name in done.stdout


if __name__ == "__main__":
    main()
