"""Classifiers on images of another size than they were made for."""

import copy
import inspect
import math
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification
from transformers.utils import logging

from .feature_layout import MAX_PREFIX_TOKENS
from .feature_search import output_logits, probe_images
from .loading import BUILDING_ERRORS, FORWARD_ERRORS, first_line, library_errors


logger = logging.get_logger(__name__)
RELATIVE_TABLE = "relative_position_bias_table"  # a row for each offset of two cells


def native_image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels for which a model was made; `None` if it does not say or takes any size."""
    if isinstance(model, PreTrainedModel) and not isinstance(model, TimmWrapperForImageClassification):
        size = getattr(vision_config(model.config), "image_size", None)
    else:
        size = getattr(getattr(getattr(model, "timm_model", model), "patch_embed", None), "img_size", None)
    if size is None:
        return None
    return tuple(size[-2:]) if isinstance(size, (list, tuple)) else (size, size)


def must_interpolate(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether position tables are to be resized in every forward pass: at their own size that is no use, and wrong for tables that
    are not square, which transformers takes for square ones."""
    return _can_interpolate(model) and native_image_size(model) != tuple(image_size)


def forward_options(model: nn.Module, image_size: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments of every forward pass on images of a size."""
    return {"interpolate_pos_encoding": True} if must_interpolate(model, image_size) else {}


def fit_classifier(model: PreTrainedModel, image_size: tuple[int, int]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A classifier that takes images of a size, if it can be made so, and the keyword arguments of its forward passes on them."""
    options = forward_options(model, image_size)
    return (model, options) if options else (resize_classifier(model, image_size), {})


def resize_classifier(model: PreTrainedModel, image_size: tuple[int, int]) -> PreTrainedModel:
    """A classifier made for images of another size: its position tables are resized once, as it would itself do in every forward
    pass, and whoever loads it later gives it images of the new size without further ado.

    Args:
        model: Image classifier of transformers, or `TimmWrapperForImageClassification`.
        image_size: New height and width in pixels.

    Raises:
        ValueError: If it has a patch head already.

    Returns:
        A new model with the weights of the old one; or the old one, if it has no fixed size or cannot be changed.
    """
    if hasattr(model, "feature_hook"):
        raise ValueError("Resize the model before it gets its patch head, which is made for one size.")
    image_size, old_size = tuple(image_size), native_image_size(model)
    if old_size in (None, image_size):
        return model
    try:
        resized = _rebuild(model, old_size, image_size)
        _check_resized(model, resized, old_size, image_size)
    except ValueError as error:
        logger.warning(
            "%s stays a model for images of %d x %d pixels: %s", type(model).__name__, *old_size, first_line(error)
        )
        return model
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in resized.named_parameters():
        parameter.requires_grad_(trains[name])
    if model.is_gradient_checkpointing:
        resized.gradient_checkpointing_enable()
    return resized.to(next(model.parameters())).train(model.training)


def _rebuild(model: PreTrainedModel, old_size: tuple[int, int], image_size: tuple[int, int]) -> PreTrainedModel:
    """A model of the new size in float32, on the device of the old one.

    Raises:
        ValueError: If it cannot be built, or has other weights than position tables that depend on the size.
    """
    config = copy.deepcopy(model.config)
    height, width = image_size
    if isinstance(model, TimmWrapperForImageClassification):
        config.model_args = {**(config.model_args or {}), "img_size": [height, width]}
    else:
        part = vision_config(config)
        is_number = height == width and not isinstance(part.image_size, (list, tuple))
        part.image_size = height if is_number else [height, width]
    with torch.random.fork_rng(devices=[]), library_errors(BUILDING_ERRORS):
        rebuilt = type(model)(config)
    state = model.state_dict()
    for name, value in rebuilt.state_dict().items():
        if name not in state or state[name].shape == value.shape:
            continue
        if not value.is_floating_point():  # an index of cells
            state[name] = value
        elif name.endswith(RELATIVE_TABLE):
            state[name] = _resize_relative_table(name, model, rebuilt)
        elif "pos" in name and value.ndim < 4:
            prefix, old_grid, grid = _grids(state[name].shape[-2], value.shape[-2], old_size, image_size)
            table = state[name].view(1, *state[name].shape[-2:])
            # the two libraries differ in how they make a table smaller
            antialias = isinstance(model, TimmWrapperForImageClassification)
            table = resample_abs_pos_embed(table, grid, old_grid, prefix, antialias=antialias)
            state[name] = table.view(value.shape)
        else:
            raise ValueError(f"Its weight {name} depends on the size.")
    rebuilt.load_state_dict(state)
    return rebuilt.float().to(model.device)


def _grids(
    old_length: int, length: int, old_size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Prefix tokens, old grid and new grid of two position tables: the square patches that leave over the same few rows of both.

    Raises:
        ValueError: If there are none.
    """
    fitting = []
    for patch_size in range(1, min(*old_size, *image_size) + 1):
        old_grid, grid = (tuple(side // patch_size for side in size) for size in (old_size, image_size))
        prefix = old_length - math.prod(old_grid)
        if 0 <= prefix <= MAX_PREFIX_TOKENS and length - math.prod(grid) == prefix:
            fitting.append((prefix, old_grid, grid))
    if not fitting:
        raise ValueError(f"Tables of {old_length} and {length} rows are no position tables of such images.")
    return min(fitting)


def _resize_relative_table(name: str, model: PreTrainedModel, rebuilt: PreTrainedModel) -> torch.Tensor:
    """A table of relative positions, `((2 rows - 1) * (2 columns - 1) + class token, heads)`, for the windows of another model: as
    timm does it, or bilinear as BEiT in transformers does in each forward pass."""
    layer, table, shape = name.rpartition(".")[0], model.state_dict()[name], rebuilt.state_dict()[name].shape
    old_window, window = (part.get_submodule(layer).window_size for part in (model, rebuilt))
    if isinstance(model, TimmWrapperForImageClassification):
        return resize_rel_pos_bias_table(table, window, shape, old_window)
    old, new = ([2 * side - 1 for side in sides] for sides in (old_window, window))
    offsets = table[: math.prod(old)].unflatten(0, old).permute(2, 0, 1).unsqueeze(0)  # (1, heads, 2 rows - 1, ...)
    offsets = nn.functional.interpolate(offsets.float(), size=new, mode="bilinear")
    return torch.cat([offsets[0].flatten(1).mT.to(table), table[math.prod(old) :]])


@torch.no_grad()
def _check_resized(
    model: PreTrainedModel, resized: PreTrainedModel, old_size: tuple[int, int], image_size: tuple[int, int]
) -> None:
    """Raises a `ValueError` if a resized model does not run, or gives other logits than the old one, in float32, where that resizes its
    tables itself."""
    images = probe_images(image_size).to(model.device)
    with library_errors(FORWARD_ERRORS):
        logits = output_logits(resized.eval()(images))
    if old_size[0] != old_size[1]:  # transformers takes such tables for square ones
        return
    options = {"interpolate_pos_encoding": True} if _can_interpolate(model) else {}
    try:
        expected = output_logits(copy.deepcopy(model).float().eval()(images, **options))
    except FORWARD_ERRORS:  # it takes no other size
        return
    spread = (expected[0] - expected[1]).abs().max().item()
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * spread):
        raise ValueError("Its forward pass resizes its tables in another way.")


def _can_interpolate(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def vision_config(config: Any) -> Any:
    """The part of a configuration that describes the image model."""
    return getattr(config, "vision_config", config)
