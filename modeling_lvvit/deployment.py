"""Models prepared for fast computation: copies for inference, and any model on a CPU."""

from dataclasses import dataclass

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as shape_config
from transformers.utils import logging

from .modeling_lvvit import LVViTLayer, LVViTPreTrainedModel


logger = logging.get_logger(__name__)

MIN_RANGE = 1e-12  # a row of zeros has a scale too
MIN_ROWS_FOR_CONVOLUTION = 2048  # tokens of a batch from which a convolution is faster, see `ConvolutionLinear`


class ConvolutionLinear(nn.Linear):
    """`nn.Linear` that computes many tokens in float32 on a CPU as a 1 x 1 convolution.

    `(..., in_features)` -> `(..., out_features)`. PyTorch computes matrix products with MKL and convolutions with oneDNN.
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or tokens.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(tokens)
        rows = tokens.numel() // self.in_features
        if rows < MIN_ROWS_FOR_CONVOLUTION or not tokens.dtype == self.weight.dtype == torch.float32:
            return super().forward(tokens)
        image = tokens.reshape(1, rows, 1, self.in_features).permute(0, 3, 1, 2)  # (1, in_features, rows, 1)
        result = nn.functional.conv2d(image, self.weight[:, :, None, None], self.bias)
        return result.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], self.out_features)


def prepare_for_cpu(model: nn.Module, device: torch.device | None = None, bf16: bool = False) -> nn.Module:
    """Makes a model faster on a CPU, in training and inference. The weights, their names and saved files stay the same.

    Linear layers become `ConvolutionLinear`. LV-ViT computes attention in bfloat16 without PyTorch's fused function, which
    takes twice as long there, forward and backward.

    Args:
        model: Any model; changed in place.
        device: Where it will compute. Defaults to where it is. Without effect if that is not a CPU.
        bf16: Whether it will compute in bfloat16 by autocast. Not needed if the weights are bfloat16.

    Returns:
        The model.
    """
    if (device or next(model.parameters()).device).type != "cpu":
        return model
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ConvolutionLinear
        elif isinstance(module, LVViTPreTrainedModel) and (bf16 or module.dtype == torch.bfloat16):
            module.set_attn_implementation("eager")
    return model


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, one scale for each output; its inputs are rounded to 8 bits with a scale for each token.

    `(..., in_features)` -> `(..., out_features)`. `torch.compile` merges rounding and scaling with the operations before and after. The dynamic
    int8 of `torchao` rounds alike and is not faster (export/README.md).

    Args:
        linear: Layer to take the weights of, any floating-point type.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=MIN_RANGE) / 127
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens.reshape(-1, tokens.shape[-1]).float()
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=MIN_RANGE) / 127
        sums = torch._int_mm((rows / scale).round().to(torch.int8), self.weight.t())  # (R, out_features) int32
        result = sums * (scale * self.scale.float())
        result = result if self.bias is None else result + self.bias
        return result.to(tokens.dtype).view(*tokens.shape[:-1], -1)


@dataclass(frozen=True)
class Preparation:
    """What `prepare_for_inference` did, counted in the model and its copy; `str()` gives it as a line.

    Args:
        batch_norms: Batch norms folded into convolutions.
        residual_branches: Residual branches whose divisor was folded into the weights of their last layer.
        was_fused: Whether there was nothing to fold, because the model had been fused before.
        dtype: Type of the weights that have no 8 bits, and of the images.
        attention: Implementation of attention; in bfloat16 on a CPU the one that is faster there.
        int8_layers: Linear layers that compute with 8 bits.
        channels_last_convolutions: Convolutions whose weights are in this layout.
        is_compiled: Whether the first call compiles the copy.
        compile_mode: `mode` of `torch.compile`.
        has_packed_weights: Whether the compiler packs weights for oneDNN, as it can on a CPU.
    """

    batch_norms: int
    residual_branches: int
    was_fused: bool
    dtype: torch.dtype
    attention: str
    int8_layers: int
    channels_last_convolutions: int
    is_compiled: bool
    compile_mode: str | None
    has_packed_weights: bool

    @classmethod
    def read(
        cls, model: LVViTPreTrainedModel, prepared: LVViTPreTrainedModel, is_compiled: bool, compile_mode: str | None
    ) -> "Preparation":
        """What a copy has, and its model had."""
        batch_norms = _count(model, nn.BatchNorm2d) - _count(prepared, nn.BatchNorm2d)
        scaled, left = (
            sum(isinstance(module, LVViTLayer) and module.branch_scale != 1 for module in part.modules())
            for part in (model, prepared)
        )
        convolutions = sum(
            module.weight.is_contiguous(memory_format=torch.channels_last)
            for module in prepared.modules()
            if isinstance(module, nn.Conv2d)
        )
        is_packed = is_compiled and prepared.device.type == "cpu" and torch.backends.mkldnn.is_available()
        folded = (batch_norms, 2 * (scaled - left), model.config.fused)  # a layer has two branches
        computation = (prepared.dtype, prepared.config._attn_implementation, _count(prepared, Int8Linear))
        return cls(*folded, *computation, convolutions, is_compiled, compile_mode, is_packed)

    def __str__(self) -> str:
        mode = f" with mode {self.compile_mode}" if self.compile_mode else ""
        packed = "weights packed for oneDNN" if self.has_packed_weights else "weights not packed"
        parts = {
            "fused before": self.was_fused,
            f"batch norms folded into convolutions: {self.batch_norms}": self.batch_norms,
            f"residual branches with their divisor folded in: {self.residual_branches}": self.residual_branches,
            f"{str(self.dtype).removeprefix('torch.')}, attention {self.attention}": True,
            f"linear layers with 8 bits: {self.int8_layers}": self.int8_layers,
            f"channels-last convolutions: {self.channels_last_convolutions}": self.channels_last_convolutions,
            f"compiled at the first call{mode}, {packed}": self.is_compiled,
            "not compiled (`compile_model=False`)": not self.is_compiled,
        }
        return "; ".join(text for text, applies in parts.items() if applies)


def _count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def prepare_for_inference(
    model: LVViTPreTrainedModel,
    dtype: torch.dtype | None = None,
    compile_model: bool = True,
    compile_mode: str | None = None,
    int8_weights: bool = False,
) -> LVViTPreTrainedModel:
    """Returns a copy of a model for inference: fused (see `fuse`), cast, compiled.

    The copy is called like the model and returns the same output class. Its weights must not be changed. Calls with images
    only are compiled; calls with other arguments (hidden states, labels) run as usual. The copy compiles at the first call
    (about half a minute for S), again for the first batch of one image, and again for another image size. Batches of all
    other sizes share a graph. On a CPU, weights are packed for oneDNN, which `torch.compile` does not do by default. In
    float32 this is most of the gain.

    Args:
        model: Does not change.
        dtype: Type of weights and computation; default: that of the model. bfloat16 is for CPUs and GPUs that compute with it.
        compile_model: Whether to compile. Without it, no compiler must be installed, and the first call is fast.
        compile_mode: `mode` of `torch.compile`, for example `"max-autotune"` or, for small batches on a GPU,
            `"reduce-overhead"`.
        int8_weights: Whether linear layers compute with 8 bits (`Int8Linear`): a quarter of the memory for weights, and speed on
            CPUs that multiply bytes in vectors (VNNI) but not bfloat16. Such a model cannot be saved.

    Returns:
        A model in evaluation mode that computes no gradients. Its attribute `preparation` (`Preparation`) says what was done, which is
        also logged at level INFO.

    Raises:
        ValueError: If `int8_weights` is set for a model that is not on a CPU.
    """
    if int8_weights and model.device.type != "cpu":
        raise ValueError(f"`int8_weights` is for models on a CPU; this one is on {model.device}.")
    prepared = model.fuse()
    for module in prepared.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    if int8_weights:
        for name, module in list(prepared.named_modules()):
            if isinstance(module, nn.Linear):
                prepared.set_submodule(name, Int8Linear(module))
        prepared.save_pretrained = _refuse_to_save
    if dtype is not None:
        prepared = prepared.to(dtype)
    prepare_for_cpu(prepared)
    prepared.preparation = Preparation.read(model, prepared, compile_model, compile_mode)
    logger.info("Prepared for inference: %s", prepared.preparation)
    if not compile_model:
        prepared.forward = torch.no_grad()(prepared.forward)
        return prepared
    forward, is_cpu = prepared.forward, prepared.device.type == "cpu"

    def traced(pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None):
        return forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)

    # the compiler counts recompilations by code object: with its own, many prepared models do not reach the limit
    traced.__code__ = traced.__code__.replace()
    compiled = torch.compile(traced, fullgraph=True, mode=compile_mode)

    @torch.no_grad()
    def call(pixel_values: torch.Tensor | None = None, interpolate_pos_encoding: bool | None = None, **kwargs):
        expected = prepared.config.image_height_width
        has_other_size = pixel_values is None or (pixel_values.shape[2:] != expected and not interpolate_pos_encoding)
        if kwargs or has_other_size:  # labels, hidden states, ...: not compiled; or the model raises its error
            return forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        pixel_values = pixel_values.detach()  # a new tensor, whose size can be marked
        torch._dynamo.mark_dynamic(pixel_values, 0)
        # for the compiler only: weights are constants, and a batch of one image is not special (with a fixed size,
        # products in float32 would be computed by MKL, which is slower here)
        with inductor_config.patch(freezing=is_cpu), shape_config.patch(backed_size_oblivious=True):
            return compiled(pixel_values, interpolate_pos_encoding)

    prepared.forward = call
    return prepared


def _refuse_to_save(*args, **kwargs) -> None:
    raise ValueError("A model with 8-bit weights cannot be saved. Save the model that it was made from.")
