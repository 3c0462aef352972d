"""Starting the programs as a user would."""

import os
import subprocess
import sys
from pathlib import Path

from pyarrow import parquet

from support.images import labelled_table


ROOT = Path(__file__).parents[2]
TINY = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 48, stem_hidden_size: 8, patch_size: 8}"


def environment_of(folder: Path) -> dict[str, str]:
    """Offline, one thread, caches next to the data and not in it, and the modules of the tests."""
    modules = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{folder} hf_home",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": modules,
    }


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment_of(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def write_data(folder: Path, num_test: int = 6) -> Path:
    """Labelled images of both splits: 24 to train on, and some to test."""
    parquet.write_table(labelled_table(24), folder / "train.parquet")
    parquet.write_table(labelled_table(num_test, seed=1), folder / "test.parquet")
    return folder


def options(data: Path, output: Path, *more: str) -> list[str]:
    command = ["--dataset_name", str(data), "--output_dir", str(output), "--image_size", "32"]
    command += ["--config_overrides", TINY, "--per_device_train_batch_size", "4", "--report_to", "none"]
    return [*command, *more]
