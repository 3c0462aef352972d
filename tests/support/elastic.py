"""Runs that other numbers of processes continue; run by torchrun in test_elastic: all of `RUNS`, from the checkpoint of `STOP` on."""

import os
import sys
from pathlib import Path

import datasets
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.launching import end_together
from modeling_lvvit.token_labeling import TokenLabelStream, TokenLabelTrainer, TrainTransform
from support.images import labelled_table
from support.models import tiny_config
from support.samples import samples_of
from support.trainers import arguments


STEPS, STOP, IMAGES = 9, 5, 41  # four steps an epoch, of which the last one takes 5 images
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# what the processes take at once: 12 images a step
RUNS = {
    "same micro-batches": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2 // PROCESSES},
    "smaller micro-batches": {"per_device_train_batch_size": 12 // PROCESSES, "mix_probability": 0.0},
    "stream": {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2 // PROCESSES,
        "dataloader_num_workers": 1,
    },
}


def train(name: str, folder: Path, resume: bool = False) -> tuple[LVViTForImageClassification, dict[int, float]]:
    """A run, from `STOP` on if it is continued; everything that draws random numbers is on. Returns the model and the loss of each step."""
    torch.manual_seed(0)
    # without drop path where micro-batches differ: they draw what they drop
    model = LVViTForImageClassification(tiny_config(drop_path_rate=0.0 if name.startswith("smaller") else 0.3))
    rows, transform = datasets.Dataset(labelled_table(IMAGES)), TrainTransform((32, 48), [0.5] * 3, [0.5] * 3)
    if name == "stream":
        stream = rows.to_iterable_dataset(num_shards=2)
        process = int(os.environ.get("RANK", "0"))
        samples = TokenLabelStream(stream, transform, "image", "label", None, None, 7, 1, process, PROCESSES)
    else:
        samples = samples_of(rows, transform)
    options = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    options |= {"ema_decay": 0.9, "batch_norm": "frozen", "mix_methods": ["token", "cutmix", "mixup"], **RUNS[name]}
    trainer = TokenLabelTrainer(model, arguments(folder, **options), train_dataset=samples)
    trainer.train(str(folder / f"checkpoint-{STOP}") if resume else None)
    return model, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


if __name__ == "__main__":
    for name in RUNS:
        model, losses = train(name, Path(sys.argv[1]) / name, resume=True)
    end_together()  # as programs do: a process that leaves with its connections open may abort
