"""Classifiers on images of another size than they were made for."""

import copy
import inspect
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from .feature_layout import MAX_PREFIX_TOKENS
from .feature_search import LAYOUT_ERRORS, output_logits, probe_images


RELATIVE_TABLE = "relative_position_bias_table"  # a row for each offset of two cells
CLASS_TOKEN_ROWS = 3  # and in BEiT these, for the class token


def own_image_size(model: nn.Module) -> tuple[int, int] | None:
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
    return _can_interpolate(model) and own_image_size(model) != tuple(image_size)


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
    image_size, old_size = tuple(image_size), own_image_size(model)
    if old_size in (None, image_size):
        return model
    try:
        resized = _rebuilt(model, old_size, image_size)
        if not _is_right(model, resized, old_size, image_size):
            return model
    except LAYOUT_ERRORS:
        return model
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in resized.named_parameters():
        parameter.requires_grad_(trains[name])
    if model.is_gradient_checkpointing:
        resized.gradient_checkpointing_enable()
    return resized.to(next(model.parameters())).train(model.training)


def _rebuilt(model: PreTrainedModel, old_size: tuple[int, int], image_size: tuple[int, int]) -> PreTrainedModel:
    """A model of the new size in float32, on the device of the old one."""
    config = copy.deepcopy(model.config)
    height, width = image_size
    if isinstance(model, TimmWrapperForImageClassification):
        config.model_args = {**(config.model_args or {}), "img_size": [height, width]}
    else:
        part = vision_config(config)
        is_number = height == width and not isinstance(part.image_size, (list, tuple))
        part.image_size = height if is_number else [height, width]
    with torch.random.fork_rng(devices=[]):
        copied = type(model)(config)
    state = model.state_dict()
    for name, value in copied.state_dict().items():
        if name not in state or state[name].shape == value.shape:
            continue
        if not value.is_floating_point():  # an index of cells
            state[name] = value
        elif name.endswith(RELATIVE_TABLE):
            state[name] = _resize_offsets(state[name], len(value), old_size, image_size)
        elif "pos" in name:
            # the two libraries differ in how they make a table smaller
            is_timm = isinstance(model, TimmWrapperForImageClassification)
            state[name] = _resize_positions(state[name], value.shape, old_size, image_size, is_timm)
    copied.load_state_dict(state)
    return copied.float().to(next(model.parameters()).device)


def _resize_positions(
    table: torch.Tensor, shape: torch.Size, old_size: tuple[int, int], image_size: tuple[int, int], antialias: bool
) -> torch.Tensor:
    """A position table `(..., prefix + rows * columns, channels)` for another grid, bicubic as in ViT; prefix tokens stay.

    Raises:
        ValueError: If it is no such table.
    """
    prefix, old_grid, grid = _grids(table.shape[-2], shape[-2], old_size, image_size)
    rows = table.reshape(table.shape[-2:])
    cells = rows[prefix:].unflatten(0, old_grid).permute(2, 0, 1).unsqueeze(0)  # (1, C, rows, columns)
    cells = nn.functional.interpolate(cells.float(), size=grid, mode="bicubic", antialias=antialias)
    return torch.cat([rows[:prefix], cells[0].flatten(1).mT.to(rows)]).view(shape)


def _grids(
    old_length: int, length: int, old_size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Prefix tokens, old grid and new grid of two position tables: the square patches that leave over the same few rows of both.

    Raises:
        ValueError: If there are none.
    """
    found = []
    for patch_size in range(1, min(*old_size, *image_size) + 1):
        old_grid, grid = (tuple(side // patch_size for side in size) for size in (old_size, image_size))
        prefix = old_length - math.prod(old_grid)
        if 0 <= prefix <= MAX_PREFIX_TOKENS and length - math.prod(grid) == prefix:
            found.append((prefix, old_grid, grid))
    if not found:
        raise ValueError(f"Tables of {old_length} and {length} rows are no position tables of such images.")
    return min(found)


def _resize_offsets(
    table: torch.Tensor, length: int, old_size: tuple[int, int], image_size: tuple[int, int]
) -> torch.Tensor:
    """A table of relative positions for another grid: of all cells, `((2 rows - 1) * (2 columns - 1) + 3, heads)`, bilinear as in
    BEiT; or of the cells of a square window, `((2 side - 1)^2, heads)`, bicubic as in Swin.

    Raises:
        ValueError: If it is no such table.
    """
    old, new = _offset_grid(len(table), old_size), _offset_grid(length, image_size)
    extra = len(table) - math.prod(old)
    offsets = table[: math.prod(old)].unflatten(0, old).permute(2, 0, 1).unsqueeze(0)  # (1, heads, 2 rows - 1, ...)
    offsets = nn.functional.interpolate(offsets.float(), size=new, mode="bilinear" if extra else "bicubic")
    return torch.cat([offsets[0].flatten(1).mT.to(table), table[math.prod(old) :]])


def _offset_grid(length: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Numbers of vertical and horizontal offsets between the cells of an image."""
    for patch_size in range(1, min(image_size) + 1):
        rows, columns = (2 * (side // patch_size) - 1 for side in image_size)
        if rows * columns + CLASS_TOKEN_ROWS == length:
            return rows, columns
    for side in range(1, length, 2):
        if side * side == length:
            return side, side
    raise ValueError(f"A table of {length} rows does not hold the offsets of cells of {image_size} pixels.")


@torch.no_grad()
def _is_right(
    model: PreTrainedModel, resized: PreTrainedModel, old_size: tuple[int, int], image_size: tuple[int, int]
) -> bool:
    """Whether a resized model runs, and gives the logits of the old one where that resizes its tables itself; in float32."""
    images = probe_images(image_size).to(next(model.parameters()).device)
    found = output_logits(resized.eval()(images))
    is_square = old_size[0] == old_size[1]  # transformers takes other tables for square ones
    options = {"interpolate_pos_encoding": True} if _can_interpolate(model) else {}
    try:
        expected = output_logits(copy.deepcopy(model).float().eval()(images, **options)) if is_square else found
    except LAYOUT_ERRORS:  # it takes no other size
        return True
    spread = (expected[0] - expected[1]).abs().max().item()
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * spread)


def _can_interpolate(model: nn.Module) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def vision_config(config: Any) -> Any:
    """The part of a configuration that describes the image model."""
    return getattr(config, "vision_config", config)
