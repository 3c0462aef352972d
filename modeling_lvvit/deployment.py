"""A trained model made ready to answer quickly."""

import torch
from torch import nn

from .modeling_lvvit import LVViTPreTrainedModel


def prepare_for_inference(
    model: LVViTPreTrainedModel,
    dtype: torch.dtype | None = None,
    compile_model: bool = True,
    compile_mode: str | None = None,
) -> LVViTPreTrainedModel:
    """A copy of a model for inference: fused (see `fuse`), cast, compiled.

    The copy is called like the model and gives the same output class; its weights must not be changed. It compiles at the first
    call (about half a minute for S) and again for a first batch of one image or another image size; batches of any other size share
    one graph. On a CPU weights are packed for the matrix units, which `torch.compile` alone does not do: in float32 this is most
    of the gain.

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
    forward = prepared.forward
    if compile_model:
        forward = torch.compile(forward, fullgraph=True, dynamic=True, mode=compile_mode)

    def without_gradients(*args, **kwargs):
        # freezing must be on whenever the compiler may run, and matters only then
        with torch.no_grad(), torch._inductor.config.patch(freezing=prepared.device.type == "cpu"):
            return forward(*args, **kwargs)

    prepared.forward = without_gradients
    return prepared
