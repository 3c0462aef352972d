"""What a process that computes on the CPU sets up for itself."""

import os
import platform
import subprocess
import sys

import pytest
import torch

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
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, 4),
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
