"""Runs that diverge end at once, and leave nothing behind that is NaN or infinite."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from modeling_lvvit.cli import training_program
from modeling_lvvit.finite import NotFiniteError
from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset
from modeling_lvvit.training.checkpoints.output_dir import prepare_output_dir
from modeling_lvvit.training.checkpoints.whole import last_whole_checkpoint
from modeling_lvvit.training.divergence import MAX_SKIPPED_STEPS, DivergenceCheck, DivergenceError
from support.segmentation_rows import masked_rows, segmenter
from support.segmentation_rows import trainer_of as segmentation_trainer
from support.trainers import arguments, image_processor, trainer_for, trainer_of


WEIGHT = "classifier.weight"


@pytest.fixture
def spoil_at_step(monkeypatch):
    """Makes weights NaN in the optimizer step after `step`, as a gradient that overflows does."""

    def spoil(trainer, step: int, value: float = math.nan):
        original = trainer.training_step

        def training_step(*args):
            if trainer.state.global_step == step:
                with torch.no_grad():
                    trainer.model.get_parameter(WEIGHT).view(-1)[3] = value
            return original(*args)

        monkeypatch.setattr(trainer, "training_step", training_step)
        return trainer

    return spoil


def assert_nothing_bad_is_saved(folder) -> None:
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_when_it_is_logged(
    value, spoil_at_step, tiny_model, labelled_rows, tmp_path
):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, logging_steps=2, save_steps=2)
    message = r"diverged: the loss is nan at step 6 \(NaN or infinite: lvvit.* more\).*smaller `learning_rate` \(it is 0.01\).*checkpoint-4: begin"
    with pytest.raises(DivergenceError, match=message):
        spoil_at_step(trainer, 4, value).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "model.safetensors").exists()
    assert_nothing_bad_is_saved(tmp_path)


@pytest.mark.parametrize(
    "options", [{"save_steps": 3}, {"save_steps": 100}, {"save_steps": 100, "logging_nan_inf_filter": True}], ids=str
)
def test_weights_are_looked_at_before_a_save_and_at_the_end_without_any_log(
    options, spoil_at_step, tiny_model, labelled_rows, tmp_path
):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, logging_steps=100, max_steps=6, **options)
    with pytest.raises(DivergenceError, match="at step 6"):
        spoil_at_step(trainer, 4).train()
    assert not (tmp_path / "checkpoint-6").exists()
    assert_nothing_bad_is_saved(tmp_path)


def test_a_filter_that_hides_losses_does_not_hide_the_divergence(spoil_at_step, tiny_model, labelled_rows, tmp_path):
    options = {"logging_nan_inf_filter": True, "logging_steps": 2, "save_strategy": "no"}
    with pytest.raises(DivergenceError, match="at step 4"):
        spoil_at_step(trainer_of(tiny_model, labelled_rows, tmp_path, **options), 2).train()


def test_no_evaluation_of_weights_that_are_not_finite(spoil_at_step, tiny_model, labelled_rows, tmp_path):
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()), name="evaluation")
    options = {"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no"}
    trainer = spoil_at_step(trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **options), 2)
    with pytest.raises(DivergenceError, match="at step 4"):
        trainer.train()
    assert not [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    with pytest.raises(DivergenceError, match="`eval_loss` is nan: the model gives scores that are NaN"):
        trainer.evaluate()


def test_weights_that_are_not_finite_do_not_start(tiny_model, labelled_rows, tmp_path):
    tiny_model.lvvit.embeddings.patch_embeddings.norm1.running_var[2] = math.inf  # a statistic: the loss stays finite
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path)
    with pytest.raises(DivergenceError, match=r"Before the first step weights .*norm1.running_var"):
        trainer.train()
    with pytest.raises(DivergenceError):
        trainer.save_model()


def test_a_spoiled_average_is_not_saved(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, max_steps=3)
    original = trainer.ema.on_step_end

    def on_step_end(args, state, *rest, **kwargs):
        original(args, state, *rest, **kwargs)
        if state.global_step == 2:
            trainer.ema.average[WEIGHT][0] = math.inf

    trainer.ema.on_step_end = on_step_end
    with pytest.raises(DivergenceError, match=r"at step 2 \(NaN or infinite: weight average of classifier.weight\)"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-1"


def test_segmentation_ends_too(spoil_at_step, tmp_path):
    options = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = segmentation_trainer(segmenter(), tmp_path, masked_rows(), **options)
    original, steps = trainer.training_step, []

    def training_step(model, *args):
        steps.append(None)
        if len(steps) == 3:
            with torch.no_grad():
                next(model.decoder.parameters()).fill_(math.nan)
        return original(model, *args)

    trainer.training_step = training_step
    with pytest.raises(DivergenceError, match="the loss is nan at step 3"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-2"


def test_segmentation_scores_that_are_not_finite_are_refused(tmp_path):
    model, rows = segmenter(), masked_rows(3)
    trainer = segmentation_trainer(model, tmp_path, None, rows)
    model.decoder.classifier.register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(
        NotFiniteError, match="LVViTForSemanticSegmentation gives scores .* a window of 30 x 44 pixels"
    ):
        trainer.evaluate()


class Accelerator:
    """Of float16: a scaler, and steps that it leaves out."""

    device, scaler = torch.device("cpu"), object()

    def __init__(self, skipped: list[bool]):
        self.skipped = iter(skipped)

    @property
    def optimizer_step_was_skipped(self) -> bool:
        return next(self.skipped)


@pytest.mark.parametrize(
    ("skipped", "is_good", "fails"),
    [
        ([True], True, False),
        ([False] * 5 + [True], True, False),
        ([True] * MAX_SKIPPED_STEPS, True, True),
        ([True] * MAX_SKIPPED_STEPS + [False], True, False),
        ([False], False, True),
    ],
)
def test_steps_that_float16_leaves_out_are_no_failure(skipped, is_good, fails, tmp_path):
    check = DivergenceCheck(Accelerator(skipped), arguments(tmp_path))
    for _ in skipped:
        check.on_step_end(None, None, None)
    weights = [("weight", torch.tensor([1.0 if is_good else math.nan]))]
    state = TrainerState(global_step=len(skipped))
    if fails:
        with pytest.raises(DivergenceError, match="Training diverged"):
            check.check_loss(math.nan, weights, state)
    else:
        check.check_loss(math.nan, weights, state)


def test_losses_that_overflow_in_float16_do_not_stay_in_their_sum(tiny_model, labelled_rows, tmp_path, monkeypatch):
    """A NaN would: the Trainer resets the sum by subtracting it from itself."""
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, logging_steps=1, max_steps=3, save_strategy="no")
    original = type(trainer).compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss + (math.nan if self.state.global_step == 1 else 0.0) * loss.detach()

    monkeypatch.setattr(type(trainer), "compute_loss", compute_loss)
    monkeypatch.setattr(trainer.accelerator, "scaler", torch.amp.GradScaler("cpu", init_scale=2.0))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] == 0 and losses[2] > 0 and all(map(math.isfinite, losses))


def test_checkpoints_with_weights_that_are_not_finite_are_not_resumed(tiny_model, labelled_rows, tmp_path):
    """Earlier versions wrote such."""
    trainer_of(copy.deepcopy(tiny_model), labelled_rows, tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "SHA256SUMS").unlink()
    for name in ("model.safetensors", "ema.safetensors"):
        path = tmp_path / "checkpoint-2" / name
        weights = load_file(path)
        bad = {**weights, WEIGHT: torch.full_like(weights[WEIGHT], math.nan)}
        save_file(bad, path, {"format": "pt"})
        assert last_whole_checkpoint(tmp_path).name == "checkpoint-1"
        args = arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), ema_decay=0.9)
        with pytest.raises(NotFiniteError, match=rf"{name}: the weights hold NaN .* in classifier.weight"):
            prepare_output_dir(args, None, False)
        save_file(weights, path, {"format": "pt"})


def test_the_program_says_what_to_try_and_writes_no_model(tmp_path, capsys):
    """As `train_tl.py` does; absurd, but legal."""
    from train_tl import main

    options = ["try_out", "--output_dir", str(tmp_path), "--learning_rate", "1600", "--warmup_steps", "0"]
    options += ["--max_steps", "12", "--logging_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
    options += ["--check_data", "False", "--report_to", "none", "--disable_tqdm", "True", "--max_train_samples", "16"]
    with pytest.raises(SystemExit) as end:
        main([*options, "--ema_decay", "0.9"])
    assert "lvvit train: Training diverged" in str(end.value) and "--learning_rate (it is 1600)" in str(end.value)
    assert not [
        name for name in ("model.safetensors", "README.md", "trainer_state.json") if (tmp_path / name).exists()
    ]
    assert_nothing_bad_is_saved(tmp_path)
    for path in tmp_path.rglob("trainer_state.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))


def test_a_finished_but_bad_model_is_not_pushed(tiny_model, labelled_rows, tmp_path, monkeypatch):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path)
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    tiny_model.get_parameter(WEIGHT).data[0] = math.nan
    with pytest.raises(SystemExit, match=r"lvvit train: .*classifier.weight"):
        training_program.push_finished_run(trainer, "lvvit train")
