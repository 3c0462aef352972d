"""The authors' model and training step, rendered plainly: what conversions are checked against and benchmarks compared with.

Nothing here is meant for use: attention is written out, tensors lie as the authors' lie, MixToken draws its box with numpy and
copies every token, and the loss takes a probability for every class of every token. Modules carry the authors' names, so
that their checkpoints load.
"""

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from ..configuration_lvvit import LVViTConfig
from ..modeling_lvvit import LVViTDropPath


Box = tuple[int, int, int, int]


def draw_box(rows: int, columns: int) -> Box:
    """Top, left, bottom and right of the tokens to exchange: the box of CutMix with `lambda ~ Beta(1, 1)`."""
    cut = np.sqrt(1.0 - np.random.beta(1.0, 1.0))
    half_rows, half_columns = int(rows * cut) // 2, int(columns * cut) // 2
    row, column = np.random.randint(rows), np.random.randint(columns)
    top, bottom = np.clip([row - half_rows, row + half_rows], 0, rows)
    left, right = np.clip([column - half_columns, column + half_columns], 0, columns)
    return int(top), int(left), int(bottom), int(right)


class _Stem(nn.Module):
    def __init__(self, config: LVViTConfig):
        super().__init__()
        width = config.stem_hidden_size
        self.conv1 = nn.Conv2d(config.num_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.proj = nn.Conv2d(width, config.hidden_size, config.patch_size // 2, stride=config.patch_size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = self.relu(norm(convolution(x)))
        return self.proj(x)


class _Attention(nn.Module):
    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = (config.hidden_size // self.num_heads) ** -0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(config.attention_probs_dropout_prob)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = ((qkv[0] * self.scale) @ qkv[1].transpose(-2, -1)).softmax(dim=-1)
        return self.proj((self.attn_drop(weights) @ qkv[2]).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, config: LVViTConfig, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = _Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)
        self.drop_path = LVViTDropPath(drop_path_rate)
        self.skip_lam = config.residual_divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.skip_lam
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam


class OriginalLVViT(nn.Module):
    """The published model under the authors' names, for `(batch_size, num_channels, height, width)` of the configured size.

    In evaluation it returns logits `(batch_size, num_labels)`: those of the class token plus half the maximum over patches
    of the auxiliary ones. In training: class logits, auxiliary logits `(batch_size, N, num_labels)` and the exchanged box.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.patch_embed = _Stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        num_patches = self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))
        last = max(config.num_hidden_layers - 1, 1)
        self.blocks = nn.ModuleList(
            _Block(config, config.drop_path_rate * index / last) for index in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.aux_head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, Box]:
        x = self.patch_embed(x)  # (B, C, rows, columns)
        if self.training:
            box = draw_box(*self.grid_size)
            x = self._exchange(x, box)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        cls_logits, aux_logits = self.head(x[:, 0]), self.aux_head(x[:, 1:])
        if not self.training:
            return cls_logits + 0.5 * aux_logits.max(dim=1)[0]
        aux_grid = aux_logits.transpose(1, 2).unflatten(2, self.grid_size)
        return cls_logits, self._exchange(aux_grid, box).flatten(2).transpose(1, 2), box

    @staticmethod
    def _exchange(grid: torch.Tensor, box: Box) -> torch.Tensor:
        top, left, bottom, right = box
        mixed = grid.clone()
        mixed[:, :, top:bottom, left:right] = grid.flip(0)[:, :, top:bottom, left:right]
        return mixed


def original_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, Box], targets: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    """Class-token plus mean patch-token cross-entropy with dense targets, weights 1.

    Args:
        outputs: Class logits, auxiliary logits and box of `OriginalLVViT` in training.
        targets: Probabilities `(batch_size, C, 2 + N)`: of the human label, of the whole crop, of each patch token.
    """
    cls_logits, aux_logits, (top, left, bottom, right) = outputs
    unmixed = 1 - (bottom - top) * (right - left) / (grid_size[0] * grid_size[1])
    cls_target = unmixed * targets[:, :, 1] + (1 - unmixed) * targets[:, :, 1].flip(0)
    aux_target = targets[:, :, 2:].transpose(1, 2)
    return sum(
        torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1).mean()
        for logits, target in ((cls_logits, cls_target), (aux_logits, aux_target))
    )
