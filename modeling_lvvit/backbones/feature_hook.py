"""Where an image classifier has the features that its head reads, and taking them out of a forward pass."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .feature_layout import FeatureMap
from .feature_search import FeatureSearch, output_logits, probe_images
from .loading import FORWARD_ERRORS, library_errors


logger = logging.get_logger(__name__)
# weights all below this let nothing through yet: zero-initialized heads and branches, layer scale of 1e-6 (CaiT, ConvNeXt)
ALL_BUT_ZERO = 1e-2
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class FeatureHook:
    """Where the features of the patch head come from.

    Args:
        feature_map: Where they are.
        image_size: Height and width of the images in pixels.
        forward_options: Keyword arguments of every forward pass.
    """

    feature_map: FeatureMap
    image_size: tuple[int, int]
    forward_options: dict[str, Any]
    calls: int = 0
    is_open: bool = False
    features: torch.Tensor | None = None

    def open(self) -> None:
        """Begins a forward pass; outside of one nothing is stored."""
        self.calls, self.is_open = 0, True

    def close(self) -> None:
        """Ends it."""
        self.is_open, self.features = False, None

    def store(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of the layer."""
        if not self.is_open:
            return
        if self.calls == self.feature_map.call:
            self.features = self.feature_map.select_tensor(output)
        self.calls += 1

    def take(self) -> torch.Tensor:
        """The features of the forward pass, `(B, rows * columns, channels)`."""
        cells = self.feature_map.flatten_cells(self.features)
        if cells.shape[1] != self.feature_map.num_cells:
            raise ValueError(
                f"The patch head was made for images of {_product(self.image_size)} pixels, on which the model has "
                f"{_product(self.feature_map.grid_size)} cells; these give {cells.shape[1]} cells."
            )
        return cells


def find_features(
    model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]
) -> tuple[FeatureHook, int, bool]:
    """Where the features are, how wide, and whether they were normalized."""
    name = getattr(model.config, "architecture", None) or type(model).__name__
    try:
        search, feature_map = _search(model, image_size, options)
    except ValueError as error:
        reason = _too_few_cells(model, image_size, options) or error
        raise ValueError(
            f"{name} cannot learn from token labels on images of {_product(image_size)} pixels: {reason}"
        ) from error
    if min(feature_map.grid_size) < 2:
        raise ValueError(
            f"{name} has {_product(feature_map.grid_size)} cells on images of {_product(image_size)} pixels; "
            "token labels need at least 2 x 2. Take larger images."
        )
    with torch.no_grad():
        features = search.features(search.images, feature_map)
    is_normed = isinstance(search.model.get_submodule(feature_map.module_name), NORMS)
    return FeatureHook(feature_map, image_size, dict(options)), features.shape[-1], is_normed


def _search(
    model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]
) -> tuple[FeatureSearch, FeatureMap]:
    """The search in a copy of a model, and its result."""
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
        with library_errors(FORWARD_ERRORS):
            copied(probe_images(image_size).to(copied.device), **options)
    return copied.eval()


def _too_few_cells(model: PreTrainedModel, image_size: tuple[int, int], options: dict[str, Any]) -> str | None:
    """The reason for a failure, if it is that images are too small: on larger ones the same model has so few cells that none or one
    remain."""
    for factor in (2, 4):
        larger = (factor * image_size[0], factor * image_size[1])
        try:
            grid = _search(model, larger, options)[1].grid_size
        except ValueError:
            continue
        if min(grid) // factor > 1:  # then it has another reason
            return None
        return f"on images of {_product(larger)} it has {_product(grid)} cells, on these fewer than the 2 x 2 that token labels need."
    return None


def unused_parameters(model: PreTrainedModel, hook: FeatureHook) -> list[str]:
    """Parameters without influence on logits and features."""
    copied = copy.deepcopy(model).float().eval()
    hook = copy.copy(hook)
    hook.open()
    copied.get_submodule(hook.feature_map.module_name).register_forward_hook(hook.store)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    images = probe_images(hook.image_size).to(copied.device)
    logits = output_logits(copied(images, **hook.forward_options))
    (logits.float().sum() + hook.take().float().sum()).backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = [name for name, parameter in copied.named_parameters() if parameter.grad is None and name in trained]
    if unused:
        logger.info("Parameters without influence on the logits, which are not trained: %s.", ", ".join(unused))
    return unused


def _product(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
