"""A disk that takes no more: one message in all processes, nothing lost, and the run goes on to the same weights.

The disk is a limit on the size of files, which every user can set: what is longer is cut off there, with an error of the system."""

import copy
import json
import resource
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_lvvit.data.failures import WriteError
from modeling_lvvit.data.files.atomic_files import write_text
from modeling_lvvit.training.checkpoints.saving import SaveError, Saving
from modeling_lvvit.training.checkpoints.whole import last_whole_checkpoint
from support.programs import options, run, write_data
from support.trainers import assert_same_weights, random_model, trainer_of


@pytest.fixture
def file_size():
    """Sets the largest size of a file, in bytes, for what follows in the test."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class FullDisk(TrainerCallback):
    """From the third step on files may have so many bytes."""

    def __init__(self, file_size, size: int):
        self.file_size, self.size = file_size, size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.file_size(self.size)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
)
def test_run_with_a_full_disk_goes_on_to_the_same_weights(
    name, tiny_model, labelled_rows, tmp_path, file_size, monkeypatch
):
    """Whichever file of the third checkpoint does not fit; one checkpoint is kept."""
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    trainer_of(whole, labelled_rows, tmp_path / "whole", max_steps=4).train()
    size = (tmp_path / "whole" / "checkpoint-3" / name).stat().st_size
    output = tmp_path / "full"
    trainer = trainer_of(first, labelled_rows, output, max_steps=4, save_total_limit=1)
    # only writing this file meets the limit, the smaller files included
    method = {
        "model": "_save",
        "optimizer": "_save_optimizer_and_scheduler",
        "scheduler": "_save_optimizer_and_scheduler",
    }
    limit_from = method.get(name.partition(".")[0], "_save_rng_state")
    if name == "ema.safetensors":
        trainer.add_callback(FullDisk(file_size, size - 1))
    else:
        original = getattr(trainer, limit_from)

        def limited(*args, **kwargs):
            if trainer.state.global_step == 3:
                file_size(size - 1)
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer, limit_from, limited)
    with pytest.raises(SaveError, match="checkpoint-3.* cannot be written: "):
        trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert last_whole_checkpoint(output) == output / "checkpoint-2"  # 3 is not whole
    options = {"max_steps": 4, "save_total_limit": 1}
    trainer_of(second, labelled_rows, output, **options).train(resume_from_checkpoint=str(output / "checkpoint-2"))
    assert_same_weights(second, whole)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_failure_of_one_process_is_one_of_all(tmp_path, monkeypatch):
    saving = Saving()
    monkeypatch.setattr("modeling_lvvit.training.checkpoints.saving.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(
        "modeling_lvvit.training.checkpoints.saving.gather_object", lambda own: [*own, "b cannot be written"]
    )
    with pytest.raises(SaveError, match="b cannot be written"):
        saving.agree()


def test_a_file_that_does_not_fit_is_named_and_the_one_before_stays(tmp_path, file_size):
    path = tmp_path / "card.md"
    write_text(path, "before")
    file_size(1000)
    with pytest.raises(WriteError, match="card.md cannot be written: File too large"):
        write_text(path, "x" * 2000)
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["card.md"]


def test_results_that_were_cut_off_are_written_again(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path)
    (tmp_path / "all_results.json").write_text('{"train_loss": 1.')
    trainer.save_metrics("eval", {"eval_loss": 2.0})
    trainer.save_metrics("train", {"train_loss": 1.5})
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 2.0, "train_loss": 1.5}
    assert json.loads((tmp_path / "eval_results.json").read_text()) == {"eval_loss": 2.0}


def test_a_finished_run_is_not_trained_further(tiny_model, labelled_rows, tmp_path):
    """Three steps an epoch: the last one lies within the second. What was to be written at the end had found no room."""
    first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(2))
    trainer_of(first, labelled_rows, tmp_path, max_steps=4).train()
    resumed = trainer_of(second, labelled_rows, tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert_same_weights(second, first)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), num_test=10)


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({}, -1)); from modeling_lvvit.cli.command import main; main()"


@pytest.mark.slow
def test_two_processes_say_one_line_and_go_on(data, tmp_path):
    """The state of the optimizer does not fit, in the main process alone; the other one ends with it."""
    command = options(data, tmp_path / "run", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    words = ["train", "--cpu", "--num_processes", "2", *command]
    failed = run(["-c", LIMITED.format(150_000), *words], data)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    said = [line for line in failed.stderr.splitlines() if "cannot be written" in line]
    assert len(said) == 1 and "checkpoint-2 cannot be written" in said[0] and "--overwrite_output_dir true" in said[0]
    assert run(["-m", "modeling_lvvit.cli.command", *words, "--overwrite_output_dir", "true"], data).returncode == 0
    other = options(data, tmp_path / "other", "--max_steps", "4", "--save_strategy", "no")
    assert (
        run(["-m", "modeling_lvvit.cli.command", "train", "--cpu", "--num_processes", "2", *other], data).returncode
        == 0
    )
    ended, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "other"))
    assert_same_weights(ended, whole)


@pytest.mark.slow
def test_a_figure_that_does_not_fit_leaves_the_model_and_says_how_to_go_on(data, tmp_path):
    """Of a run that is over: what is continued trains no step more."""
    command = options(data, tmp_path / "run", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
    failed = run(["-c", LIMITED.format(150_000), "train", *command, "--save_only_model", "true"], data)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert "predictions.png cannot be written: File too large" in failed.stderr
