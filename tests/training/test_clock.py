"""A clock that is set back or forth does not change which checkpoints are kept, nor which files count as those of a run."""

import os
import time

import pytest
from transformers import TrainerCallback

from modeling_lvvit.training.progress import describe_outputs, modification_times
from support.trainers import trainer_of


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


def test_files_count_as_those_of_the_run_whatever_the_clock_says(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path)
    (tmp_path / "old.png").write_bytes(b"")
    earlier = modification_times(tmp_path)
    (tmp_path / "new.png").write_bytes(b"")
    os.utime(tmp_path / "new.png", (0, 0))
    assert describe_outputs(trainer, earlier) == [f"figures:     {tmp_path / 'new.png'}"]
