"""PyTorch LV-ViT: a vision transformer with a convolutional stem and an auxiliary classifier on every patch token."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lvvit import LVViTConfig


MIN_ROWS_FOR_CONVOLUTION = 2048  # tokens of a batch from which it pays, see `LVViTLinear`


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


class LVViTLinear(nn.Linear):
    """`nn.Linear`, for many tokens in float32 on a CPU as a 1 x 1 convolution: PyTorch gives products to MKL, convolutions to
    oneDNN, which takes 0.75 of the time on an AMD EPYC with AVX-512, forward and backward."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(tokens)
        rows = tokens.numel() // self.in_features
        if rows < MIN_ROWS_FOR_CONVOLUTION or not tokens.dtype == self.weight.dtype == torch.float32:
            return super().forward(tokens)
        picture = tokens.reshape(1, rows, 1, self.in_features).permute(0, 3, 1, 2)  # (1, in_features, rows, 1)
        result = nn.functional.conv2d(picture, self.weight[:, :, None, None], self.bias)
        return result.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], self.out_features)


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


class LVViTEmbeddings(nn.Module):
    """Patch tokens (optionally mixed between images), class token in front, position table added.

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
        if not torch.compiler.is_exporting() and (rows, columns) == self.grid_size:  # a graph for all sizes resizes
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
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain softmax attention over `(batch_size, num_heads, tokens, head_dim)`.

    Returns:
        Output `(batch_size, tokens, num_heads, head_dim)` and weights `(batch_size, num_heads, tokens, tokens)`.
    """
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)  # sums in float32 whatever the type
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class LVViTAttention(nn.Module):
    """Multi-head self-attention with a fused projection whose rows are ordered query, key, value: the authors' layout, on a
    CPU as fast as split ones (within 4 %, widths 240 to 768, float32 and bfloat16)."""

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.qkv = LVViTLinear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = LVViTLinear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, num_tokens, hidden_size = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, num_heads, tokens, head_dim) each
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and query.dtype == torch.bfloat16 and query.device.type == "cpu":
            implementation = "eager"  # takes half the time of PyTorch's fused attention there, forward and backward
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        context, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.projection(context.reshape(batch_size, num_tokens, hidden_size)), weights


