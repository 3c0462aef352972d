"""Runs that go on with other numbers of processes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_lvvit.training.base_arguments import BaseImageTrainingArguments
from modeling_lvvit.training.checkpoints.output_dir import prepare_output_dir
from support import elastic
from support.programs import ROOT, run
from support.trainers import arguments, trainer_of


def losses_in(folder: Path) -> dict[int, float]:
    history = json.loads((folder / f"checkpoint-{elastic.STEPS}" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Of each kind one that one process has trained, and one that two have continued."""
    folder = tmp_path_factory.mktemp("runs")
    for name in elastic.RUNS:
        elastic.train(name, folder / "one" / name)
        shutil.copytree(
            folder / "one" / name / f"checkpoint-{elastic.STOP}", folder / "two" / name / f"checkpoint-{elastic.STOP}"
        )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run(
        [*launch, str(ROOT / "tests" / "support" / "elastic.py"), str(folder / "two")], folder, CUDA_VISIBLE_DEVICES=""
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", elastic.RUNS)
def test_two_processes_go_on_as_the_one_would(name, runs):
    """Among the steps is the last one of an epoch, in which the second process has fewer images than the first."""
    one, two = runs / "one" / name, runs / "two" / name
    assert losses_in(two) == pytest.approx(losses_in(one), abs=1e-4)
    for part in ("model.safetensors", "ema.safetensors"):
        first, second = (load_file(folder / f"checkpoint-{elastic.STEPS}" / part) for folder in (one, two))
        for weight, value in first.items():
            assert torch.allclose(second[weight].float(), value.float(), atol=1e-4), weight


@pytest.mark.slow
@pytest.mark.parametrize("name", elastic.RUNS)
def test_one_process_goes_on_as_the_two_would(name, runs, tmp_path):
    middle = elastic.STEPS - 2
    shutil.copytree(runs / "two" / name / f"checkpoint-{middle}", tmp_path / f"checkpoint-{middle}")
    checkpoint = tmp_path / f"checkpoint-{middle}"
    shutil.copytree(checkpoint, tmp_path / f"checkpoint-{elastic.STOP}")  # its name says nothing
    elastic.train(name, tmp_path, resume=True)
    assert losses_in(tmp_path) == pytest.approx(losses_in(runs / "one" / name), abs=1e-4)


def test_accumulation_keeps_the_images_of_a_step(tiny_model, labelled_rows, tmp_path, capsys):
    options = {"max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 6}
    trainer_of(tiny_model, labelled_rows, tmp_path, **options, learning_rate=None).train()
    checkpoint = tmp_path / "checkpoint-2"
    resumed = arguments(
        tmp_path, ema_decay=0.9, per_device_train_batch_size=2, learning_rate=None, resume_from_checkpoint="last"
    )
    prepare_output_dir(resumed, None, False)
    assert resumed.gradient_accumulation_steps == 3
    assert (
        resumed.learning_rate == arguments(tmp_path, per_device_train_batch_size=6, learning_rate=None).learning_rate
    )
    assert (
        f"{checkpoint} has steps of 6 images: gradient_accumulation_steps 3 keeps them on one process"
        in capsys.readouterr().out
    )
    for size, advice in (
        (4, "takes 4 at once, which do not add up to them: use `per_device_train_batch_size` 3"),
        (32, "32 at once.* 6"),
    ):
        refused = arguments(
            tmp_path, ema_decay=0.9, per_device_train_batch_size=size, resume_from_checkpoint=str(checkpoint)
        )
        with pytest.raises(ValueError, match=f"has steps of 6 images, and here one process .*{advice}"):
            prepare_output_dir(refused, None, False)


def test_images_that_no_number_divides_are_said(tmp_path, monkeypatch):
    settings = arguments(tmp_path)
    monkeypatch.setattr(BaseImageTrainingArguments, "world_size", 4)
    with pytest.raises(
        ValueError,
        match="steps of 6 images, and here 4 processes take 24 at once.*: no number of images can be given to 4",
    ):
        settings.keep_images_per_step(6, "It")
