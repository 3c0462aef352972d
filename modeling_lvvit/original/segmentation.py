"""The authors' segmentation model, rendered plainly: what conversions of their MMSegmentation checkpoints are checked against.

Modules carry the names of their files (`backbone`, with `side_layer1` to `side_layer4`) and of MMSegmentation's heads
(`decode_head`, `auxiliary_head`), so that the checkpoints load. For evaluation only.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration_lvvit import LVViTConfig
from .model import _Block, _Stem


class _ConvModule(nn.Module):
    """MMSegmentation's convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def _side_layer(width: int, out_channels: int, factor: int) -> nn.Sequential:
    parts = [nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    if factor > 1:
        enlarge = nn.ConvTranspose2d(width, width, factor, stride=factor, bias=False)
        parts = [enlarge, nn.BatchNorm2d(width), nn.ReLU(), *parts]
    return nn.Sequential(*parts)


class _Backbone(nn.Module):
    """The backbone without its final norm; four of its layers, each through a side layer."""

    def __init__(self, config: LVViTConfig, layer_indices: list[int]):
        super().__init__()
        width = config.hidden_size
        self.layer_indices, self.grid_size = layer_indices, config.grid_size
        self.patch_embed = _Stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid_size[0] * self.grid_size[1], width))
        self.blocks = nn.ModuleList(_Block(config, 0.0) for _ in range(config.num_hidden_layers))
        is_fcn = config.segmentation_head == "fcn"
        self.side_layer1 = nn.Identity() if is_fcn else _side_layer(width, width, 4)
        self.side_layer2 = nn.Identity() if is_fcn else _side_layer(width, width, 2)
        self.side_layer3 = _side_layer(width, width, 1)
        self.side_layer4 = _side_layer(width, config.neck_channels, 2 if is_fcn else 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embed(x)
        size = x.shape[-2:]
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.grid_size)
        table = F.interpolate(table, size=size, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
        x = x + torch.cat((self.pos_embed[:, :1], table), dim=1)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.layer_indices:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, size))
        return [getattr(self, f"side_layer{number}")(part) for number, part in enumerate(maps, 1)]


class _UPerHead(nn.Module):
    """Pooled pyramid on the last map, lateral sums downwards, all levels put together (arXiv:1807.10221)."""

    def __init__(self, config: LVViTConfig):
        super().__init__()
        width, last, channels = config.hidden_size, config.neck_channels, config.decoder_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _ConvModule(last, channels, 1)) for scale in config.pool_scales
        )
        self.bottleneck = _ConvModule(last + len(config.pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_ConvModule(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(_ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = _ConvModule(4 * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, config.num_labels, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        last = maps[3]
        pooled = [_enlarged(module(last), last) for module in self.psp_modules]
        levels = [conv(part) for conv, part in zip(self.lateral_convs, maps)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for index in (2, 1, 0):
            levels[index] = levels[index] + _enlarged(levels[index + 1], levels[index])
        levels = [conv(level) for conv, level in zip(self.fpn_convs, levels)] + levels[3:]
        return self.conv_seg(self.fpn_bottleneck(torch.cat([_enlarged(level, levels[0]) for level in levels], dim=1)))


class _FCNHead(nn.Module):
    def __init__(self, in_channels: int, channels: int, num_labels: int, num_convs: int):
        super().__init__()
        widths = [in_channels] + [channels] * num_convs
        self.convs = nn.Sequential(*(_ConvModule(one, other, 3) for one, other in pairwise(widths)))
        self.conv_seg = nn.Conv2d(channels, num_labels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_seg(self.convs(x))


class OriginalSegmenter(nn.Module):
    """`(batch_size, num_channels, height, width)` to logits of the head and of the auxiliary head, if there is one, at
    their own resolutions. Layers that are read are counted from 0."""

    def __init__(self, config: LVViTConfig, layer_indices: list[int]):
        super().__init__()
        channels, labels = config.decoder_channels, config.num_labels
        self.backbone = _Backbone(config, layer_indices)
        self.is_fcn = config.segmentation_head == "fcn"
        self.decode_head = _FCNHead(config.neck_channels, channels, labels, 2) if self.is_fcn else _UPerHead(config)
        has_auxiliary = config.auxiliary_loss_weight > 0
        self.auxiliary_head = _FCNHead(config.hidden_size, channels, labels, 1) if has_auxiliary else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        maps = self.backbone(x)
        logits = self.decode_head(maps[3] if self.is_fcn else maps)
        return logits, self.auxiliary_head(maps[2]) if self.auxiliary_head is not None else None


def _enlarged(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)
