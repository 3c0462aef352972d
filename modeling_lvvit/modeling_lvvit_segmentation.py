"""LV-ViT for semantic segmentation: four layers of the trunk, a neck that brings them to four resolutions, and an UperNet or FCN
head, with an auxiliary FCN head in training.

Layout and constants are those of the authors' MMSegmentation files (github.com/zihangJiang/TokenLabeling, folder `seg`, 83cf89e).
Four things differ: drop path is stochastic depth (theirs passes its rates to the dropout of the MLP); the trunk has its own
constants in all sizes (theirs runs L with a residual divisor of 1 and all layer norms with an epsilon of 1e-6); pictures
whose sides are no multiples of the patch size are padded (theirs lose the rest); and the loss is the mean over the pixels that count
(MMSegmentation divides by all, ignored ones included).
"""

from types import SimpleNamespace

import torch
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lvvit import LVViTConfig
from .modeling_lvvit import LVViTModel, LVViTPreTrainedModel


NUM_LEVELS = 4
AUXILIARY_LEVEL = 2  # the auxiliary head reads the third of the four maps
FCN_CONVS = 2  # 3x3 convolutions of the FCN head; those of the published size


class LVViTConvNormAct(nn.Sequential):
    """1x1 convolution, batch norm, ReLU: `(batch_size, in_channels, h, w)` -> `(batch_size, out_channels, h, w)`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


class LVViTUpsample(nn.Sequential):
    """Transposed convolution whose patches do not overlap, batch norm, ReLU, and a 1x1 convolution with the same:
    `(batch_size, in_channels, h, w)` -> `(batch_size, out_channels, factor * h, factor * w)`."""

    def __init__(self, in_channels: int, out_channels: int, factor: int):
        super().__init__(
            nn.ConvTranspose2d(in_channels, in_channels, factor, stride=factor, bias=False),
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            *LVViTConvNormAct(in_channels, out_channels),
        )


class LVViTNeck(nn.Module):
    """Brings four maps of the token grid to the resolutions of a pyramid.

    Input: four maps `(batch_size, hidden_size, rows, columns)`. Output for UperNet: maps of 4, 2, 1 and 1 times this resolution, the
    last one with `neck_channels`; for FCN: the first two as they are, the third with a convolution, the last one of twice the
    resolution with `neck_channels`.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__()
        hidden, last = config.hidden_size, config.neck_channels
        if config.segmentation_head == "upernet":
            levels = [LVViTUpsample(hidden, hidden, 4), LVViTUpsample(hidden, hidden, 2)]
            levels += [LVViTConvNormAct(hidden, hidden), LVViTConvNormAct(hidden, last)]
        else:
            # the third map is read by the auxiliary head alone
            third = LVViTConvNormAct(hidden, hidden) if config.auxiliary_loss_weight else nn.Identity()
            levels = [nn.Identity(), nn.Identity(), third, LVViTUpsample(hidden, last, 2)]
        self.levels = nn.ModuleList(levels)
        self.channels = [hidden, hidden, hidden, last]

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [level(feature_map) for level, feature_map in zip(self.levels, maps)]


