"""What a process that computes on the CPU sets up for itself."""

import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from modeling_lvvit import launching


FAULTS_OF_A_LATER_BLOCK = """
import resource
import torch
from modeling_lvvit import launching

if {sets_up}:
    launching.set_up_cpu(torch.device({device!r}))
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(100_000_000, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(sets_up: bool, device: str = "cpu") -> int:
    """How many pages are mapped for a block of 100 MB after others were freed."""
    code = FAULTS_OF_A_LATER_BLOCK.format(sets_up=sets_up, device=device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is set")
def test_freed_memory_is_kept_on_a_cpu_only():
    assert faults(sets_up=True) < 50
    assert faults(sets_up=False) > 1000
    assert faults(sets_up=True, device="cuda") > 1000


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}, 1),  # set by an `Accelerator`
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "False"}, 4),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, 1),
    ],
)
def test_threads_are_those_asked_for_or_a_share_of_the_cores(variables, threads, monkeypatch):
    """Of four cores; with 3 threads the library is left alone, here at 1."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name == "LOCAL_WORLD_SIZE"]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = [1]
    monkeypatch.setattr(launching, "num_cpu_cores", lambda: 4)
    monkeypatch.setattr(launching, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    launching.set_up_cpu(torch.device("cpu"))
    assert chosen[-1] == threads


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Name it with `image_column`.", "Name it with --image_column."),
        ("`class_map` identity", "--annotator_class_map identity"),  # the only option that ends so
        ("`revision` of `Trainer`, `class_map=1`", "`revision` of `Trainer`, `class_map=1`"),
    ],
)
def test_parameters_in_messages_become_options(message, expected):
    names = ("image_column", "annotator_class_map", "model_revision", "dataset_revision")
    assert launching.name_options(message, *names) == expected


def test_launchers_in_this_process_end_it_with_the_status_of_theirs(capsys):
    def status_of(error):
        with pytest.raises(SystemExit) as ending, launching.quiet_launch():
            raise error
        return ending.value.code

    failures = {rank: ProcessFailure(rank, 7, code, "unused") for rank, code in ((1, -9), (0, 3))}
    assert status_of(ChildFailedError("train", {0: failures[0]})) == 3 and capsys.readouterr().err == ""
    assert status_of(ChildFailedError("train", {1: failures[1]})) == 137
    assert capsys.readouterr().err == "process 1 was ended by SIGKILL, perhaps for want of memory\n"
    assert status_of(subprocess.CalledProcessError(2, "train")) == 2
    assert status_of(SignalException("", signal.SIGTERM)) == 143
    assert status_of(KeyboardInterrupt()) == 130
    with launching.quiet_launch():
        pass


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        (["/usr/bin/python", "/usr/bin/accelerate", "launch", "train_tl.py"], True),
        (["python3.11", "-m", "accelerate.commands.launch", "train_tl.py"], True),
        (["bash", "-c", "accelerate launch train_tl.py"], False),
        (["python", "run.py", "--config_file", "accelerate"], False),
        ([], False),
    ],
)
def test_only_a_launcher_is_taken_for_one(command, is_launcher, monkeypatch):
    """A shell or a program that has the word in its options must not be ended."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launching.psutil.Process, "cmdline", lambda self: command)
    assert (launching.waiting_launcher() is not None) == is_launcher
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launching.waiting_launcher() is None


WAITING = """
import signal, sys, time
from modeling_lvvit import launching

launching.SECONDS_TO_END = 0.2
if {hears}:
    signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
if {is_program}:
    launching.end_with_launcher()
print("waits", flush=True)
time.sleep({seconds})
print("goes on", flush=True)
"""
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, sys.argv[2]: sys.argv[3] or str(os.getpid())})
child.wait()
"""


def output_after_its_launcher(variable: str, value: str = "", **settings) -> str:
    """What a process prints whose launcher is killed as soon as it waits."""
    code = WAITING.format(**{"hears": False, "is_program": True, "seconds": 60, **settings})
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, code, variable, value], stdout=subprocess.PIPE, text=True
    )
    first = launcher.stdout.readline()
    launcher.kill()
    return first + launcher.communicate(timeout=120)[0]  # until all that could write are gone


@pytest.mark.parametrize(("variable", "value"), [(launching.LAUNCHER_VARIABLE, ""), ("TORCHELASTIC_RUN_ID", "none")])
def test_programs_end_with_their_launcher(variable, value):
    assert output_after_its_launcher(variable, value) == "waits\n"


def test_a_program_that_hears_of_the_end_has_a_while_to_save():
    assert output_after_its_launcher(launching.LAUNCHER_VARIABLE, hears=True, seconds=20) == "waits\nheard\n"


def test_other_programs_go_on_without_their_launcher():
    """Scripts of users that have a Trainer of this package."""
    text = output_after_its_launcher(launching.LAUNCHER_VARIABLE, is_program=False, seconds=3)
    assert text == "waits\ngoes on\n"


def test_a_launcher_that_is_gone_at_the_start_is_noticed():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**os.environ, launching.LAUNCHER_VARIABLE: str(gone.pid)}
    code = WAITING.format(hears=False, is_program=True, seconds=60)
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("sign", [1, -1])
def test_status_of_stopped_processes_is_that_of_the_launcher(number, sign, monkeypatch):
    """Whether they ended by themselves or by the signal; accelerate, which would call it 1 with a traceback, is ended too."""
    stopped = []
    monkeypatch.setattr(launching, "stop_launcher", lambda: stopped.append(True))
    status = 128 + number if sign == 1 else -number
    failure = ChildFailedError("train", {0: ProcessFailure(0, 7, status, "unused")})
    with pytest.raises(SystemExit) as ending, launching.quiet_launch():
        raise failure
    assert ending.value.code == 128 + number and stopped == [True]
