"""Launchers that are ended or killed take their processes with them; what stops a run is its exit status."""

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pyarrow import parquet

from modeling_lvvit.training.checkpoints.whole import last_whole_checkpoint
from support.classifiers import save_annotator
from support.images import labelled_table
from support.programs import ROOT, TINY, environment_of, options, write_data


ACCELERATE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LVVIT = ["-m", "modeling_lvvit.cli.command"]
SAVING = ["--max_steps", "4000", "--save_strategy", "steps", "--save_steps", "20", "--save_total_limit", "2"]
SAVING += ["--save_picture", "False", "--check_data", "False", "--dataloader_num_workers", "1"]
PATIENCE = 300  # seconds for what takes at most 10 where nothing else runs


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    parquet.write_table(labelled_table(6000), folder / "train.parquet")
    return folder


def wait_until(condition, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Program:
    """A program with all its processes, which are ended when the test is over."""

    def __init__(self, command: list[str], data: Path, begins):
        self.log = Path(f"{data} {time.monotonic_ns()}.txt")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment_of(data), stdout=log, stderr=log
            )
        self.others: list[psutil.Process] = []
        try:
            wait_until(begins, self.process)
            assert self.process.poll() is None, self.text()
            self.others = psutil.Process(self.process.pid).children(recursive=True)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_) -> None:
        for process in [*self.others, self.process]:
            if process in self.others or process.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def text(self) -> str:
        return self.log.read_text()

    def child(self) -> psutil.Process:
        """The process that `accelerate launch` has started."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def wait_for_all(self) -> int:
        """Waits for the end of all processes; the status of the first."""
        wait_until(lambda: not any(process.is_running() for process in self.others))
        return self.process.wait(PATIENCE)


def training(launch: list[str], data: Path, output: Path) -> Program:
    command = [*launch, *options(data, output, *SAVING)]
    return Program(command, data, lambda: last_whole_checkpoint(output) is not None)


def step(output: Path) -> int:
    return int(last_whole_checkpoint(output).name.removeprefix("checkpoint-"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "is_child", "status"),
    [
        ([*ACCELERATE, "2", "train_tl.py"], False, -signal.SIGTERM),
        ([*ACCELERATE, "2", "train_tl.py"], True, -signal.SIGTERM),
        ([*ACCELERATE, "1", "train_tl.py"], True, -signal.SIGTERM),
        ([*LVVIT, "train", "--cpu", "--num_processes", "2"], False, 143),
    ],
    ids=["launcher", "process between", "lone process", "lvvit"],
)
def test_sigterm_stops_all_with_a_checkpoint_and_its_status(launch, is_child, status, data, tmp_path):
    """accelerate has no status of its own for it: its launcher is ended by the same signal, which shells call 143 too."""
    with training(launch, data, tmp_path / "run") as program:
        before = step(tmp_path / "run")
        (program.child() if is_child else program.process).send_signal(signal.SIGTERM)
        assert program.wait_for_all() == status
        text = program.text()
        assert "stopped by SIGTERM after step" in text and "Traceback" not in text
        assert step(tmp_path / "run") > before
        assert not list((tmp_path / "run").glob(".lock*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "is_child"),
    [
        ([*ACCELERATE, "2", "train_tl.py"], False),
        ([*ACCELERATE, "2", "train_tl.py"], True),
        ([*TORCHRUN, "train_tl.py"], False),
        ([*LVVIT, "train", "--cpu", "--num_processes", "2"], False),
    ],
    ids=["launcher", "process between", "torchrun", "lvvit"],
)
def test_no_process_outlives_a_killed_launcher(launch, is_child, data, tmp_path):
    with training(launch, data, tmp_path / "run") as program:
        assert len(program.others) >= 4  # two that train, each with a worker
        (program.child() if is_child else program.process).kill()
        program.wait_for_all()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_no_annotator_outlives_its_launcher(processes, number, many, tmp_path):
    annotator = save_annotator(tmp_path / "annotator", [f"class {index}" for index in range(7)])
    words = ["--dataset_name", str(many), "--annotator", str(annotator), "--output_dir", str(tmp_path / "labels")]
    words += ["--top_k", "3", "--rows_per_shard", "8", "--num_workers", "1"]
    shards = tmp_path / "labels" / "data"
    command = [*ACCELERATE, processes, "dataset_scripts/annotate.py", *words]
    with Program(command, many, lambda: len(list(shards.glob("*.parquet"))) > 2) as program:
        program.process.send_signal(number)
        assert program.wait_for_all() == -number
    assert len(list(shards.glob("*.parquet"))) < 750


@pytest.mark.slow
def test_no_run_outlives_a_killed_study(data, tmp_path):
    output = tmp_path / "study"
    words = ["--dataset_name", str(data), "--output_dir", str(output), "--arms", "plain_labels", "--seeds", "0"]
    words += ["--image_size", "32", "--config_overrides", TINY, "--report_to", "none", *SAVING]
    run = output / "plain_labels" / "seed_0"
    with Program([*LVVIT, "study", *words], data, lambda: last_whole_checkpoint(run) is not None) as program:
        program.process.kill()
        program.wait_for_all()
