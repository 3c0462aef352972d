"""Early stopping: what it sets, where it ends, and that a continued run ends there too."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_lvvit.cli.training_program import describe_early_stopping
from modeling_lvvit.segmentation.arguments import SegmentationTrainingArguments
from modeling_lvvit.token_labeling import TokenLabelTrainer, TokenLabelTrainingArguments, TrainTransform
from support.samples import samples_of
from support.trainers import STATEFUL, StopAfter, arguments, assert_same_weights, random_model


EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch"}
SCORES = [0.5, 0.7, 0.6, 0.7, 0.9, 0.1, 0.1, 0.1]  # of steps 1 to 8


def args_of(**options) -> TokenLabelTrainingArguments:
    return TokenLabelTrainingArguments("unused", report_to="none", early_stopping_patience=2, **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, EPOCHS),
        ({"eval_strategy": "epoch"}, EPOCHS),
        ({"save_strategy": "epoch"}, EPOCHS),
        ({"eval_strategy": "steps", "eval_steps": 30}, {"eval_steps": 30, "save_steps": 30}),
        ({"eval_steps": 30}, {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 30}),
        ({"save_steps": 30}, {"eval_strategy": "steps", "eval_steps": 30, "save_steps": 30}),
        ({"save_strategy": "best"}, {"eval_strategy": "epoch", "save_strategy": "best"}),
        ({"eval_strategy": "steps", "eval_steps": 30, "save_strategy": "best"}, {"save_strategy": "best"}),
    ],
)
def test_what_is_not_given_is_chosen(given, expected):
    args = args_of(**given)
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.load_best_model_at_end and args.metric_for_best_model == "loss"
    assert "--load_best_model_at_end True" in describe_early_stopping(args)[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save_strategy": "no"}, "`save_strategy` no writes none"),
        ({"eval_strategy": "epoch", "save_steps": 30}, "`save_steps` 30 and `eval_strategy` epoch"),
        ({"eval_strategy": "steps", "eval_steps": 30, "save_strategy": "epoch"}, "evaluations between epochs"),
        ({"eval_strategy": "steps", "eval_steps": 30, "save_steps": 60}, "`save_steps` 60 and `eval_steps` 30 differ"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        args_of(**given)


def test_other_values_are_refused_and_segmentation_has_it_too():
    for options, message in (
        ({"early_stopping_patience": 0}, "must be at least 1"),
        ({"early_stopping_threshold": 0.1}, "needs `early_stopping_patience`"),
        ({"early_stopping_patience": 1, "early_stopping_threshold": -1}, "must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenLabelTrainingArguments("unused", report_to="none", **options)
    args = SegmentationTrainingArguments("unused", report_to="none", early_stopping_patience=3)
    assert args.metric_for_best_model == "mean_iou" and args.greater_is_better and args.eval_strategy == "epoch"
    assert describe_early_stopping(TokenLabelTrainingArguments("unused", report_to="none")) == []


def scripted_trainer(model, rows, folder, **overrides) -> TokenLabelTrainer:
    """One whose evaluations give `SCORES`."""
    settings = {
        "early_stopping_patience": 2,
        "metric_for_best_model": "score",
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    settings = arguments(folder, **{**STATEFUL, **settings, **overrides})
    samples, evaluation = samples_of(rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3)), samples_of(rows)

    def score(prediction) -> dict[str, float]:
        return {"score": SCORES[trainer.state.global_step - 1]}

    trainer = TokenLabelTrainer(model, settings, None, samples, score, eval_dataset=evaluation)
    return trainer


@pytest.mark.parametrize("limit", [None, 1])
def test_it_stops_and_the_best_weights_are_the_result(limit, tiny_model, labelled_rows, tmp_path):
    """0.7 of step 2 is not bettered by those of steps 3 and 4."""
    trainer = scripted_trainer(random_model(tiny_model), labelled_rows, tmp_path, save_total_limit=limit)
    trainer.train()
    assert trainer.describe_best() == (
        "early stopping: ended after step 4 of 8, as the last 2 evaluations were not better; best: step 2 (score 0.7), whose weights "
        "are the result"
    )
    average = load_file(tmp_path / "checkpoint-2" / "ema.safetensors")
    average.pop("n_averaged")
    assert_same_weights(average, trainer.model)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == (["checkpoint-2"] if limit else [f"checkpoint-{step}" for step in (1, 2, 3, 4)])


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_continued_run_ends_where_an_uninterrupted_one_does(stop, tiny_model, labelled_rows, tmp_path):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    expected = scripted_trainer(whole, labelled_rows, tmp_path / "whole")
    expected.train()
    stopped = scripted_trainer(first, labelled_rows, tmp_path / "parts")
    stopped.add_callback(StopAfter(stop))
    stopped.train()
    torch.manual_seed(99)
    resumed = scripted_trainer(second, labelled_rows, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert_same_weights(second, whole)
    assert resumed.state.global_step == 4 and resumed.describe_best() == expected.describe_best()


def test_a_run_that_stopped_can_be_continued_with_more_patience(tiny_model, labelled_rows, tmp_path):
    scripted_trainer(random_model(tiny_model), labelled_rows, tmp_path).train()
    resumed = scripted_trainer(tiny_model, labelled_rows, tmp_path, early_stopping_patience=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "ended after step 8" in resumed.describe_best() and "best: step 5" in resumed.describe_best()


class SignalAt(TrainerCallback):
    """A signal arrives in a step."""

    def __init__(self, trainer: TokenLabelTrainer, step: int):
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.trainer.stop_on_signal.received = "SIGTERM"


@pytest.mark.parametrize("saving", ["steps", "best", "epoch"])
def test_a_signal_at_an_evaluation_loses_none(saving, tiny_model, labelled_rows, tmp_path):
    """The evaluation of its step is part of the checkpoint, also where it is not better, and at the end of an epoch."""
    strategy = {"eval_strategy": "epoch", "per_device_train_batch_size": 12} if saving == "epoch" else {}
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    options = {"save_strategy": saving, **strategy}
    expected = scripted_trainer(whole, labelled_rows, tmp_path / "whole", **options)
    expected.train()
    stopped = scripted_trainer(first, labelled_rows, tmp_path / "parts", **options)
    stopped.add_callback(SignalAt(stopped, 3))
    stopped.train()
    assert stopped.stop_on_signal.received == "SIGTERM" and stopped.state.global_step == 3
    resumed = scripted_trainer(second, labelled_rows, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert_same_weights(second, whole)
    assert resumed.describe_best() == expected.describe_best() and resumed.state.global_step == 4
