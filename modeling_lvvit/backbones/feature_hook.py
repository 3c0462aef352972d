"""Where an image classifier has the features that its head reads, and taking them out of a forward pass."""

import copy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .feature_layout import FeatureLayout, FeatureMap
from .feature_search import LAYOUT_ERRORS, FeatureSearch, output_logits, probe_images


logger = logging.get_logger(__name__)
# weights all below this let nothing through yet: zero-initialized heads and branches, layer scale of 1e-6 (CaiT, ConvNeXt)
ALL_BUT_ZERO = 1e-2
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(kw_only=True)
class FeatureHook(FeatureLayout):
    """Where the features of the patch head come from.

    Args:
        module_name: Layer whose output they are.
        call: Which of its calls within a forward pass, from 0.
        image_size: Height and width of the images in pixels.
        forward_options: Keyword arguments of every forward pass.
    """

    module_name: str
    call: int
    image_size: tuple[int, int]
    forward_options: dict[str, Any]
    calls: int = 0
    is_open: bool = False
    kept: torch.Tensor | None = None

    def open(self) -> None:
        """Begins a forward pass; outside of one nothing is kept."""
        self.calls, self.is_open = 0, True

    def close(self) -> None:
        """Ends it."""
        self.is_open, self.kept = False, None

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of the layer."""
        if not self.is_open:
            return
        if self.calls == self.call:
            self.kept = self.select_tensor(output)
        self.calls += 1

    def take(self) -> torch.Tensor:
        """The features of the forward pass, `(B, rows * columns, channels)`."""
        cells = self.flatten_cells(self.kept)
        if cells.shape[1] != self.grid_size[0] * self.grid_size[1]:
            raise ValueError(
                f"The patch head was made for images of {self.image_size[0]} x {self.image_size[1]} pixels, on which the model "
                f"has {self.grid_size[0]} x {self.grid_size[1]} cells; these give {cells.shape[1]} cells."
            )
        return cells


def find_features(
    model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]
) -> tuple[FeatureHook, int, bool]:
    """Where the features are, how wide, and whether they were normalized."""
    name = getattr(model.config, "architecture", None) or type(model).__name__
    try:
        search, found = _search(model, image_size, options)
    except LAYOUT_ERRORS as error:
        reason = _too_few_cells(model, image_size, options) or str(error).splitlines()[0]
        raise ValueError(
            f"{name} cannot learn from token labels on images of {image_size[0]} x {image_size[1]} pixels: {reason}"
        ) from error
    if min(found.grid_size) < 2:
        raise ValueError(
            f"{name} has {found.grid_size[0]} x {found.grid_size[1]} cells on images of {image_size[0]} x {image_size[1]} pixels; "
            "token labels need at least 2 x 2. Take larger images."
        )
    names = {module: name for name, module in search.model.named_modules()}
    layout = {entry.name: getattr(found, entry.name) for entry in fields(FeatureLayout)}
    hook = FeatureHook(
        module_name=names[found.module],
        call=found.call,
        image_size=image_size,
        forward_options=dict(options),
        **layout,
    )
    with torch.no_grad():
        features = search.features(probe_images(image_size).to(next(model.parameters()).device), found)
    return hook, features.shape[-1], isinstance(found.module, NORMS)


def _search(
    model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]
) -> tuple[FeatureSearch, FeatureMap]:
    """The search in a copy of a model, and what it found."""
    search = FeatureSearch(_awake_copy(model, image_size, options), image_size, options)
    return search, search.find(is_run_on_cells=False)


@torch.no_grad()
def _awake_copy(model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]) -> PreTrainedModel:
    """A copy for evaluation that tells two images apart: what an untrained model has at zero is given noise, and batch norms
    take their statistics from the images."""
    copied = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in copied.named_parameters():
        if parameter.numel() and not name.endswith("bias") and parameter.abs().max() < ALL_BUT_ZERO:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(noise.to(parameter.device))
    norms = [module for module in copied.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if norms:
        copied.eval()
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        copied(probe_images(image_size).to(next(copied.parameters()).device), **options)
    return copied.eval()


def _too_few_cells(model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]) -> str | None:
    """The reason for a failure, if it is that images are too small: on larger ones the same model has so few cells that none or one
    remain."""
    for factor in (2, 4):
        larger = (factor * image_size[0], factor * image_size[1])
        try:
            grid = _search(model, larger, options)[1].grid_size
        except LAYOUT_ERRORS:
            continue
        if min(grid) // factor > 1:  # then it has another reason
            return None
        return (
            f"on images of {larger[0]} x {larger[1]} it has {grid[0]} x {grid[1]} cells, on these fewer than the 2 x 2 that token "
            "labels need."
        )
    return None


def unused_parameters(model: PreTrainedModel, hook: FeatureHook) -> list[str]:
    """Parameters without influence on logits and features."""
    copied = copy.deepcopy(model).float().eval()
    hook = copy.copy(hook)
    hook.open()
    copied.get_submodule(hook.module_name).register_forward_hook(hook.keep)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    images = probe_images(hook.image_size).to(next(copied.parameters()).device)
    logits = output_logits(copied(images, **hook.forward_options))
    (logits.float().sum() + hook.take().float().sum()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in copied.named_parameters() if parameter.grad is None and name in trained]
    if idle:
        logger.info("No part in the logits, and not trained: %s.", ", ".join(idle))
    return idle
