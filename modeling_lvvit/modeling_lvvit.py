"""PyTorch LV-ViT: a vision transformer with a convolutional stem and an auxiliary classifier on every patch token.

This file is copied into every saved model. It imports only what transformers 4.57 and all later versions have.

The layout and the constants of the segmentation model are those of the authors' MMSegmentation files
(github.com/zihangJiang/TokenLabeling, folder `seg`, 83cf89e). Four things differ. Drop path is stochastic depth; the
authors pass its rates to the dropout of the MLP. The backbone has its own constants in all sizes; the authors run L with
a residual divisor of 1, and all layer norms with an epsilon of 1e-6. Images whose height or width is not a multiple of
the patch size are padded; the authors lose the rest. The loss is the mean over the pixels that are not ignored;
MMSegmentation divides by the number of all pixels.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, SemanticSegmenterOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
from transformers.utils import ModelOutput, can_return_tuple, is_torchdynamo_exporting

from .configuration_lvvit import LVViTConfig


try:
    from transformers.backbone_utils import BackboneMixin, BackboneType
except ImportError:  # its place in transformers 4 and 5.0
    from transformers.utils.backbone_utils import BackboneMixin, BackboneType

NUM_LEVELS = 4  # feature maps that the segmentation heads read
AUXILIARY_LEVEL = 2  # the auxiliary head reads the third of them
FCN_CONVS = 2  # 3x3 convolutions of the FCN head, as published


def exchange_with_flipped_batch(tokens: torch.Tensor, mix_mask: torch.Tensor) -> torch.Tensor:
    """Exchanges the masked tokens of sample b with those of sample B-1-b; applying it twice gives the input back.

    Args:
        tokens: Patch tokens or their logits, `(batch_size, num_patches, channels)`, row-major over the grid.
        mix_mask: Boolean `(batch_size, rows, columns)`, equal for both partners of a pair.

    Returns:
        Tensor of the shape and dtype of `tokens`.
    """
    return torch.where(mix_mask.flatten(1).unsqueeze(-1), tokens.flip(0), tokens)


@dataclass
class LVViTImageClassifierOutput(ModelOutput):
    """
    Output of `LVViTForImageClassification`; the same in training and evaluation.

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Cross-entropy of `logits`; given when `labels` are.
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`):
            Prediction: `cls_logits + patch_logits_weight * max over patch tokens of patch_logits`; float32 also where
            the model computes in half precision.
        cls_logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): Scores of the class token.
        patch_logits (`torch.FloatTensor` of shape `(batch_size, num_patches, num_labels)`):
            Scores of each patch token, row-major over the grid, in the image that the token belongs to.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*):
            Input of the first layer and output of each layer, `(batch_size, 1 + num_patches, hidden_size)` each.
        attentions (`tuple(torch.FloatTensor)`, *optional*):
            Attention weights, `(batch_size, num_heads, 1 + num_patches, 1 + num_patches)` for each layer.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    cls_logits: torch.FloatTensor | None = None
    patch_logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class LVViTPatchEmbeddings(nn.Module):
    """Convolutional stem: 7x7 stride 2 and two 3x3 convolutions at half resolution, then non-overlapping patches; without
    `conv_stem` the patches alone.

    `(batch_size, num_channels, height, width)` -> `(batch_size, rows * columns, hidden_size)`, row-major.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.conv_stem = config.conv_stem
        width, kernel = config.num_channels, config.patch_size
        if config.conv_stem:
            width, kernel = config.stem_hidden_size, config.patch_size // 2  # the stem halves the resolution
            norm, bias = (nn.Identity, True) if config.fused else (nn.BatchNorm2d, False)
            self.conv1 = nn.Conv2d(config.num_channels, width, kernel_size=7, stride=2, padding=3, bias=bias)
            self.norm1 = norm(width)
            self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=bias)
            self.norm2 = norm(width)
            self.conv3 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=bias)
            self.norm3 = norm(width)
            # in place: neither batch norm nor convolution needs its output again
            self.activation = nn.ReLU(inplace=True)
        self.projection = nn.Conv2d(width, config.hidden_size, kernel_size=kernel, stride=kernel)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        _, num_channels, height, width = pixel_values.shape
        if num_channels != self.num_channels:
            raise ValueError(f"Expected images with {self.num_channels} channels, got {num_channels}.")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Image height ({height}) and width ({width}) must be multiples of the patch size ({self.patch_size})."
            )
        # channels-last: the stem of T runs 1.5 (training: 1.3) times as fast on a CPU in float32, 1.3 (1.1) in bfloat16
        hidden_states = pixel_values.contiguous(memory_format=torch.channels_last)
        if self.conv_stem:
            hidden_states = self.activation(self.norm1(self.conv1(hidden_states)))
            hidden_states = self.activation(self.norm2(self.conv2(hidden_states)))
            hidden_states = self.activation(self.norm3(self.conv3(hidden_states)))
        return self.projection(hidden_states).flatten(2).transpose(1, 2)  # (B, rows * columns, hidden_size)


class LVViTEmbeddings(nn.Module):
    """Patch tokens (optionally mixed between images), class token first, position table added.

    `(batch_size, num_channels, height, width)` -> `(batch_size, 1 + rows * columns, hidden_size)`.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.image_size = config.image_height_width
        self.patch_size = config.patch_size
        self.patch_embeddings = LVViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        num_patches = self.grid_size[0] * self.grid_size[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_position_embeddings(self, rows: int, columns: int) -> torch.Tensor:
        """Position table for another grid, `(1, 1 + rows * columns, hidden_size)`.

        The class entry is kept; the grid is resized bicubically with unaligned corners, as the authors' fine-tuning
        code does, in float32.
        """
        if not is_torchdynamo_exporting() and (rows, columns) == self.grid_size:  # an exported graph always resizes
            return self.position_embeddings
        cls_position, patch_positions = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        table = patch_positions.float().unflatten(1, self.grid_size).permute(0, 3, 1, 2)  # (1, hidden, rows, columns)
        table = nn.functional.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
        patch_positions = table.flatten(2).transpose(1, 2).to(cls_position.dtype)
        return torch.cat((cls_position, patch_positions), dim=1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        mix_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> torch.Tensor:
        batch_size, _, height, width = pixel_values.shape
        if not interpolate_pos_encoding and (height, width) != self.image_size:
            raise ValueError(
                f"Input image size ({height}*{width}) doesn't match model ({self.image_size[0]}*{self.image_size[1]})."
                " Resize the images, or pass `interpolate_pos_encoding=True`."
            )
        patch_tokens = self.patch_embeddings(pixel_values)
        rows, columns = height // self.patch_size, width // self.patch_size
        if mix_mask is not None:
            if mix_mask.shape != (batch_size, rows, columns):
                raise ValueError(
                    f"`mix_mask` must have shape {(batch_size, rows, columns)} (batch, rows, columns of the token "
                    f"grid), got {tuple(mix_mask.shape)}."
                )
            patch_tokens = exchange_with_flipped_batch(patch_tokens, mix_mask)
        embeddings = torch.cat((self.cls_token.expand(batch_size, -1, -1), patch_tokens), dim=1)
        return self.dropout(embeddings + self.interpolate_position_embeddings(rows, columns))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention over `(batch_size, num_heads, tokens, head_dim)`.

    Returns:
        Output `(batch_size, tokens, num_heads, head_dim)` and weights `(batch_size, num_heads, tokens, tokens)`.
    """
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)  # sums in float32 for all types
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class LVViTAttention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value, whose rows are in this order as in the
    authors' code. On a CPU it is as fast as three projections (within 4 %, widths 240 to 768, float32 and bfloat16).

    `(batch_size, tokens, hidden_size)` -> the same, and the attention weights
    `(batch_size, num_heads, tokens, tokens)`, or `None` if the implementation does not compute them.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, num_tokens, hidden_size = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, num_heads, tokens, head_dim) each
        implementation = self.config._attn_implementation
        is_eager = implementation in (None, "eager")
        attention: Callable = eager_attention_forward if is_eager else ALL_ATTENTION_FUNCTIONS[implementation]
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attention(self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.projection(context.reshape(batch_size, num_tokens, hidden_size)), weights


class LVViTMLP(nn.Module):
    """Two linear layers with an activation between them, `(..., hidden_size)` -> `(..., hidden_size)`."""

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class LVViTDropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drops the whole branch of a sample with probability `rate` in training,
    and divides the others by `1 - rate`. The shape stays the same."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep_shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        kept = branch.new_empty(keep_shape).bernoulli_(1.0 - self.rate)
        return branch * kept.div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class LVViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer whose branches are divided by `residual_divisor`:

        x = x + drop_path(attention(norm1(x))) / residual_divisor
        x = x + drop_path(mlp(norm2(x))) / residual_divisor

    `(batch_size, tokens, hidden_size)` -> the same, and the attention weights with `output_attentions`, else `None`.
    """

    def __init__(self, config: LVViTConfig, drop_path_rate: float):
        super().__init__()
        self.branch_scale = 1.0 if config.fused else 1.0 / config.residual_divisor
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = LVViTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LVViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = LVViTDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        branch, weights = self.attention(self.norm1(hidden_states), **kwargs)
        branch = self.drop_path(self.dropout(branch))
        hidden_states = torch.add(hidden_states, branch, alpha=self.branch_scale)
        branch = self.mlp(self.norm2(hidden_states))
        branch = self.drop_path(self.dropout(branch))
        hidden_states = torch.add(hidden_states, branch, alpha=self.branch_scale)
        return hidden_states, weights if output_attentions else None


def _folded_stem(stem: LVViTPatchEmbeddings, name: str) -> dict[str, torch.Tensor]:
    """Weights and biases of the stem's convolutions with their batch norms folded in, float32."""
    folded = {}
    for index in (1, 2, 3):
        convolution, norm = getattr(stem, f"conv{index}"), getattr(stem, f"norm{index}")
        statistics = (norm.running_mean.float(), norm.running_var.float(), norm.eps)
        weight, bias = fuse_conv_bn_weights(
            convolution.weight.float(), None, *statistics, norm.weight.float(), norm.bias.float()
        )
        folded |= {f"{name}.conv{index}.weight": weight, f"{name}.conv{index}.bias": bias}
    return folded


class LVViTPreTrainedModel(PreTrainedModel):
    """Weight initialization, loading, saving, and what transformers may assume about these models."""

    config: LVViTConfig
    config_class = LVViTConfig
    base_model_prefix = "lvvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LVViTEmbeddings", "LVViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "patch_embeddings"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Versions of transformers look for different lines in the source of a model to find this out."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initializes as the authors' code does: linear layers, class token and position table from a truncated normal
        distribution with standard deviation `initializer_range`, biases with 0, convolutions with PyTorch's default,
        norms with 1 and 0."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                fan_in = module.weight[0].numel()
                nn.init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, LVViTEmbeddings):
            nn.init.trunc_normal_(module.cls_token, std=std)
            nn.init.trunc_normal_(module.position_embeddings, std=std)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Makes the model take images of another size. The position table is resized bicubically, as at the start of
        the published fine-tuning; the entry of the class token stays. A table of the right size does not change.

        Args:
            image_size: New height and width in pixels, or one number for both; multiples of the patch size.

        Raises:
            ValueError: If height or width is not a multiple of the patch size; the model does not change.
        """
        embeddings = getattr(self, self.base_model_prefix, self).embeddings
        changed = type(self.config)(**{**self.config.to_dict(), "image_size": image_size})
        table = embeddings.interpolate_position_embeddings(*changed.grid_size)
        if changed.grid_size != embeddings.grid_size:
            embeddings.position_embeddings = nn.Parameter(table.clone())
        embeddings.grid_size, embeddings.image_size = changed.grid_size, changed.image_height_width
        self.config.image_size = image_size

    @torch.no_grad()
    def fuse(self) -> "LVViTPreTrainedModel":
        """Returns a copy for inference. Batch norms are folded into the convolutions of the stem, `residual_divisor` into
        the last layer of each branch. Outputs are equal up to rounding.

        The copy is saved and loaded like any model (`config.fused`). This model does not change. Weights are folded in
        float32, so fuse before casting to a lower precision.
        """
        config = copy.deepcopy(self.config)
        config.fused = True
        with torch.device("meta"):
            fused = type(self)(config)
        weights = copy.deepcopy(self.state_dict())
        for name, module in self.named_modules() if not self.config.fused else ():
            if isinstance(module, LVViTPatchEmbeddings) and module.conv_stem:
                weights |= _folded_stem(module, name)
            elif isinstance(module, LVViTLayer):
                for linear in ("attention.projection", "mlp.fc2"):
                    for parameter in ("weight", "bias"):
                        key = f"{name}.{linear}.{parameter}"
                        weights[key] = weights[key].float() * module.branch_scale
        fused.load_state_dict({key: weights[key].to(self.dtype) for key in fused.state_dict()}, assign=True)
        return fused.requires_grad_(False).eval()

    def get_position_embeddings(self) -> nn.Parameter:
        """The position table, `(1, 1 + rows * columns, hidden_size)`, class token first."""
        return getattr(self, self.base_model_prefix, self).embeddings.position_embeddings


class LVViTModel(LVViTPreTrainedModel):
    """The LV-ViT backbone without classifiers.

    Returns `last_hidden_state` `(batch_size, 1 + num_patches, hidden_size)` after the final layer norm, class token
    first, and `pooler_output` `(batch_size, hidden_size)`, its class token.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        self.embeddings = LVViTEmbeddings(config)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            LVViTLayer(config, config.drop_path_rate * index / last) for index in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        mix_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: Normalized images, `(batch_size, num_channels, height, width)`.
            mix_mask: Boolean `(batch_size, rows, columns)`; tokens where it is true are exchanged between sample b
                and sample B-1-b (MixToken). It must be equal for both partners; usually one box for the whole batch.
            interpolate_pos_encoding: Whether to resize the position table to an input of another size.
            output_hidden_states: Whether to return the input of the first layer and the output of each layer. Defaults
                to `config.output_hidden_states`.
            output_attentions: Whether to return the attention weights of each layer, which only
                `attn_implementation="eager"` computes. Defaults to `config.output_attentions`.

        Raises:
            ValueError: If channels, height, width or the mask do not fit the configuration.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, mix_mask, interpolate_pos_encoding)
        all_hidden_states = (hidden_states,) if output_hidden_states else None
        attentions = () if output_attentions else None
        for layer in self.layers:
            hidden_states, weights = layer(hidden_states, output_attentions=output_attentions, **kwargs)
            if output_hidden_states:
                all_hidden_states += (hidden_states,)
            if weights is not None:
                attentions += (weights,)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=all_hidden_states,
            attentions=attentions,
        )


class LVViTForImageClassification(LVViTPreTrainedModel):
    """LV-ViT with a classifier on the class token and an auxiliary one, shared by all patch tokens."""

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lvvit = LVViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.patch_classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mix_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs,
    ) -> LVViTImageClassifierOutput:
        r"""
        Args:
            pixel_values: Normalized images, `(batch_size, num_channels, height, width)`.
            labels: Class ids `(batch_size,)` in `[0, num_labels)`; when given, `loss` is the cross-entropy of
                `logits` (the token-labeling losses belong to `TokenLabelTrainer`). With `config.problem_type`
                `"multi_label_classification"` 0 and 1, `(batch_size, num_labels)`, and the binary cross-entropy of
                each class.
            mix_mask: See `LVViTModel.forward`. The exchange is undone before the patch head, so all `patch_logits` of a row
                belong to its image.
            interpolate_pos_encoding: See `LVViTModel.forward`.
        """
        outputs = self.lvvit(pixel_values, mix_mask, interpolate_pos_encoding, return_dict=True, **kwargs)
        cls_logits = self.classifier(outputs.pooler_output)
        patch_tokens = outputs.last_hidden_state[:, 1:]
        if mix_mask is not None:
            # equal to an exchange of their logits, which are wider
            patch_tokens = exchange_with_flipped_batch(patch_tokens, mix_mask)
        patch_logits = self.patch_classifier(patch_tokens)
        # at least float32: in half precision the best two of 1000 classes are often equal
        wide = torch.promote_types(cls_logits.dtype, torch.float32)
        logits = cls_logits.to(wide)
        if self.config.patch_logits_weight:
            logits = logits + self.config.patch_logits_weight * patch_logits.amax(dim=1).to(wide)
        loss = None
        if labels is not None:
            if self.config.problem_type == "multi_label_classification":
                labels = labels.to(logits.dtype)
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return LVViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            cls_logits=cls_logits,
            patch_logits=patch_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LVViTConvNormAct(nn.Sequential):
    """1x1 convolution, batch norm, ReLU: `(batch_size, in_channels, h, w)` -> `(batch_size, out_channels, h, w)`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


class LVViTUpsample(nn.Sequential):
    """Transposed convolution without overlap, batch norm, ReLU, then a 1x1 convolution,
    batch norm and ReLU:
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

    Input: four maps `(batch_size, hidden_size, rows, columns)`. Output for UperNet: maps of 4, 2, 1 and 1 times this
    resolution. Output for FCN: the first two maps unchanged, the third after a convolution, and the last one with twice the
    resolution. In both cases the last map has `neck_channels` channels.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__()
        hidden, last = config.hidden_size, config.neck_channels
        if config.segmentation_head == "upernet":
            levels = [LVViTUpsample(hidden, hidden, 4), LVViTUpsample(hidden, hidden, 2)]
            levels += [LVViTConvNormAct(hidden, hidden), LVViTConvNormAct(hidden, last)]
        else:
            # only the auxiliary head reads the third map
            third = LVViTConvNormAct(hidden, hidden) if config.auxiliary_loss_weight else nn.Identity()
            levels = [nn.Identity(), nn.Identity(), third, LVViTUpsample(hidden, last, 2)]
        self.levels = nn.ModuleList(levels)
        self.channels = [hidden, hidden, hidden, last]

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [level(feature_map) for level, feature_map in zip(self.levels, maps)]


def default_stages(num_hidden_layers: int) -> list[str]:
    """The four layers that the heads read: the last one and those 3, 6 and 9 before it, as in the published models. In a
    backbone of fewer than 12 layers they are closer, at equal distances.

    Raises:
        ValueError: If there are fewer than four layers.
    """
    step = min(3, num_hidden_layers // NUM_LEVELS)
    if step < 1:
        raise ValueError(f"The segmentation heads read four layers; the backbone has {num_hidden_layers}.")
    return [f"stage{num_hidden_layers - step * back}" for back in reversed(range(NUM_LEVELS))]


def _head_settings(config: LVViTConfig, num_convs: int = 1) -> SimpleNamespace:
    """The part of `UperNetConfig` that the heads of transformers read."""
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


class LVViTForSemanticSegmentation(LVViTPreTrainedModel):
    """LV-ViT with a segmentation head: four layers of the backbone, a neck that brings them to several resolutions, and an
    UperNet or FCN head, with an auxiliary FCN head in training.

    Weights of any LV-ViT with the same backbone can be loaded into it. The final layer norm of the backbone is left out,
    because the published heads do not read it.
    """

    _keys_to_ignore_on_load_unexpected = [r"^(lvvit\.)?layernorm\.", r"^classifier\.", r"^patch_classifier\."]
    accepts_loss_kwargs = False  # the loss is the mean of a micro-batch; the Trainer divides it by their number

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        if 0 <= config.semantic_loss_ignore_index < config.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` ({config.semantic_loss_ignore_index}) is the id of one of the {config.num_labels} "
                "classes, which would never be trained. Choose a negative number or one above them."
            )
        weights = config.semantic_loss_class_weights
        if weights is not None and (len(weights) != config.num_labels or min(weights) < 0):
            raise ValueError(
                f"`semantic_loss_class_weights` must be {config.num_labels} numbers of at least 0, one for each class, "
                f"got {weights}."
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
            # drops whole channels before the classifier, as MMSegmentation does; the heads of transformers have no dropout
            head.classifier = nn.Sequential(nn.Dropout2d(config.decoder_dropout_prob), head.classifier)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SemanticSegmenterOutput:
        r"""
        Args:
            pixel_values: Normalized images of any size, `(batch_size, num_channels, height, width)`. If height or width is
                not a multiple of the patch size, they are padded with zeros, the mean color.
            labels: Class ids `(batch_size, height, width)` in `[0, num_labels)`, or `semantic_loss_ignore_index`. When
                given, `loss` is the cross-entropy of the head plus `auxiliary_loss_weight` times that of the auxiliary
                head, each over the pixels that are not ignored.
            interpolate_pos_encoding: Without effect. The position table is always resized to the image.
            output_hidden_states: See `LVViTModel.forward`.

        Returns:
            `logits` `(batch_size, num_labels, height / s, width / s)`, s = 4 for UperNet and 8 for FCN (patches of 16
            pixels). If an image was padded, its logits have its full height and width.

        Raises:
            ValueError: If there are no images, or UperNet is trained with a single one.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        self._check_batch_size(pixel_values.shape[0])
        height, width = pixel_values.shape[-2:]
        patch_size = self.config.patch_size
        padded = nn.functional.pad(pixel_values, (0, -width % patch_size, 0, -height % patch_size))
        outputs = self.lvvit(
            padded, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True, **kwargs
        )
        tokens = dict(zip(self.config.stage_names, outputs.hidden_states))
        grid_size = tuple(size // patch_size for size in padded.shape[-2:])
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
        hidden_states = outputs.hidden_states if output_hidden_states else None
        return SemanticSegmenterOutput(loss, logits, hidden_states, outputs.attentions)

    def _check_batch_size(self, batch_size: int) -> None:
        """Raises a `ValueError` if batch norm would see one value only: a single image, pooled to one cell."""
        if batch_size > 1 or not self.training or self.config.segmentation_head != "upernet":
            return
        norms = [module for module in self.decoder.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if 1 in self.config.pool_scales and any(type(norm) is nn.BatchNorm2d and norm.training for norm in norms):
            raise ValueError(
                "UperNet cannot be trained on a single image: its batch norms need at least two. Use a larger batch, "
                "dataloader_drop_last for the end of an epoch, synchronized batch norm on several devices, or the FCN head."
            )

    def _cropped(self, logits: torch.Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """Logits of a padded image at its full size, without those of the padding; other logits unchanged."""
        if tuple(padded_size) == size:
            return logits
        return _resized(logits, padded_size)[..., : size[0], : size[1]]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the pixels that are not ignored, with the weights of their classes; 0 without any."""
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


class LVViTBackbone(LVViTPreTrainedModel, BackboneMixin):
    """LV-ViT as a feature extractor: the patch tokens of chosen layers as maps
    `(batch_size, hidden_size, rows, columns)`.

    Stage names count from 1. The layers 6, 9, 12 and 15 that the authors' segmentation models of size S read, counted
    from 0, are `stage7`, `stage10`, `stage13` and `stage16`.
    """

    backbone_type = BackboneType.TRANSFORMERS

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        self.lvvit = LVViTModel(config)
        self.stage_names = config.stage_names
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    # Some versions of `BackboneMixin` keep these two in the model.
    @property
    def out_features(self) -> list[str]:
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: list[str] | None):
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int] | None):
        self.config.out_indices = indices

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values: Normalized images, `(batch_size, num_channels, height, width)`.
            interpolate_pos_encoding: See `LVViTModel.forward`.
            output_hidden_states: See `LVViTModel.forward`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.lvvit(
            pixel_values, None, interpolate_pos_encoding, output_hidden_states=True, return_dict=True, **kwargs
        )
        grid_size = tuple(size // self.config.patch_size for size in pixel_values.shape[-2:])
        feature_maps = []
        for stage, tokens in zip(self.stage_names, outputs.hidden_states):
            if stage in self.out_features:
                tokens = self.lvvit.layernorm(tokens) if self.config.apply_layernorm else tokens
                feature_map = tokens[:, 1:].unflatten(1, grid_size).permute(0, 3, 1, 2)  # (B, hidden, rows, columns)
                feature_maps.append(feature_map.contiguous())
        hidden_states = outputs.hidden_states if output_hidden_states else None
        return BackboneOutput(tuple(feature_maps), hidden_states, outputs.attentions)


__all__ = [
    "LVViTBackbone",
    "LVViTForImageClassification",
    "LVViTForSemanticSegmentation",
    "LVViTImageClassifierOutput",
    "LVViTModel",
    "LVViTPreTrainedModel",
]
