"""No training step waits for its device: nothing is read from it, and nothing is copied to it on the way."""

import copy
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_lvvit.annotators.annotator import Annotator, Preprocessing
from modeling_lvvit.data.classes.class_matching import ClassMap
from modeling_lvvit.token_labeling import OnlineAnnotator, TokenLabelDataset, TokenLabelTrainer, finish_images
from support.models import NUM_CLASSES
from support.samples import plain_transform, samples_of
from support.trainers import arguments


READS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
}
READING_METHODS = ("cpu", "numpy", "tolist", "__array__")  # which read the memory of a CPU tensor without an operation
MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
MOVED = {"rand_augment": "rand-m9-mstd0.5-inc1", "horizontal_flip": 0.5, "random_erasing": 0.25}
OPTIONS = {
    "tokens mixed": {},
    "cutmix": {"mix_methods": ["cutmix"]},
    "mixup": {"mix_methods": ["mixup"]},
    "not mixed, class weights, blended": {"mix_probability": 0.0, "class_weights": "balanced", "cls_target": "blend"},
    "cells in doubt": {"cell_target": "label", "cell_doubt": "either"},
    "cells left out": {"cell_target": "ignore", "uncovered_tokens": "ignore"},
    "image targets": {"patch_target": "image", "cls_target": "label"},
}


class HostReads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, for which a processor would wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name().split(".")[0] in READS
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._patches = ExitStack()
        for name in READING_METHODS:
            self._patches.enter_context(patch.object(torch.Tensor, name, self._counted(getattr(torch.Tensor, name))))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def _counted(self, method):
        def call(tensor, *args, **kwargs):
            caller = Path(sys._getframe(1).f_code.co_filename)
            self.count += caller.name != "sampler.py"  # the order of the images, which no device has
            return method(tensor, *args, **kwargs)

        return call


class Transfers(TorchDispatchMode):
    """Lists operations on tensors of the meta device, a stand-in for a GPU, that take tensors with values of the CPU too, or copy between
    both. To read a tensor of that device is an error of PyTorch itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {
            tensor.device.type for tensor in tensors if tensor.ndim or function.name().startswith("aten::_to_copy")
        }
        if len(devices) > 1:
            self.found.append(function.name())
        return result


class NumbersToDevice(TorchFunctionMode):
    """Lists tensors of the meta device that are made of Python's numbers, whose copy a processor waits for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in MAKERS:
            is_copied = result.is_meta
        else:
            is_copied = function in INDEXING and args[0].is_meta and self._has_numbers(args[1])
        if is_copied:
            self.found.append(f"{function.__name__} of {args}")
        return result

    @staticmethod
    def _has_numbers(index) -> bool:
        return any(isinstance(part, (list, np.ndarray)) for part in (index if isinstance(index, tuple) else [index]))


class Cells(nn.Module):
    """Scores each cell of 8 x 8 pixels."""

    grid_size = (4, 6)

    def __init__(self):
        super().__init__()
        self.scorer = nn.Conv2d(3, NUM_CLASSES + 1, kernel_size=8, stride=8)

    def forward(self, pixel_values):
        return self.scorer(pixel_values)


def live_annotator(**options) -> OnlineAnnotator:
    """One with other images and classes than the student, and erasing."""
    groups = ((0, 7), *((index,) for index in range(1, NUM_CLASSES)))
    names = [f"class {index}" for index in range(NUM_CLASSES + 1)]
    preprocessing = Preprocessing((32, 48), (0.01,) * 3, (-1.5,) * 3)
    annotator = Annotator("cells", Cells(), names, preprocessing, class_map=ClassMap(groups, NUM_CLASSES + 1))
    return OnlineAnnotator(annotator, [0.5] * 3, [0.5] * 3, random_erasing=0.5, **options)


