"""A trained model made ready to answer quickly."""

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as shape_config

from .modeling_lvvit import LVViTPreTrainedModel


MIN_RANGE = 1e-12  # a row of zeros has a scale too


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, one scale for each output; its inputs are rounded to 8 bits with a scale for each token.

    `(..., in_features)` -> `(..., out_features)`. Compiled, rounding and scaling are part of the neighbouring operations.

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


def prepare_for_inference(
    model: LVViTPreTrainedModel,
    dtype: torch.dtype | None = None,
    compile_model: bool = True,
    compile_mode: str | None = None,
    int8_weights: bool = False,
) -> LVViTPreTrainedModel:
    """A copy of a model for inference: fused (see `fuse`), cast, compiled.

    The copy is called like the model and gives the same output class; its weights must not be changed. Calls with pictures alone
    are compiled, others (hidden states, labels) run as usual. It compiles at the first
    call (about half a minute for S), again for a first batch of one image and for another image size; batches of all other sizes
    share a graph. On a CPU weights are packed for oneDNN, which `torch.compile` alone does not do: in float32 this is most of
    the gain.

    Args:
        model: Stays as it is.
        dtype: Type of weights and computation; default: that of the model. bfloat16 is for CPUs and GPUs that compute with it.
        compile_model: Whether to compile; without, a compiler need not be installed, and there is no waiting.
        compile_mode: `mode` of `torch.compile`, for example `"max-autotune"` or, for small batches on a GPU,
            `"reduce-overhead"`.
        int8_weights: Whether linear layers compute with 8 bits (`Int8Linear`): a quarter of the memory for weights, and speed on
            CPUs that multiply bytes in vectors (VNNI) but not bfloat16. Such a model cannot be saved.

    Returns:
        A model in evaluation mode that computes no gradients.

    Raises:
        ValueError: If `int8_weights` is asked for on another device than a CPU.
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
    if not compile_model:
        prepared.forward = torch.no_grad()(prepared.forward)
        return prepared
    forward, is_cpu = prepared.forward, prepared.device.type == "cpu"

    def traced(pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None):
        return forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)

    # a code object of its own, by which the compiler counts: preparing many models does not reach its limit of recompilations
    traced.__code__ = traced.__code__.replace()
    compiled = torch.compile(traced, fullgraph=True, mode=compile_mode)

    @torch.no_grad()
    def call(pixel_values: torch.Tensor | None = None, interpolate_pos_encoding: bool | None = None, **kwargs):
        expected = prepared.config.image_height_width
        has_other_size = pixel_values is None or (pixel_values.shape[2:] != expected and not interpolate_pos_encoding)
        if kwargs or has_other_size:  # labels, hidden states, ...: not compiled; or an error, which is the model's own
            return forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        pixel_values = pixel_values.detach()  # another object, whose size can be marked
        torch._dynamo.mark_dynamic(pixel_values, 0)
        # these matter only when the compiler runs: weights are constants; a batch of one is a batch like any other (and with a
        # fixed size, products in float32 would go to MKL, which is slower here)
        with inductor_config.patch(freezing=is_cpu), shape_config.patch(backed_size_oblivious=True):
            return compiled(pixel_values, interpolate_pos_encoding)

    prepared.forward = call
    return prepared


def _refuse_to_save(*args, **kwargs) -> None:
    raise ValueError("A model with 8-bit weights cannot be saved. Save the model that it was made of.")
