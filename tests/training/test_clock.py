"""A clock that is set back or forth changes neither which checkpoints are kept nor what a run says of its duration."""

import os
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset
from modeling_lvvit.training.progress import describe_outputs, modification_times
from support.trainers import image_processor, trainer_of


HOUR = 3600


class SetClockBack(TrainerCallback):
    """After each checkpoint: it seems to be written an hour after now."""

    def on_save(self, args, state, control, **kwargs):
        later = time.time() + HOUR
        os.utime(f"{args.output_dir}/checkpoint-{state.global_step}", (later, later))


@pytest.mark.parametrize("limit", [1, 2])
def test_the_newest_checkpoints_are_kept(limit, tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, max_steps=4, save_total_limit=limit)
    trainer.add_callback(SetClockBack())
    trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"][-limit:]


@pytest.mark.parametrize("jump", [-HOUR, HOUR])
def test_durations_are_those_of_a_clock_that_cannot_be_set(jump, tiny_model, labelled_rows, tmp_path, monkeypatch):
    """The clock jumps while the second step is made, in the evaluation after it, and in a prediction."""
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    options = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **options)
    real, offset = time.time, [0.0]
    clock = SimpleNamespace(time=lambda: real() + offset[0], perf_counter=time.perf_counter)
    for module in ("transformers.trainer", "transformers.trainer_utils", "modeling_lvvit.training.throughput"):
        monkeypatch.setattr(f"{module}.time", clock)

    class Jump(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            offset[0] += jump

        def on_prediction_step(self, args, state, control, **kwargs):
            offset[0] += jump

    trainer.add_callback(Jump())
    began = time.perf_counter()
    trainer.train()
    predicted = trainer.predict(evaluation).metrics
    logs = {name: value for entry in trainer.state.log_history for name, value in entry.items()} | predicted
    durations = {name: value for name, value in logs.items() if name.endswith("_runtime")}
    assert durations.keys() == {"train_runtime", "eval_runtime", "test_runtime"}
    assert all(0 <= value <= time.perf_counter() - began for value in durations.values()), durations
    assert not [
        name for name in logs if name.startswith(("train_", "eval_", "test_")) and name.endswith("_per_second")
    ]


def test_files_count_as_those_of_the_run_whatever_the_clock_says(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path)
    (tmp_path / "old.png").write_bytes(b"")
    earlier = modification_times(tmp_path)
    (tmp_path / "new.png").write_bytes(b"")
    os.utime(tmp_path / "new.png", (0, 0))
    assert describe_outputs(trainer, earlier) == [f"figures:     {tmp_path / 'new.png'}"]
