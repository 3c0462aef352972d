"""What a process that computes on the CPU sets up for itself."""

import platform
import subprocess
import sys

import pytest


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
