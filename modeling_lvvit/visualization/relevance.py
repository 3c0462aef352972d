"""Where a transformer looks for a class: attention of the class token, attention rollout, and class-specific relevance."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..backbones.feature_layout import MAX_PREFIX_TOKENS


CLASS_TOKEN_SHARE = 0.99  # of the gradient that a score from the class token alone has at least in its row


@dataclass
class RelevanceMaps:
    """Maps over the patch tokens, each float32 `(B, rows, columns)`, at least 0.

    Args:
        attention: Attention of the class token in the last layer, mean of the heads.
        logits: `(B, C)`.
        class_ids: The classes that `relevance` is about, `(B,)`.
        patch_logits: Scores of the patch tokens `(B, N, C)`, `None` where the model has none that were trained.
    """

    relevance: torch.Tensor
    attention: torch.Tensor
    rollout: torch.Tensor
    logits: torch.Tensor
    class_ids: torch.Tensor
    patch_logits: torch.Tensor | None = None


def attention_rollout(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Attention from the last layer to the input: the product over the layers of `(mean over heads of A + I) / 2` (Abnar and Zuidema
    2020, arXiv:2005.00928, section 3).

    Args:
        attentions: Of each layer `(B, heads, N, N)`, rows sum to 1.

    Returns:
        `(B, N, N)`; rows sum to 1.
    """
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    rollout = identity
    for attention in attentions:
        rollout = (attention.float().mean(dim=1) + identity) / 2 @ rollout
    return rollout


