"""Feature maps in the outputs of layers."""

from dataclasses import dataclass
from typing import Any, Literal

import torch


MAX_PREFIX_TOKENS = 16  # class, distillation and register tokens in front of the patch tokens


@dataclass(kw_only=True)
class FeatureMap:
    """A layer output that is a feature map of more than one cell.

    Args:
        module_name: Layer.
        call: Which of its calls within one forward pass, from 0.
        layout: `"channels_first"` `(B, C, rows, columns)`, `"channels_last"` `(B, rows, columns, C)`, or `"tokens"`
            `(B, prefix + rows * columns, C)`.
        grid_size: Rows and columns.
        prefix: Tokens before the patch tokens.
        is_part: Whether the output is a tuple, of which the map is the first part.
        class_token: Whether the head reads the prefix only; a patch token can then take the place of the class token.
    """

    module_name: str
    call: int
    layout: Literal["channels_first", "channels_last", "tokens"]
    grid_size: tuple[int, int]
    prefix: int = 0
    is_part: bool = False
    class_token: bool = False

    @property
    def num_cells(self) -> int:
        """Rows times columns."""
        return self.grid_size[0] * self.grid_size[1]

    def select_tensor(self, output: Any) -> torch.Tensor:
        """The features in their own layout."""
        return output[0] if self.is_part else output

    def flatten_cells(self, features: torch.Tensor) -> torch.Tensor:
        """Features in their own layout to `(B, rows * columns, channels)`, row-major, without prefix."""
        if self.layout == "channels_first":
            return features.flatten(2).mT
        return features.flatten(1, 2) if self.layout == "channels_last" else features[:, self.prefix :]

    def single_cells(self, features: torch.Tensor) -> torch.Tensor:
        """Every cell as a sample of its own, batch size times cells, row-major, in the layout of the features."""
        cells = self.flatten_cells(features).flatten(0, 1)  # (B * N, C)
        if self.layout == "channels_first":
            return cells[:, :, None, None]  # (B * N, C, 1, 1)
        if self.layout == "channels_last":
            return cells[:, None, None, :]  # (B * N, 1, 1, C)
        patches = cells.unsqueeze(1)  # (B * N, 1, C)
        if self.class_token:
            return patches.expand(-1, self.prefix + 1, -1)
        number = features.shape[1] - self.prefix
        prefix = features[:, : self.prefix].repeat_interleave(number, dim=0)
        return torch.cat([prefix, patches], dim=1)  # (B * N, prefix + 1, C)

    def cells_replaced(self, features: torch.Tensor, uniform: bool) -> torch.Tensor:
        """Features whose cells all hold their mean (`uniform`) or zero; prefix tokens stay."""
        axes = {"channels_first": (2, 3), "channels_last": (1, 2), "tokens": (1,)}[self.layout]
        patches = features[:, self.prefix :] if self.layout == "tokens" else features
        new = patches.mean(dim=axes, keepdim=True).expand_as(patches) if uniform else torch.zeros_like(patches)
        return torch.cat([features[:, : self.prefix], new], dim=1) if self.layout == "tokens" else new


def candidate_maps(
    module_name: str,
    call: int,
    is_part: bool,
    shape: torch.Size,
    grids: list[tuple[int, int]],
    image_size: tuple[int, int],
) -> list[FeatureMap]:
    """Ways in which a layer output can be a feature map.

    Args:
        module_name, call, is_part: See `FeatureMap`.
        shape: Of the output.
        grids: Rows and columns of all convolutions of the network; that of the patches tells how tokens are laid out.
        image_size: Height and width in pixels.
    """
    place = {"module_name": module_name, "call": call, "is_part": is_part}
    if len(shape) == 4:
        first = FeatureMap(layout="channels_first", grid_size=tuple(shape[2:]), **place)
        last = FeatureMap(layout="channels_last", grid_size=tuple(shape[1:3]), **place)
        return [candidate for candidate in (first, last) if candidate.num_cells > 1]
    fitting = [
        grid for grid in grids if grid[0] * grid[1] > 1 and 0 <= shape[1] - grid[0] * grid[1] <= MAX_PREFIX_TOKENS
    ]
    grid_size = max(fitting, key=lambda grid: grid[0] * grid[1], default=None) or token_grid(shape[1], image_size)
    if grid_size is None:
        return []
    prefix = shape[1] - grid_size[0] * grid_size[1]
    return [FeatureMap(layout="tokens", grid_size=grid_size, prefix=prefix, **place)]


def token_grid(num_tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the largest grid of square patches over the image that leaves 0 to 16 of the tokens over.

    Args:
        num_tokens: Length of a token sequence, class and register tokens included.
        image_size: Height and width in pixels.

    Example: 197 tokens at 224 x 224 pixels are a grid of 14 x 14 (patches of 16 pixels) and one class token.
    """
    height, width = image_size
    strides = range(1, min(height, width) + 1)
    # patches that fill the image come first: with few cells another grid might take prefix tokens in
    filling = [stride for stride in strides if height % stride == width % stride == 0]
    for candidates in (filling, strides):
        for stride in candidates:
            rows, columns = height // stride, width // stride
            if 1 < rows * columns <= num_tokens:
                if num_tokens - rows * columns <= MAX_PREFIX_TOKENS:
                    return rows, columns
                break
    return None
