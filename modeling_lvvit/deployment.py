"""A trained model made ready to answer quickly."""

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as shape_config

from .modeling_lvvit import LVViTPreTrainedModel


def prepare_for_inference(
    model: LVViTPreTrainedModel,
    dtype: torch.dtype | None = None,
    compile_model: bool = True,
    compile_mode: str | None = None,
) -> LVViTPreTrainedModel:
    """A copy of a model for inference: fused (see `fuse`), cast, compiled.

    The copy is called like the model and gives the same output class; its weights must not be changed. It compiles at the first
    call (about half a minute for S), again for a first batch of one image and for another image size; batches of all other sizes
    share a graph. On a CPU weights are packed for oneDNN, which `torch.compile` alone does not do: in float32 this is most of
    the gain.

    Args:
        model: Stays as it is.
        dtype: Type of weights and computation; default: that of the model. bfloat16 is for CPUs and GPUs that compute with it.
        compile_model: Whether to compile; without, a compiler need not be installed, and there is no waiting.
        compile_mode: `mode` of `torch.compile`, for example `"max-autotune"` or, for small batches on a GPU,
            `"reduce-overhead"`.

    Returns:
        A model in evaluation mode that computes no gradients.
    """
    prepared = model.fuse()
    if dtype is not None:
        prepared = prepared.to(dtype)
    for module in prepared.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    forward, is_cpu = prepared.forward, prepared.device.type == "cpu"
    if compile_model:
        forward = torch.compile(forward, fullgraph=True, mode=compile_mode)

    def without_gradients(pixel_values: torch.Tensor, *args, **kwargs):
        pixel_values = pixel_values.detach()  # another object, whose size can be marked
        if compile_model:
            torch._dynamo.mark_dynamic(pixel_values, 0)
        # these matter only when the compiler runs: weights are constants; a batch of one is a batch like any other (and with a
        # fixed size, products in float32 would go to MKL, which is slower here)
        with torch.no_grad(), inductor_config.patch(freezing=is_cpu), shape_config.patch(backed_size_oblivious=True):
            return forward(pixel_values, *args, **kwargs)

    prepared.forward = without_gradients
    return prepared
