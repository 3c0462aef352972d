"""SIGTERM and Ctrl-C: training ends after the step, with a checkpoint, and nothing is lost."""

import copy
import json
import multiprocessing
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset, TokenLabelTrainer
from modeling_lvvit.training.callbacks import StopOnSignal
from modeling_lvvit.training.checkpoints.whole import last_whole_checkpoint
from support.samples import samples_of
from support.trainers import StopAfter, assert_same_weights, image_processor, random_model, trainer_of


class SignalAt(TrainerCallback):
    """Sends the process a signal, as a scheduler would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_ends_after_the_step(tiny_model, labelled_rows, tmp_path):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    before = signal.getsignal(signal.SIGTERM)
    trainer_of(whole, labelled_rows, tmp_path / "whole", save_strategy="no").train()
    stopped = trainer_of(first, labelled_rows, tmp_path / "parts", save_strategy="no")
    stopped.add_callback(SignalAt(3))
    stopped.train()
    assert stopped.stop_on_signal.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = trainer_of(second, labelled_rows, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert resumed.stop_on_signal.received is None
    assert_same_weights(second, whole)


def test_sigterm_in_the_middle_of_a_save_loses_nothing(tiny_model, labelled_rows, tmp_path, monkeypatch):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    trainer_of(whole, labelled_rows, tmp_path / "whole").train()
    stopped = trainer_of(first, labelled_rows, tmp_path / "parts", save_total_limit=1)
    save_weights = TokenLabelTrainer.save_model

    def interrupted_save(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # before and after this line files are written
        return save_weights(self, *args, **kwargs)

    monkeypatch.setattr(TokenLabelTrainer, "save_model", interrupted_save)
    stopped.train()
    monkeypatch.undo()
    last = last_whole_checkpoint(tmp_path / "parts")
    assert last.name == "checkpoint-4"  # the save went on, and the next step ended with its own
    trainer_of(second, labelled_rows, tmp_path / "parts").train(resume_from_checkpoint=str(last))
    assert_same_weights(second, whole)


def with_evaluation(model, rows, folder, **overrides) -> TokenLabelTrainer:
    """A trainer that evaluates at every fourth step."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "save_total_limit": 1, **overrides}
    evaluation = TokenLabelDataset(rows, ImageProcessorTransform(image_processor()), name="evaluation")
    return trainer_of(model, rows, folder, evaluation, **options)


def test_stopping_keeps_its_checkpoint_beside_the_best_one(tiny_model, labelled_rows, tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = with_evaluation(tiny_model, labelled_rows, tmp_path, **options)
    trainer.add_callback(SignalAt(5))
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-4")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("step", [3, 4])  # the step that is evaluated, and the one after it
def test_evaluation_leaves_no_trace_in_the_run(step, tiny_model, labelled_rows, tmp_path):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    with_evaluation(whole, labelled_rows, tmp_path / "whole").train()
    stopped = with_evaluation(first, labelled_rows, tmp_path / "parts")
    stopped.add_callback(SignalAt(step))
    stopped.train()
    resumed = with_evaluation(second, labelled_rows, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{step + 1}"))
    assert_same_weights(second, whole)


class Evaluated(TrainerCallback):
    """Notes which checkpoints there are when an evaluation ends, and sends a signal in its middle."""

    def __init__(self, folder):
        self.folder, self.seen = folder, None

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.seen is None:
            self.seen = last_whole_checkpoint(self.folder)
            os.kill(os.getpid(), signal.SIGTERM)


def test_checkpoint_is_written_before_the_evaluation(tiny_model, labelled_rows, tmp_path):
    trainer = with_evaluation(tiny_model, labelled_rows, tmp_path)
    callback = Evaluated(tmp_path)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.seen.name == "checkpoint-4"
    assert trainer.state.global_step == 4  # it ended when the evaluation did
    assert trainer.stop_on_signal.received == "SIGTERM"
    logs = trainer.state.log_history
    assert [entry["step"] for entry in logs if "eval_accuracy" in entry] == [4]


class SignalsAt(SignalAt):
    """Launchers pass on what schedulers have already sent."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)


def test_further_sigterms_do_not_break_off_the_save(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, save_strategy="no")
    trainer.add_callback(SignalsAt(2))
    trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-3"


def test_second_interrupt_a_while_later_has_its_usual_effect(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stop = StopOnSignal(accelerator=None)
    stop.on_train_begin(None, None, None)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same key press, passed on by a launcher
        assert stop.received == "SIGINT"
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore_handlers()


def test_handlers_are_given_back_after_a_failed_run(tiny_model, labelled_rows, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path)
    trainer.add_callback(Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


class Failing(TrainerCallback):
    """A run that ends badly."""

    def on_step_begin(self, args, state, control, **kwargs):
        raise RuntimeError("out of memory")


def test_workers_of_an_evaluation_end_with_it(tiny_model, labelled_rows, tmp_path):
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "eval_steps": 1}
    trainer = with_evaluation(tiny_model, labelled_rows, tmp_path, **options)
    counts = []

    class Count(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            counts.append(len(multiprocessing.active_children()))

    trainer.add_callback(Count())
    trainer.train()
    assert len(counts) == 8
    assert set(counts) == {1}  # which trains


def test_every_evaluation_set_has_raw_and_averaged_accuracy(tiny_model, labelled_rows, tmp_path):
    trainer = with_evaluation(tiny_model, labelled_rows, tmp_path)
    trainer.eval_dataset = {"first": trainer.eval_dataset, "second": samples_of(labelled_rows)}
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    for part in ("first", "second"):
        assert {f"eval_{part}_accuracy", f"eval_{part}_raw_accuracy"} <= names


def test_average_is_found_beside_the_checkpoint_wherever_it_lies(tiny_model, labelled_rows, tmp_path):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    trainer_of(whole, labelled_rows, tmp_path / "whole").train()
    stopped = trainer_of(first, labelled_rows, tmp_path / "parts")
    stopped.add_callback(StopAfter(3))
    stopped.train()
    (tmp_path / "parts").rename(tmp_path / "moved")
    torch.manual_seed(1)
    resumed = trainer_of(second, labelled_rows, tmp_path / "elsewhere")
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-3"))
    assert_same_weights(second, whole)
