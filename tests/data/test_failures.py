"""What programs say when a worker process or the disk fails."""

import errno
import os
import re
import signal

import pytest
from safetensors import SafetensorError

from modeling_lvvit.data.failures import WriteError, describe_failure, naming_file
from modeling_lvvit.options import Program
from support.programs import environment_of, run


SAMPLES = """
import os
import torch

class DyingSamples(torch.utils.data.Dataset):  # the third sample ends its worker
    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), self.number)
        return torch.zeros(2)
"""
DYING = """
from torch.utils.data import DataLoader
from data_failures import DyingSamples
from modeling_lvvit.options import Program
with Program("a program", "", ()).refusals():
    list(DataLoader(DyingSamples({number}), num_workers=1))
"""


# what PyTorch's handler of SIGCHLD does if the signal comes while an error leaves the `with` block
LATE = """
import contextlib
from modeling_lvvit.options import Program

def exit_late(self, *_):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ")

contextlib._GeneratorContextManager.__exit__ = exit_late
with Program("a program", "", ()).refusals():
    raise ConnectionResetError("a lost batch")
"""


def test_a_failure_between_an_error_and_its_except_is_told_in_words(tmp_path):
    result = run(["-c", LATE], tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("a program: The data loader's worker (pid 7) ended unexpectedly")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_worker_that_was_killed_ends_a_program_with_the_likely_cause(number, tmp_path):
    """Whatever notices it first: the handler of the signal, the queue, or a batch that it can hand over no more."""
    (tmp_path / "data_failures.py").write_text(SAMPLES)
    environment = environment_of(tmp_path)
    result = run(
        ["-c", DYING.format(number=int(number))],
        tmp_path,
        PYTHONPATH=f"{environment['PYTHONPATH']}{os.pathsep}{tmp_path}",
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search("a program: (The data loader's worker|A worker of the data loader) .* memory", result.stderr)
    assert "`num_workers`" in result.stderr and result.stderr.rstrip().endswith("start the same command again.")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "worker (pid 7) was killed, most likely",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            "worker (pid 7, 8) ended unexpectedly, most",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "by a bus error"),
        (RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)"), "docker run --shm-size"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.json"), "a.json cannot be written: No space left on"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "a", None, "b"), "b cannot be written: Read-only file system"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "A file cannot be written: No space left on device"),
        (SafetensorError("Error while serializing: I/O error: x (os error 28)"), "No space left on device"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"),
            "most likely the disk is full",
        ),
    ],
)
def test_failures_are_told_in_words(error, text):
    assert text in describe_failure(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error"), FileNotFoundError(2, "No such file"), SafetensorError("header"), ValueError("x")],
)
def test_other_errors_are_none_of_them(error, tmp_path):
    assert describe_failure(error) is None
    with pytest.raises(type(error)) as raised, naming_file(tmp_path):
        raise error
    assert raised.value is error


def test_a_file_is_named_once(tmp_path):
    message = "^inner cannot be written: No space left on device$"
    with pytest.raises(WriteError, match=message), naming_file(tmp_path), naming_file("inner"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_programs_do_not_hide_their_own_errors():
    with pytest.raises(RuntimeError, match="a bug"), Program("a program", "", ()).refusals():
        raise RuntimeError("a bug")
