"""Runs that are killed, stopped and continued end with the very weights of an uninterrupted run."""

import copy
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from safetensors.torch import load_file

from modeling_lvvit.data.files.digests import DIGESTS
from modeling_lvvit.token_labeling import TokenLabelStream, TokenLabelTrainer, TrainTransform
from modeling_lvvit.training.checkpoints.whole import DamagedCheckpointError, check_whole, last_whole_checkpoint
from support.images import labelled_table
from support.programs import ROOT, environment_of, options, run, write_data
from support.trainers import (
    STATEFUL,
    StopAfter,
    arguments,
    assert_resume_changes_nothing,
    assert_same_weights,
    random_model,
    trainer_of,
)


MIXED = {"mix_methods": ["token", "cutmix", "mixup"], "per_device_train_batch_size": 5}


VARIATIONS = [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}]
BALANCED = {"train_sampling_strategy": "balanced", "class_weights": ["balanced"], "dataloader_num_workers": 1}


@pytest.mark.parametrize("variation", [*VARIATIONS, BALANCED], ids=str)
@pytest.mark.parametrize("stop", [2, 5])  # three steps an epoch: both within an epoch; with accumulation two steps
def test_resumed_run_equals_an_uninterrupted_one(stop, variation, tiny_model, labelled_rows, tmp_path):
    assert_resume_changes_nothing(random_model(tiny_model), labelled_rows, tmp_path, stop, **MIXED, **variation)
    for name in ("model.safetensors", "ema.safetensors"):  # raw weights and average
        folders = (tmp_path / part / "checkpoint-8" / name for part in ("whole", "parts"))
        assert_same_weights(*(load_file(folder) for folder in folders))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_equals_an_uninterrupted_one(workers, tiny_model, tmp_path):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))

    def trainer(model, folder: str) -> TokenLabelTrainer:
        rows = datasets.Dataset(labelled_table(24)).to_iterable_dataset(num_shards=2)
        stream = TokenLabelStream(
            rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3), "image", "label", shuffle_buffer=7, seed=1
        )
        options = {**STATEFUL, **MIXED, "dataloader_num_workers": workers}
        return TokenLabelTrainer(model, arguments(tmp_path / folder, **options), train_dataset=stream)

    trainer(whole, "whole").train()
    stopped = trainer(first, "parts")
    stopped.add_callback(StopAfter(3))
    stopped.train()
    random.seed(99)
    trainer(second, "parts").train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_same_weights(second, whole)


PARTS_OF_A_SAVE = ["_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state"]


@pytest.mark.parametrize("part", PARTS_OF_A_SAVE)
def test_a_save_that_broke_off_is_passed_over(part, tiny_model, labelled_rows, tmp_path, monkeypatch):
    """Wherever the process dies in its third save, the second checkpoint is whole and still there."""
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, save_total_limit=1)
    original = getattr(TokenLabelTrainer, part)

    def dying(self, *args):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(TokenLabelTrainer, part, dying)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"


def test_writing_over_a_checkpoint_first_makes_it_unwhole(tiny_model, labelled_rows, tmp_path, monkeypatch):
    trainer_of(copy.deepcopy(tiny_model), labelled_rows, tmp_path, max_steps=2).train()
    check_whole(tmp_path / "checkpoint-2")

    def dying(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenLabelTrainer, "_save_optimizer_and_scheduler", dying)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tiny_model, labelled_rows, tmp_path, save_steps=2).train()
    with pytest.raises(DamagedCheckpointError, match="trainer_state.json is missing"):
        check_whole(tmp_path / "checkpoint-2")


def test_checkpoints_with_cut_weights_are_passed_over(tiny_model, labelled_rows, tmp_path):
    trainer_of(tiny_model, labelled_rows, tmp_path, max_steps=2).train()
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_a_save_that_broke_off_before_the_digests_is_passed_over(tiny_model, labelled_rows, tmp_path):
    """All of its files were written, and nothing says whether they have reached the disk. Earlier versions wrote no digests at all."""
    trainer_of(tiny_model, labelled_rows, tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / DIGESTS).unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    (tmp_path / "checkpoint-1" / DIGESTS).unlink()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def command(data: Path, output: Path, *more: str) -> list[str]:
    saving = ["--max_steps", "120", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"]
    saving += ["--ema_decay", "0.9", "--save_picture", "False", "--check_data", "False"]
    return ["train_tl.py", *options(data, output, *saving, *more)]


def start(arguments_: list[str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments_],
        cwd=ROOT,
        env=environment_of(folder),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def newest_step(output: Path) -> int:
    return max((int(path.name[11:]) for path in output.glob("checkpoint-*")), default=0)


def wait_for_a_later_checkpoint(process: subprocess.Popen, output: Path) -> None:
    before, deadline = newest_step(output), time.monotonic() + 120
    while newest_step(output) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.slow
def test_run_killed_five_times_equals_an_uninterrupted_one(data, tmp_path):
    """kill -9 at random moments: within steps and within saves."""
    rng = np.random.default_rng(0)
    whole, output = tmp_path / "whole", tmp_path / "killed"
    assert run(command(data, whole), data).returncode == 0
    steps = []
    for life in range(5):
        resume = ["--resume_from_checkpoint", "last"] if life else []
        process = start(command(data, output, *resume), data)
        wait_for_a_later_checkpoint(process, output)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.communicate()
        if last_whole_checkpoint(output) is None:  # killed in the first save
            output.rename(tmp_path / "nothing saved")
            pytest.fail("the first checkpoint was never whole")
        steps.append(newest_step(output))
    assert len(set(steps)) == 5, steps
    result = run(command(data, output, "--resume_from_checkpoint", "last"), data)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_weights(*(load_file(folder / "model.safetensors") for folder in (whole, output)))
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 120


@pytest.mark.slow
@pytest.mark.parametrize("launch", [[], ["-m", "accelerate.commands.launch", "--cpu"]], ids=["python", "accelerate"])
def test_sigterm_ends_the_program_and_says_how_to_go_on(launch, data, tmp_path):
    """accelerate's launcher passes the signal to no one, and goes; its process notices."""
    arguments_ = command(data, tmp_path / "run", "--save_steps", "20", "--dataloader_num_workers", "1")
    process = start([*launch, *arguments_], data)
    wait_for_a_later_checkpoint(process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)  # until all that write to the pipe are gone
    assert process.returncode == (-signal.SIGTERM if launch else 143)
    assert "stopped by SIGTERM after step" in errors and "--resume_from_checkpoint last" in errors
    assert "Traceback" not in errors
    assert last_whole_checkpoint(tmp_path / "run") is not None
    assert not (tmp_path / "run" / "model.safetensors").exists()  # an unfinished run is not passed off as a model
