"""Short runs of the programs on stored data, whose losses are stored too: see `tests/golden` and `tests/old_checkpoints`.

All that the runs read is stored, too: what makes it may change.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

import train_tl
from modeling_lvvit.segmentation import train as segmentation
from modeling_lvvit.training.base_trainer import BaseImageTrainer


GOLDEN = Path(__file__).parents[1] / "golden"
STORED = ("data", "annotator")  # in `GOLDEN`
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
LVVIT = {**VIT, "stem_hidden_size": 8, "drop_path_rate": 0.1}
SEGMENTER = {**LVVIT, "num_hidden_layers": 4, "neck_channels": 8, "decoder_channels": 8}
LIBRARIES = ("accelerate", "datasets", "numpy", "pillow", "timm", "torch", "torchvision", "transformers")


@dataclass(frozen=True)
class Run:
    """A run of a program: a recipe, made small by another one.

    Args:
        recipe: Its name.
        config: Fields of the model's configuration.
        options: Further options.
        small: The recipe that makes it small, in `GOLDEN`.
        main: The program.
    """

    recipe: str
    config: dict[str, float]
    options: tuple[str, ...] = ()
    small: str = "train.yaml"
    main: Callable[[list[str]], None] = train_tl.main

    def losses(self, *more: str) -> list[float]:
        """Trains in the folder `run` of the present one; the losses of the steps that are made."""
        options = ["--config_overrides", json.dumps(self.config), *self.options, *more]
        with recorded_losses() as losses:
            self.main([self.recipe, str(GOLDEN / self.small), *options])
        return losses


WITHOUT_MAPS = ("--use_token_labels", "false")
RUNS = {
    "dense labels, weight average": Run("lvvit_s_224", LVVIT),
    "plain labels": Run("lvvit_s_224_plain", LVVIT),
    "annotator in training": Run("annotator_study/student_1", LVVIT, (*WITHOUT_MAPS, "--annotator", "annotator")),
    "several classes an image": Run("own_images", LVVIT, (*WITHOUT_MAPS, "--label_column_name", "labels")),
    # batch norms over the few pooled pixels of such images magnify rounding: 7e-5 of a loss between versions of torch
    "segmentation": Run("upernet_s", SEGMENTER, ("--batch_norm", "frozen"), "segment.yaml", segmentation.main),
    "patch head on a ViT": Run("architectures/vit", VIT),
}


@contextmanager
def recorded_losses() -> Iterator[list[float]]:
    """The list that receives the loss of each step that a Trainer makes in the block, from `fixed_weights`."""
    losses, training_step, train = [], BaseImageTrainer.training_step, BaseImageTrainer.train

    def from_fixed_weights(self, *args, **kwargs):
        fixed_weights(self.model)  # a checkpoint is loaded over them
        return train(self, *args, **kwargs)

    def recording(self, *args, **kwargs) -> torch.Tensor:
        loss = training_step(self, *args, **kwargs)
        losses.append(loss.item())
        return loss

    with mock.patch.multiple(BaseImageTrainer, train=from_fixed_weights, training_step=recording):
        yield losses


@torch.no_grad()
def fixed_weights(model: torch.nn.Module) -> None:
    """Fills matrices and kernels with numbers that are the same in all versions of NumPy; those that torch draws are not in its versions."""
    generator = np.random.RandomState(0)
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            weight.copy_(torch.from_numpy(0.1 * generator.standard_normal(weight.shape)))


@contextmanager
def run_folder(folder: Path, threads: int = 1) -> Iterator[None]:
    """A block in a folder with links to the stored data, so that nothing that is written holds a path of this machine."""
    for name in STORED:
        (folder / name).symlink_to(GOLDEN / name)
    before, number = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        os.chdir(before)
        torch.set_num_threads(number)


def weight_norm(file: Path) -> float:
    """Root of the sum of the squares of all saved numbers: the weight average, where a run has one."""
    return sum(tensor.double().square().sum().item() for tensor in load_file(file).values()) ** 0.5


def versions() -> dict[str, str]:
    """What recorded numbers were made with."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
