"""Reading checkpoints of the authors' code, without running anything from them: tensors, and the architecture that their shapes tell."""

import argparse
import math
import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torchvision.models import ResNet50_Weights

from ..configuration_lvvit import LVViTConfig
from ..variants import VARIANTS


# what torch.load raises for files that are cut short, are something else, or hold more than tensors
LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError, AssertionError, struct.error,
    UnpicklingError,
)  # fmt: skip
SEGMENTATION_SIGN = "decode_head.conv_seg.weight"  # a tensor that every segmentation checkpoint has
# The published segmentation runs had an epsilon of 1e-6 in all layer norms (classifiers: 1e-5), and L divided nothing, as its
# configuration leaves `skip_lam` out; their weights need these constants.
SEGMENTATION_LAYER_NORM_EPS = 1e-6
SEGMENTATION_RESIDUAL_DIVISORS = {384: 2.0, 512: 2.0, 768: 1.0}


def load_original_checkpoint(path: Path, use_ema: bool = True) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    """Reads the tensors of an authors' checkpoint, and the class names that MMSegmentation stores with them (else `None`), without
    running code from it.

    Args:
        path: `.pth` or `.pth.tar`: a state dict, or a training checkpoint with `state_dict` and perhaps
            `state_dict_ema`; names may start with `module.`.
        use_ema: Whether to prefer the averaged weights where the file has both.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds more than tensors and plain values, or is not an LV-ViT.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        # training checkpoints carry their command line, a harmless record of attributes
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values (damaged, or it holds Python objects, "
            f"which are never loaded): {reason}."
        ) from error
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    class_names = meta.get("CLASSES") if isinstance(meta, dict) else None
    is_named = isinstance(class_names, (list, tuple)) and all(isinstance(name, str) for name in class_names)
    names = ("state_dict_ema", "state_dict", "model") if use_ema else ("state_dict", "model", "state_dict_ema")
    if isinstance(checkpoint, dict):
        checkpoint = next((checkpoint[name] for name in names if isinstance(checkpoint.get(name), dict)), checkpoint)
    if not isinstance(checkpoint, dict) or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name, directly or under {names}.")
    state_dict = {key.removeprefix("module."): value for key, value in checkpoint.items()}
    prefix = "backbone." if SEGMENTATION_SIGN in state_dict else ""
    wanted = [f"{prefix}{name}" for name in ("pos_embed", "patch_embed.conv1.weight", "patch_embed.proj.weight")]
    wanted.append("backbone.side_layer4.0.weight" if prefix else "head.weight")
    if missing := [key for key in wanted if key not in state_dict]:
        raise ValueError(f"{path} is not an LV-ViT checkpoint: it has no {', '.join(missing)}.")
    return state_dict, list(class_names) if is_named else None


def config_from_state_dict(
    state_dict: dict[str, torch.Tensor], num_attention_heads: int | None, residual_divisor: float | None
) -> LVViTConfig:
    """Architecture from the shapes; heads and residual divisor, which leave no trace in them, from the published sizes.

    Raises:
        ValueError: If the size is not a published one and heads or divisor are not given, or the grid is not square.
    """
    if SEGMENTATION_SIGN not in state_dict:
        fields = _backbone_fields(state_dict, num_attention_heads, residual_divisor)
        num_labels = state_dict["head.weight"].shape[0]
        if num_labels != 1000:
            return LVViTConfig(**fields, num_labels=num_labels)
        names = ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
        label2id = {name: index for index, name in enumerate(names)}
        return LVViTConfig(**fields, id2label=dict(enumerate(names)), label2id=label2id)
    backbone = {key.removeprefix("backbone."): value for key, value in state_dict.items()}
    divisor = residual_divisor or SEGMENTATION_RESIDUAL_DIVISORS.get(backbone["pos_embed"].shape[-1])
    is_upernet = "decode_head.bottleneck.conv.weight" in state_dict
    num_labels, decoder_channels = state_dict[SEGMENTATION_SIGN].shape[:2]
    return LVViTConfig(
        **_backbone_fields(backbone, num_attention_heads, divisor),
        layer_norm_eps=SEGMENTATION_LAYER_NORM_EPS,
        segmentation_head="upernet" if is_upernet else "fcn",
        neck_channels=backbone[f"side_layer4.{0 if is_upernet else 3}.weight"].shape[0],
        decoder_channels=decoder_channels,
        auxiliary_loss_weight=0.4 if "auxiliary_head.conv_seg.weight" in state_dict else 0.0,
        num_labels=num_labels,
    )


def _backbone_fields(
    state_dict: dict[str, torch.Tensor], num_attention_heads: int | None, residual_divisor: float | None
) -> dict[str, Any]:
    width, stem, kernel, _ = state_dict["patch_embed.proj.weight"].shape
    layers = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks."))
    sizes = {
        (row.architecture["hidden_size"], row.architecture["num_hidden_layers"]): row for row in VARIANTS.values()
    }
    published = sizes[width, layers].architecture if (width, layers) in sizes else {}
    num_attention_heads = num_attention_heads or published.get("num_attention_heads")
    residual_divisor = residual_divisor or published.get("residual_divisor")
    if num_attention_heads is None or residual_divisor is None:
        raise ValueError(
            f"No published LV-ViT has width {width} and {layers} layers; pass --num_attention_heads and "
            "--residual_divisor (`skip_lam` in the authors' code)."
        )
    num_patches = state_dict["pos_embed"].shape[1] - 1
    rows = math.isqrt(num_patches)
    if rows**2 != num_patches:
        raise ValueError(f"`pos_embed` has {num_patches} patch positions, which is no square grid.")
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "stem_hidden_size": stem,
        "residual_divisor": residual_divisor,
        "image_size": rows * kernel * 2,
        "patch_size": kernel * 2,
        "num_channels": state_dict["patch_embed.conv1.weight"].shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
    }
