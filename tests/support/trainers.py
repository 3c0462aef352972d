"""Trainers of small models on small data."""

import copy
import random
from pathlib import Path

import torch
from transformers import BitImageProcessor, TrainerCallback

from modeling_lvvit.token_labeling import (
    TokenLabelDataset,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from support.samples import plain_transform, samples_of


# everything that draws random numbers is on: augmentation, mixing, drop path, dropout; and everything that keeps state
STATEFUL = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 1, "max_steps": 8, "seed": 5}


def arguments(folder, **overrides) -> TokenLabelTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TokenLabelTrainingArguments(**{**settings, **overrides})


def trainer_for(model, rows, folder, with_maps: bool = True, **overrides) -> TokenLabelTrainer:
    samples = samples_of(rows) if with_maps else TokenLabelDataset(rows, plain_transform())
    return TokenLabelTrainer(model, arguments(folder, **overrides), train_dataset=samples)


def image_processor() -> BitImageProcessor:
    size = {"height": 32, "width": 48}
    return BitImageProcessor(size={"shortest_edge": 48}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


class StopAfter(TrainerCallback):
    """Ends training as an interruption would, after a checkpoint was written."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def random_model(tiny_model):
    for layer in tiny_model.lvvit.layers:
        layer.drop_path.rate, layer.dropout.p = 0.3, 0.1
    return tiny_model


def trainer_of(model, rows, folder: Path, evaluation=None, **overrides) -> TokenLabelTrainer:
    samples = samples_of(rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3))
    settings = arguments(folder, **{**STATEFUL, **overrides})
    return TokenLabelTrainer(model, settings, train_dataset=samples, eval_dataset=evaluation)


def assert_same_weights(first, second) -> None:
    first, second = (model.state_dict() if hasattr(model, "state_dict") else model for model in (first, second))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_resume_changes_nothing(model, rows, folder: Path, stop: int, **options):
    """A run that is stopped after so many steps and continued ends with the weights of one that was not; returns the model of that one."""
    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    trainer_of(whole, rows, folder / "whole", **options).train()
    stopped = trainer_of(first, rows, folder / "parts", **options)
    stopped.add_callback(StopAfter(stop))
    stopped.train()
    torch.manual_seed(99)  # a new process has other states
    random.seed(99)
    checkpoint = str(folder / "parts" / f"checkpoint-{stop}")
    trainer_of(second, rows, folder / "parts", **options).train(resume_from_checkpoint=checkpoint)
    assert_same_weights(second, whole)
    return whole
