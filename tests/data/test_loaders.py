"""Worker processes that load images."""

import multiprocessing
import shutil
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from modeling_lvvit.data import loaders
from support.programs import ROOT, environment_of


GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """Makes this a machine of so many cores, processes and bytes of shared memory."""

    def make(cores: int, processes: int | None = None, shared_memory: int = 64 * GIB) -> None:
        monkeypatch.setattr(loaders, "MAX_WORKERS", 16)
        monkeypatch.setattr(loaders, "num_cpu_cores", lambda: cores)
        monkeypatch.setattr(loaders, "SHARED_MEMORY", ROOT)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=shared_memory))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    return make


@pytest.mark.parametrize(
    ("cores", "processes", "expected"),
    [(2, None, 2), (12, None, 12), (64, None, 16), (64, 8, 8), (6, 4, 1), (2, 4, 1)],
)
def test_cores_are_shared_by_the_processes(cores, processes, expected, machine):
    machine(cores, processes)
    assert loaders.default_num_workers(on_cpu=False) == expected
    assert loaders.default_num_workers(on_cpu=True) == 0


def test_no_worker_starts_without_shared_memory(machine):
    """Containers have 64 MiB of it unless told otherwise."""
    machine(8, shared_memory=64 * 2**20)
    assert loaders.default_num_workers(on_cpu=False) == 0
    assert loaders.describe_workers(0, on_cpu=False).endswith("by docker run --shm-size 8g")
    assert loaders.describe_workers(0, on_cpu=True).endswith("by the process that computes")


def test_the_line_says_how_many_load_for_how_many(machine):
    machine(8)
    assert loaders.describe_workers(1, on_cpu=False) == "images are loaded by 1 worker"
    assert loaders.describe_workers(0, False) == "images are loaded without workers, by the process that computes"
    machine(64, processes=8)
    assert loaders.describe_workers(8, on_cpu=False) == "images are loaded by 8 workers for each of 8 processes"


def test_evaluations_start_no_more_workers_than_batches(machine):
    machine(8)
    state = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("xpu"))
    assert loaders.sharded_loader(range(33), 16, None, state).num_workers == 3
    assert loaders.sharded_loader(range(33), 16, 5, state).num_workers == 5
    loader = loaders.sharded_loader(range(33), 16, 0, state)
    assert loader.num_workers == 0 and [len(batch) for batch in loader] == [16, 16, 1]


class Seeds(torch.utils.data.Dataset):
    """What a worker was seeded with."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return torch.initial_seed() if torch.utils.data.get_worker_info() else -1


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_loaders_leave_the_generator_of_the_process_alone(options):
    loader = loaders.prepare_loader(DataLoader(Seeds(), **options), 3, 0)
    before = torch.get_rng_state()
    seeds = [batch.item() for _ in range(2) for batch in loader]
    assert torch.equal(torch.get_rng_state(), before)
    again = loaders.prepare_loader(DataLoader(Seeds(), **options), 3, 0)
    assert seeds == [batch.item() for _ in range(2) for batch in again]
    if options:
        other = loaders.prepare_loader(DataLoader(Seeds(), **options), 4, 0)
        assert seeds[0] != next(iter(other)).item()


PERSISTENT = """
import os, signal, torch
from torch.utils.data import DataLoader
from modeling_lvvit.data.loaders import prepare_loader

class Pids(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return os.getpid()

if __name__ == "__main__":
    loader = prepare_loader(DataLoader(Pids(), num_workers=1, persistent_workers=True))
    first = next(iter(loader)).item()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(first, number)
    print(len({first, *(batch.item() for batch in loader)}))
"""


def test_workers_outlive_stop_signals_but_not_their_program(tmp_path):
    """A program that ends sends SIGTERM to workers that are left, and waits for them."""
    (tmp_path / "program.py").write_text(PERSISTENT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = environment_of(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


BUSY = """
import os, time, torch
from torch.utils.data import DataLoader
from modeling_lvvit.data.loaders import prepare_loader

class Busy(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        os.kill(os.getppid(), 9)
        time.sleep(60)
        print("goes on", flush=True)

if __name__ == "__main__":
    next(iter(prepare_loader(DataLoader(Busy(), num_workers=1))))
"""


def test_a_busy_worker_ends_with_its_killed_program(tmp_path):
    """PyTorch looks whether the program is there only between batches."""
    (tmp_path / "program.py").write_text(BUSY, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = environment_of(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-9, "")  # the pipe is closed when all are gone


def leave_workers_behind() -> None:
    """A process that ends, as after an error, while workers wait for it; also one whose parent has had workers."""
    loader = loaders.prepare_loader(DataLoader(range(8), num_workers=1))
    loaders.left_behind = iter(loader)  # outlives this function
    next(loaders.left_behind)


@pytest.mark.parametrize("parent_has_workers", [False, True])
def test_workers_of_processes_that_multiprocessing_started_end_with_them(parent_has_workers):
    if parent_has_workers:
        list(loaders.prepare_loader(DataLoader(range(2), num_workers=1)))
    process = multiprocessing.get_context("fork").Process(target=leave_workers_behind)
    process.start()
    process.join(30)
    workers = psutil.Process(process.pid).children() if process.exitcode is None else []
    for part in workers:  # that are left over
        part.kill()
    process.join()
    assert (workers, process.exitcode) == ([], 0)