def class_relevance(attentions: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Relevance of every token for every other, for one class: `R <- R + mean over heads of max(0, dy/dA * A) R`, layer by layer, from
    `R = I` (Chefer, Gur and Wolf, ICCV 2021, arXiv:2103.15679, equations 5 and 6).

    Args:
        attentions: Of each layer `(B, heads, N, N)`.
        gradients: Of the score of the class by each of them.

    Returns:
        `(B, N, N)`, at least 0; the row of the class token is what speaks for the class.

    Example: one layer, one head, two tokens, A = [[0.5, 0.5], [0, 1]] with gradients [[1, 2], [0, -1]]: R = [[1.5, 1], [0, 1]].
    """
    relevance = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention, gradient in zip(attentions, gradients):
        weights = (gradient.float() * attention.float()).clamp(min=0).mean(dim=1)  # (B, N, N)
        relevance = relevance + weights @ relevance
    return relevance


def relevance_maps(
    model: nn.Module,
    pixel_values: torch.Tensor,
    class_ids: torch.Tensor | None = None,
    forward_options: dict[str, Any] | None = None,
) -> RelevanceMaps:
    """Maps of a classifier whose score comes from its class token: LV-ViT, ViT, DeiT and others of transformers and timm.

    The score that is explained is that of the class token (`cls_logits` of LV-ViT), because the maps are those of its attention.

    Args:
        model: In evaluation mode.
        class_ids: Classes to explain, `(B,)`; default: those that the model predicts.
        forward_options: Arguments of the forward pass, such as `interpolate_pos_encoding`.

    Raises:
        ValueError: If the model gives no attention of a class token over a grid of patches, or its score comes from other tokens.
    """
    with torch.enable_grad():
        pixel_values = pixel_values.detach().requires_grad_()  # a graph to differentiate, also through frozen weights
        output, attentions = _forward(model, pixel_values, forward_options or {})
        grid = _patch_grid(model, pixel_values, attentions)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        scores = getattr(output, "cls_logits", None)
        scores = logits if scores is None else scores
        if class_ids is None:
            class_ids = logits.argmax(dim=-1)
        chosen = scores.gather(1, class_ids.to(scores.device)[:, None]).sum()
        gradients = torch.autograd.grad(chosen, attentions)
    _check_class_token(model, gradients[-1])
    attentions = [attention.detach() for attention in attentions]
    num_patches = grid[0] * grid[1]

    def class_token_row(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[:, 0, -num_patches:].float().unflatten(1, grid)  # (B, rows, columns)

    # a patch head that was not trained has weight 0 in the prediction
    is_trained = getattr(getattr(model, "config", None), "patch_logits_weight", 1) != 0
    patch_logits = getattr(output, "patch_logits", None) if is_trained else None
    return RelevanceMaps(
        class_token_row(class_relevance(attentions, gradients)),
        class_token_row(attentions[-1].mean(dim=1)),
        class_token_row(attention_rollout(attentions)),
        logits.detach(),
        class_ids,
        None if patch_logits is None else patch_logits.detach(),
    )


def _forward(
    model: nn.Module, pixel_values: torch.Tensor, forward_options: dict[str, Any]
) -> tuple[Any, list[torch.Tensor]]:
    """Output of a model, and the attention probabilities of its layers, as far as they can be had."""
    network = _unwrap(model)
    if isinstance(network, PreTrainedModel):
        before = network.config._attn_implementation
        network.set_attn_implementation("eager")  # which alone gives the probabilities
        try:
            output = network(pixel_values, output_attentions=True, **forward_options)
        finally:
            network.set_attn_implementation(before)
        attentions = getattr(output, "attentions", None) or ()
        return output, [attention for attention in attentions if attention is not None]
    with _recorded_attention(network) as attentions:
        return network(pixel_values), attentions


def _unwrap(model: nn.Module) -> nn.Module:
    """The model, or the one of timm that it wraps."""
    return getattr(model, "timm_model", model)


def _check_class_token(model: nn.Module, gradient: torch.Tensor) -> None:
    """Raises a `ValueError` if a score depends on what other tokens than the first one receive in the last layer, for example on the mean
    of the patch tokens: the row of the class token is then not all that speaks for the class. `gradient` of the score by the attention of
    the last layer: `(B, heads, N, N)`."""
    received = gradient.float().abs().sum(dim=(0, 1, 3))  # (N,)
    if received.sum() > 0 and received[0] < CLASS_TOKEN_SHARE * received.sum():
        raise ValueError(
            f"The score of {type(model).__name__} does not come from its class token alone; relevance is defined for such models."
        )


def _patch_grid(model: nn.Module, pixel_values: torch.Tensor, attentions: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Rows and columns of the patch tokens, which are the last ones; a `ValueError` unless the attentions are those of a class token and
    such a grid."""
    network = _unwrap(model)
    settings = network.config if isinstance(network, PreTrainedModel) else getattr(network, "patch_embed", None)
    patch_size = getattr(settings, "patch_size", None)
    if isinstance(patch_size, (list, tuple)) and len(set(patch_size)) == 1:
        patch_size = patch_size[0]
    name = type(network).__name__
    if not attentions or not isinstance(patch_size, int) or attentions[0].ndim != 4:
        raise ValueError(
            f"{name} gives no attention over a grid of patches; relevance needs a plain vision transformer."
        )
    grid = tuple(side // patch_size for side in pixel_values.shape[-2:])
    tokens = {side for attention in attentions for side in attention.shape[-2:]}
    if len(tokens) != 1 or not 0 < tokens.pop() - grid[0] * grid[1] <= MAX_PREFIX_TOKENS:
        raise ValueError(
            f"{name} has no class token before {grid[0]} x {grid[1]} patch tokens; relevance needs a plain vision transformer."
        )
    return grid


@contextmanager
def _recorded_attention(network: nn.Module):
    """A list that the attention layers of a model of timm fill in a forward pass with their probabilities.

    They have a switch for fused attention (`fused_attn`); without that the probabilities go through a module, `attn_drop`.
    """
    layers = [module for module in network.modules() if hasattr(module, "fused_attn") and hasattr(module, "attn_drop")]
    if not layers:
        raise ValueError(
            f"{type(network).__name__} has no attention that can be read; relevance needs a plain vision transformer."
        )
    switches = [layer.fused_attn for layer in layers]
    attentions: list[torch.Tensor] = []
    hooks = [layer.attn_drop.register_forward_hook(lambda *call: attentions.append(call[-1])) for layer in layers]
    for layer in layers:
        layer.fused_attn = False
    try:
        yield attentions
    finally:
        for layer, switch, hook in zip(layers, switches, hooks):
            layer.fused_attn = switch
            hook.remove()
