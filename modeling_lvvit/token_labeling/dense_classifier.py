"""Turns any image classifier into a dense one: its own head applied to each cell of its last feature map.

No table of model families is needed. The last layer with a spatial output is found by running the classifier once; from
then on a hook cuts that output into single cells, so that whatever follows (pooling, norms, class token, linear layers)
runs on one cell at a time. Pooling one cell gives the cell itself, hence the result is what the annotators of the paper
computed: the classifier at each cell. A reading of the output is accepted only after it passed the checks of `_Tap`.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


MAX_PREFIX_TOKENS = 16  # class, distillation and register tokens in front of the patch tokens
MAX_CANDIDATES = (
    16  # layer outputs looked at, from the last one backwards: a reading further back would skip real layers
)
# what models raise for pictures, or heads for features, in a layout that they were not made for
LAYOUT_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


def logits_of(output: Any) -> torch.Tensor:
    """Logits `(B, C)` of an image classifier of transformers or timm."""
    return output if isinstance(output, torch.Tensor) else output.logits


@dataclass
class _Tap:
    """The layer output that is cut into cells, and how it is laid out.

    Args:
        module: Layer.
        call: Which of its calls within one forward pass, from 0.
        layout: `"channels_first"` `(B, C, rows, columns)`, `"channels_last"` `(B, rows, columns, C)`, or `"tokens"`
            `(B, prefix + rows * columns, C)`.
        grid_size: Rows and columns.
        prefix: Tokens before the patch tokens.
        class_token: Whether the head reads the prefix only; a patch token then takes the place of the class token.
    """

    module: nn.Module
    call: int
    layout: Literal["channels_first", "channels_last", "tokens"]
    grid_size: tuple[int, int]
    prefix: int = 0
    class_token: bool = False

    def cells(self, features: torch.Tensor) -> torch.Tensor:
        """Every cell as a sample of its own, batch size times cells, row-major, in the layout of the features."""
        if self.layout == "channels_first":
            return features.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]  # (B * N, C, 1, 1)
        if self.layout == "channels_last":
            return features.flatten(0, 2)[:, None, None, :]  # (B * N, 1, 1, C)
        patches = features[:, self.prefix :].flatten(0, 1).unsqueeze(1)  # (B * N, 1, C)
        if self.class_token:
            return patches.expand(-1, self.prefix + 1, -1)
        number = features.shape[1] - self.prefix
        prefix = features[:, : self.prefix].repeat_interleave(number, dim=0)
        return torch.cat([prefix, patches], dim=1)  # (B * N, prefix + 1, C)

    def patches_replaced(self, features: torch.Tensor, uniform: bool) -> torch.Tensor:
        """Features whose cells all hold their mean (`uniform`) or zero; prefix tokens stay."""
        axes = {"channels_first": (2, 3), "channels_last": (1, 2), "tokens": (1,)}[self.layout]
        patches = features[:, self.prefix :] if self.layout == "tokens" else features
        new = patches.mean(dim=axes, keepdim=True).expand_as(patches) if uniform else torch.zeros_like(patches)
        return torch.cat([features[:, : self.prefix], new], dim=1) if self.layout == "tokens" else new


class DenseClassifier(nn.Module):
    """Applies an image classifier at each cell of its last feature map.

    Args:
        model: Classifier in evaluation mode: `pixel_values` to logits, or to an output with `logits`.
        image_size: Height and width in pixels of the pictures that will be given.
        forward_options: Keyword arguments of every forward pass.

    Raises:
        ValueError: If no layer output passes the checks: its cells must determine the logits alone, and cells that are all
            alike must each give the logits of the whole picture.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], forward_options: dict[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.forward_options = forward_options or {}
        self.tap = self._find_tap(two_pictures(image_size).to(next(model.parameters()).device))

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        return self.tap.grid_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, height, width)` to logits `(B, C, rows, columns)`."""
        logits = self._run(pixel_values, self.tap, self.tap.cells)
        return logits.unflatten(0, (len(pixel_values), *self.grid_size)).permute(0, 3, 1, 2)

    def _run(self, pixel_values: torch.Tensor, tap: _Tap, change) -> torch.Tensor:
        """Logits when the features at `tap` are replaced by `change(features)`."""
        calls = 0

        def replace(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            nonlocal calls
            calls += 1
            return change(output) if calls == tap.call + 1 else None

        handle = tap.module.register_forward_hook(replace)
        try:
            return logits_of(self.model(pixel_values, **self.forward_options))
        finally:
            handle.remove()

    @torch.no_grad()
    def _find_tap(self, example: torch.Tensor) -> _Tap:
        outputs, logits = self._record(example)
        spread = (logits[0] - logits[1]).abs().max().item()
        if not spread > 1e-4 * logits.abs().max().item():
            raise ValueError("It gives every picture the same scores: it is not trained, or its head is empty.")
        grids = [tuple(shape[2:]) for module, _, shape in outputs if isinstance(module, nn.Conv2d)]
        for module, call, shape in outputs[: -MAX_CANDIDATES - 1 : -1]:
            for tap in _readings(module, call, shape, grids, example.shape[-2:]):
                if self._fits(tap, example, logits):
                    return tap
        raise ValueError(
            f"{type(self.model).__name__} has no feature map from which its head reads by pooling or a class token, so its "
            "cells cannot be labelled. Choose a convolutional network or a vision transformer."
        )

    def _record(self, example: torch.Tensor) -> tuple[list[tuple[nn.Module, int, torch.Size]], torch.Tensor]:
        """Layer outputs that could be feature maps, in the order in which they were computed; and the logits."""
        outputs: list[tuple[nn.Module, int, torch.Size]] = []
        calls: dict[nn.Module, int] = {}

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            call = calls[module] = calls.get(module, -1) + 1
            if isinstance(output, torch.Tensor) and output.ndim in (3, 4) and len(output) == len(example):
                outputs.append((module, call, output.shape))

        handles = [module.register_forward_hook(note) for module in self.model.modules()]
        try:
            return outputs, logits_of(self.model(example, **self.forward_options)).float()
        finally:
            for handle in handles:
                handle.remove()

    def _fits(self, tap: _Tap, example: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether the head works on single cells of this reading, and on nothing else."""
        tolerance = 1e-2 * (logits[0] - logits[1]).abs().max().item()

        def agree(left: torch.Tensor, right: torch.Tensor) -> bool:
            return left.shape == right.shape and (left - right).abs().max().item() <= tolerance

        try:
            if not agree(self._run(example, tap, lambda features: features.flip(0)), logits.flip(0)):
                return False  # something passes this layer by
            blank = self._run(example, tap, lambda features: tap.patches_replaced(features, uniform=False))
            tap.class_token = tap.prefix > 0 and agree(blank, logits)
            if tap.class_token:
                cells = self._run(example, tap, tap.cells)
                return len(cells) == len(example) * tap.grid_size[0] * tap.grid_size[1]
            whole = self._run(example, tap, lambda features: tap.patches_replaced(features, uniform=True))
            cells = self._run(example, tap, lambda features: tap.cells(tap.patches_replaced(features, uniform=True)))
            return agree(cells, whole.repeat_interleave(tap.grid_size[0] * tap.grid_size[1], dim=0))
        except LAYOUT_ERRORS:
            return False


def two_pictures(image_size: tuple[int, int]) -> torch.Tensor:
    """Two pictures that even an untrained network tells apart, noise and a slope of brightness, `(2, 3, H, W)`."""
    noise = torch.randn(3, *image_size, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(-2, 2, image_size[1]).expand(3, *image_size)
    return torch.stack([noise, slope])


def must_interpolate(model: nn.Module, image_size: tuple[int, int]) -> bool:
    """Whether a position table must be resized: at its own size that is no use, and wrong for tables that are not square,
    which transformers takes for square ones."""
    own = getattr(getattr(model, "config", None), "image_size", None)
    own = tuple(own) if isinstance(own, (list, tuple)) else (own, own)
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters and own != tuple(image_size)


def _readings(
    module: nn.Module, call: int, shape: torch.Size, grids: list[tuple[int, int]], image_size: tuple[int, int]
) -> list[_Tap]:
    """Ways in which an output of this shape can be a feature map of more than one cell.

    Args:
        module, call, shape: A layer output.
        grids: Rows and columns of all convolutions of the network; that of the patches tells how tokens are laid out.
        image_size: Height and width in pixels.
    """
    if len(shape) == 4:
        first = _Tap(module, call, "channels_first", tuple(shape[2:]))
        last = _Tap(module, call, "channels_last", tuple(shape[1:3]))
        return [tap for tap in (first, last) if tap.grid_size[0] * tap.grid_size[1] > 1]
    fitting = [
        grid for grid in grids if grid[0] * grid[1] > 1 and 0 <= shape[1] - grid[0] * grid[1] <= MAX_PREFIX_TOKENS
    ]
    grid_size = max(fitting, key=lambda grid: grid[0] * grid[1], default=None) or token_grid(shape[1], image_size)
    if grid_size is None:
        return []
    return [_Tap(module, call, "tokens", grid_size, prefix=shape[1] - grid_size[0] * grid_size[1])]


def token_grid(num_tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the largest grid of square patches over the picture that leaves 0 to 16 of the tokens over.

    Args:
        num_tokens: Length of a token sequence, class and register tokens included.
        image_size: Height and width in pixels.

    Example: 197 tokens at 224 x 224 pixels are a grid of 14 x 14 (patches of 16 pixels) and one class token.
    """
    height, width = image_size
    strides = range(1, min(height, width) + 1)
    # patches that fill the picture come first: with few cells another grid might take prefix tokens in
    filling = [stride for stride in strides if height % stride == width % stride == 0]
    for candidates in (filling, strides):
        for stride in candidates:
            rows, columns = height // stride, width // stride
            if 1 < rows * columns <= num_tokens:
                if num_tokens - rows * columns <= MAX_PREFIX_TOKENS:
                    return rows, columns
                break
    return None