class LVViTForSemanticSegmentation(LVViTPreTrainedModel):
    """LV-ViT with a segmentation head. Weights of any LV-ViT of the same trunk can be loaded into it; the final layer norm of the
    trunk, which the published heads do not read, is left out."""

    _keys_to_ignore_on_load_unexpected = [r"^(lvvit\.)?layernorm\.", r"^classifier\.", r"^patch_classifier\."]
    accepts_loss_kwargs = (
        False  # the loss is a mean over a micro-batch, which the Trainer then divides by their number
    )

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        if 0 <= config.semantic_loss_ignore_index < config.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` ({config.semantic_loss_ignore_index}) is the id of one of the {config.num_labels} "
                "classes, which would never be trained; choose a negative number or one above them."
            )
        weights = config.semantic_loss_class_weights
        if weights is not None and (len(weights) != config.num_labels or min(weights) < 0):
            raise ValueError(
                f"`semantic_loss_class_weights` must be {config.num_labels} numbers of at least 0, one for each class, got {weights}."
            )
        self.lvvit = LVViTModel(config)
        self.lvvit.layernorm = nn.Identity()
        self.stages = list(config.segmentation_stages or default_stages(config.num_hidden_layers))
        self.neck = LVViTNeck(config)
        if config.segmentation_head == "upernet":
            self.decoder = UperNetHead(_head_settings(config), self.neck.channels)
        else:
            self.decoder = UperNetFCNHead(_head_settings(config, FCN_CONVS), self.neck.channels, NUM_LEVELS - 1)
        self.auxiliary_decoder = None
        if config.auxiliary_loss_weight:
            self.auxiliary_decoder = UperNetFCNHead(_head_settings(config), self.neck.channels, AUXILIARY_LEVEL)
        for head in filter(None, (self.decoder, self.auxiliary_decoder)):
            # whole channels are dropped in front of the classifier, as in MMSegmentation; the head of the library has no dropout
            head.classifier = nn.Sequential(nn.Dropout2d(config.decoder_dropout_prob), head.classifier)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values: Normalised images of any size, `(batch_size, num_channels, height, width)`. Sides that are no multiples of
                the patch size are padded with zeros, the mean colour.
            labels: Class ids `(batch_size, height, width)` in `[0, num_labels)`, or `semantic_loss_ignore_index`. When given, `loss` is
                the cross-entropy of the head plus `auxiliary_loss_weight` times that of the auxiliary head, each over the pixels
                that are not ignored.
            interpolate_pos_encoding: Without effect: the position table is always fitted to the picture.

        Returns:
            `logits` `(batch_size, num_labels, height / s, width / s)`, s = 4 for UperNet and 8 for FCN (patches of 16 pixels); where
            a picture was padded, of its own height and width.

        Raises:
            ValueError: If there are no pictures, or UperNet is trained with a single one.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        self._check_batch_size(pixel_values.shape[0])
        height, width = pixel_values.shape[-2:]
        patch_size = self.config.patch_size
        padded = nn.functional.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
        padded = padded.to(self.lvvit.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.lvvit.embeddings(padded, interpolate_pos_encoding=True)
        tokens = {self.config.stage_names[0]: hidden_states}
        for stage, layer in zip(self.config.stage_names[1:], self.lvvit.layers):
            tokens[stage] = hidden_states = layer(hidden_states, **kwargs)
        grid_size = (padded.shape[-2] // patch_size, padded.shape[-1] // patch_size)
        # (B, 1 + rows * columns, C) -> (B, C, rows, columns)
        maps = [tokens[stage][:, 1:].mT.unflatten(2, grid_size).contiguous() for stage in self.stages]
        maps = self.neck(maps)
        logits = self._cropped(self.decoder(maps), padded.shape[-2:], (height, width))
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels)
            if self.auxiliary_decoder is not None:
                auxiliary = self._cropped(self.auxiliary_decoder(maps), padded.shape[-2:], (height, width))
                loss = loss + self.config.auxiliary_loss_weight * self._loss(auxiliary, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def _check_batch_size(self, batch_size: int) -> None:
        """The map that is pooled to one cell has one value for each picture, of which batch norm cannot take statistics."""
        if batch_size > 1 or not self.training or self.config.segmentation_head != "upernet":
            return
        norms = [module for module in self.decoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if 1 in self.config.pool_scales and any(type(norm) is nn.BatchNorm2d and norm.training for norm in norms):
            raise ValueError(
                "UperNet cannot be trained on a single picture: its batch norms need at least two. Use a larger batch, "
                "dataloader_drop_last for the end of an epoch, synchronised batch norm on several devices, or the FCN head."
            )

    def _cropped(self, logits: torch.Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """Logits of a padded picture at its full size, without those of the border; others as they are."""
        if tuple(padded_size) == size:
            return logits
        return _resized(logits, padded_size)[..., : size[0], : size[1]]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the pixels that are not ignored, weighted by the weights of their classes; 0 if all are."""
        ignored, weights = self.config.semantic_loss_ignore_index, self.config.semantic_loss_class_weights
        wide = _resized(logits, labels.shape[-2:]).to(torch.promote_types(logits.dtype, torch.float32))
        is_counted = labels != ignored
        if weights is None:
            total = nn.functional.cross_entropy(wide, labels.long(), ignore_index=ignored, reduction="sum")
            return total / is_counted.sum().clamp(min=1)
        weight = torch.tensor(weights, dtype=wide.dtype, device=wide.device)
        total = nn.functional.cross_entropy(wide, labels.long(), weight, ignore_index=ignored, reduction="sum")
        counted = weight[labels.long().where(is_counted, 0)].where(is_counted, 0)
        return total / counted.sum().clamp(min=torch.finfo(wide.dtype).tiny)


def default_stages(num_hidden_layers: int) -> list[str]:
    """The four layers that the heads read: the last, and those 3, 6 and 9 before it, as in the published models; in short trunks
    evenly spaced.

    Raises:
        ValueError: If there are fewer than four layers.
    """
    step = min(3, num_hidden_layers // NUM_LEVELS)
    if step < 1:
        raise ValueError(f"The segmentation heads read four layers; the trunk has {num_hidden_layers}.")
    return [f"stage{num_hidden_layers - step * back}" for back in reversed(range(NUM_LEVELS))]


def _head_settings(config: LVViTConfig, num_convs: int = 1) -> SimpleNamespace:
    """What the heads of the library read of their own configuration."""
    return SimpleNamespace(
        hidden_size=config.decoder_channels,
        pool_scales=tuple(config.pool_scales),
        num_labels=config.num_labels,
        auxiliary_in_channels=None,
        auxiliary_channels=config.decoder_channels,
        auxiliary_num_convs=num_convs,
        auxiliary_concat_input=False,
    )


def _resized(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return nn.functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


__all__ = ["LVViTForSemanticSegmentation"]