def trainer_with(model, rows, folder, sampling=None, **options) -> TokenLabelTrainer:
    """With stored label maps, or the live annotator where `sampling` names how it draws classes."""
    annotator = None if sampling is None else live_annotator(draws_classes=sampling == "hard")
    transform = plain_transform(**MOVED)
    samples = samples_of(rows, transform) if annotator is None else TokenLabelDataset(rows, transform)
    settings = arguments(folder, logging_strategy="no", **options)
    return TokenLabelTrainer(copy.deepcopy(model), settings, train_dataset=samples, annotator=annotator)


def to_meta(trainer: TokenLabelTrainer, batch: dict) -> dict:
    """Puts all that a step computes with on the meta device; returns the batch there."""
    trainer.model.to("meta")
    if trainer.class_weights is not None:
        trainer.objective.class_weights = trainer.objective.class_weights.to("meta")
    if (annotator := trainer.annotator) is not None:
        annotator.annotator.dense.to("meta")
        annotator.random_erasing.device = "meta"
        for name in ("bad_images", "image_mean", "image_std"):
            setattr(annotator, name, getattr(annotator, name).to("meta"))
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


LABELS = [(name, sampling) for name in OPTIONS for sampling in (None, "soft", "hard")]


@pytest.mark.parametrize(
    ("name", "sampling"), [pair for pair in LABELS if pair[0] != "image targets" or pair[1] is None]
)
def test_no_loss_waits_for_the_device(tiny_model, labelled_rows, tmp_path, name, sampling):
    """On a device without values, so that to ask for one is an error. The first step makes what later ones share."""
    trainer = trainer_with(tiny_model, labelled_rows, tmp_path, sampling, **OPTIONS[name])
    samples = trainer.train_dataset.__getitems__(list(range(8)))
    batch = to_meta(trainer, trainer.data_collator(samples))
    if sampling is None:
        batch["crop_cells"] = [(9, 9), (60, 60)] * 4  # of which some need more points than others
    batch.pop("erased", None)  # no generator of noise is for this device
    model = trainer.model.train()
    trainer.compute_loss(model, finish_images(batch)).backward()
    with Transfers() as transfers, NumbersToDevice() as numbers:
        trainer.compute_loss(model, finish_images(batch)).backward()
    assert transfers.found + numbers.found == []
    assert all(weight.grad.is_meta for weight in model.parameters())


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        (None, {"max_grad_norm": 1.0, "class_weights": "balanced", "mix_methods": ["cutmix", "mixup"]}),
        (None, {"bf16": True, "ema_decay": 0.9, "gradient_accumulation_steps": 2}),
        ("soft", {"ema_decay": 0.9}),
    ],
)
def test_no_step_waits_for_the_device(tiny_model, labelled_rows, tmp_path, sampling, options):
    """Longer runs read no more values than short ones. The loader works in a process of its own, as in real runs."""
    counts = []
    for steps in (2, 6):
        sizes = {"max_steps": steps, "per_device_train_batch_size": 1}  # all steps within one epoch
        trainer = trainer_with(
            tiny_model, labelled_rows, tmp_path, sampling, dataloader_num_workers=1, **sizes, **options
        )
        with HostReads() as reads:
            trainer.train()
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_reads_and_transfers_are_seen():
    values, device_values = torch.ones(3), torch.ones(3, device="meta")
    with HostReads() as reads:
        values.sum().item(), bool(values.sum()), values.tolist(), values.cpu(), values.numpy(), values.nonzero()
    assert reads.count == 6
    with Transfers() as transfers, NumbersToDevice() as numbers:
        values.to("meta"), device_values[torch.tensor([0, 2])], device_values * torch.tensor(2.0)
        device_values[[0, 2]], device_values.new_tensor([1.0])
    assert [name.split(".")[0] for name in transfers.found] == ["aten::_to_copy", "aten::index"]
    assert [text.split()[0] for text in numbers.found] == ["__getitem__", "new_tensor"]
    for read in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(device_values)