class LVViTMLP(nn.Module):
    """Two linear layers with an activation between, `(..., hidden_size)` -> `(..., hidden_size)`."""

    def __init__(self, config: LVViTConfig):
        super().__init__()
        self.fc1 = LVViTLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = LVViTLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class LVViTDropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drops the whole branch of a sample with probability `rate` in training,
    and divides the kept ones by `1 - rate`. Shape is unchanged."""

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

    `(batch_size, tokens, hidden_size)` -> the same.
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

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        branch, _ = self.attention(self.norm1(hidden_states), **kwargs)
        branch = self.drop_path(self.dropout(branch))
        hidden_states = torch.add(hidden_states, branch, alpha=self.branch_scale)
        branch = self.mlp(self.norm2(hidden_states))
        branch = self.drop_path(self.dropout(branch))
        return torch.add(hidden_states, branch, alpha=self.branch_scale)


class LVViTPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading, saving, and what the library may assume of these models."""

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
    _can_record_outputs = {"hidden_states": LVViTLayer, "attentions": LVViTAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Initialises as the authors' code does: linear layers, class token and positions from a truncated normal
        of deviation `initializer_range`, biases 0; convolutions with PyTorch's own default; norms 1 and 0."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                fan_in = module.weight[0].numel()
                init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        elif isinstance(module, LVViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Makes the model take images of another size: the position table is resized bicubically, as at the start of the
        published fine-tuning, the class entry kept. Weights of the same size are left alone.

        Args:
            image_size: Side, or height and width, of the new input in pixels; multiples of the patch size.

        Raises:
            StrictDataclassError: If a side is no multiple of the patch size; the model is unchanged.
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
        """A copy for inference with the same outputs but for rounding: batch norms folded into the stem's convolutions,
        `residual_divisor` into the last layer of each branch.

        The copy is saved and loaded like any model (`config.fused`). This model stays as it is. Weights are folded in
        float32: fuse before casting to a lower precision.
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
                for last in ("attention.projection", "mlp.fc2"):
                    for kind in ("weight", "bias"):
                        key = f"{name}.{last}.{kind}"
                        weights[key] = weights[key].float() * module.branch_scale
        fused.load_state_dict({key: weights[key].to(self.dtype) for key in fused.state_dict()}, assign=True)
        return fused.requires_grad_(False).eval()

    def get_position_embeddings(self) -> nn.Parameter:
        """The position table, `(1, 1 + rows * columns, hidden_size)`, class token first."""
        return getattr(self, self.base_model_prefix, self).embeddings.position_embeddings


class LVViTModel(LVViTPreTrainedModel):
    """The LV-ViT trunk without classifiers.

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

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        mix_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values: Normalised images, `(batch_size, num_channels, height, width)`.
            mix_mask: Boolean `(batch_size, rows, columns)`; tokens where it is true are exchanged between sample b
                and sample B-1-b (MixToken). It must be equal for both partners; usually one box for the whole batch.
            interpolate_pos_encoding: Whether to resize the position table to an input of another size.

        Raises:
            ValueError: If channels, height, width or the mask do not fit the configuration.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, mix_mask, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class LVViTForImageClassification(LVViTPreTrainedModel):
    """LV-ViT with a classifier on the class token and an auxiliary one, shared by all patch tokens."""

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lvvit = LVViTModel(config)
        self.classifier = LVViTLinear(config.hidden_size, config.num_labels)
        self.patch_classifier = LVViTLinear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mix_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LVViTImageClassifierOutput:
        r"""
        Args:
            pixel_values: Normalised images, `(batch_size, num_channels, height, width)`.
            labels: Class ids `(batch_size,)` in `[0, num_labels)`; when given, `loss` is the cross-entropy of
                `logits` (the token-labeling losses belong to `TokenLabelTrainer`).
            mix_mask: See `LVViTModel.forward`. `patch_logits` are put back, so that each row belongs to one image.
            interpolate_pos_encoding: See `LVViTModel.forward`.
        """
        outputs: BaseModelOutputWithPooling = self.lvvit(
            pixel_values, mix_mask=mix_mask, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        cls_logits = self.classifier(outputs.pooler_output)
        patch_tokens = outputs.last_hidden_state[:, 1:]
        if mix_mask is not None:
            # the same as to exchange their logits, which are wider
            patch_tokens = exchange_with_flipped_batch(patch_tokens, mix_mask)
        patch_logits = self.patch_classifier(patch_tokens)
        # in float32 at least: rounded to half precision, the best two of 1000 classes are often equal
        wide = torch.promote_types(cls_logits.dtype, torch.float32)
        logits = cls_logits.to(wide)
        if self.config.patch_logits_weight:
            logits = logits + self.config.patch_logits_weight * patch_logits.amax(dim=1).to(wide)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return LVViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            cls_logits=cls_logits,
            patch_logits=patch_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class LVViTBackbone(BackboneMixin, LVViTPreTrainedModel):
    """LV-ViT as a feature extractor: the patch tokens of chosen layers as maps
    `(batch_size, hidden_size, rows, columns)`.

    Stage names count from 1: the authors' segmentation taps of S, layers 6, 9, 12 and 15 counted from 0, are
    `stage7`, `stage10`, `stage13` and `stage16`.
    """

    def __init__(self, config: LVViTConfig):
        super().__init__(config)
        self.lvvit = LVViTModel(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values: Normalised images, `(batch_size, num_channels, height, width)`.
            interpolate_pos_encoding: Whether to resize the position table to an input of another size.
        """
        outputs = self.lvvit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        patch_size = self.config.patch_size
        grid_size = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        feature_maps = []
        for stage, tokens in zip(self.stage_names, outputs.hidden_states):
            if stage in self.out_features:
                tokens = self.lvvit.layernorm(tokens) if self.config.apply_layernorm else tokens
                feature_map = tokens[:, 1:].unflatten(1, grid_size).permute(0, 3, 1, 2)  # (B, hidden, rows, columns)
                feature_maps.append(feature_map.contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "LVViTBackbone",
    "LVViTForImageClassification",
    "LVViTImageClassifierOutput",
    "LVViTModel",
    "LVViTPreTrainedModel",
]
