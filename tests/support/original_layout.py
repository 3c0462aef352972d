"""Recipe of the reference arrays: the authors' tensor names and shapes, and the values drawn for each name."""

import zlib

import numpy as np
import torch

from modeling_lvvit import LVViTConfig


def generator(name: str) -> np.random.Generator:
    """Every tensor has a stream of its own, so that order does not matter."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))


def recipe_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of one tensor; two gains keep attention and tokens from being almost uniform."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    normal = generator(name).standard_normal(shape, dtype=np.float32)
    if name in ("pos_embed", "cls_token"):
        return normal * np.float32(0.02)
    if len(shape) >= 2:
        gain = 2.0 if name.endswith("attn.qkv.weight") else 4.0 if name == "patch_embed.proj.weight" else 1.0
        return normal * np.float32(gain / np.sqrt(int(np.prod(shape[1:]))))
    if name.endswith("running_var"):
        return np.abs(normal) * np.float32(0.5) + np.float32(0.5)
    if name.endswith("weight"):
        return np.float32(1.0) + np.float32(0.1) * normal
    return np.float32(0.1) * normal


def original_shapes(config: LVViTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dict for a configuration."""
    width, stem, hidden = config.hidden_size, config.stem_hidden_size, config.intermediate_size
    kernel, classes = config.patch_size // 2, config.num_labels
    patches = config.grid_size[0] * config.grid_size[1]
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width)}
    for index, channels in ((1, config.num_channels), (2, stem), (3, stem)):
        side = 7 if index == 1 else 3
        shapes[f"patch_embed.conv{index}.weight"] = (stem, channels, side, side)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"patch_embed.bn{index}.{name}"] = (stem,)
        shapes[f"patch_embed.bn{index}.num_batches_tracked"] = ()
    shapes["patch_embed.proj.weight"] = (width, stem, kernel, kernel)
    shapes["patch_embed.proj.bias"] = (width,)
    for index in range(config.num_hidden_layers):
        linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width)}
        linear["mlp.fc2"] = (width, hidden)
        for name, shape in linear.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            if name != "attn.qkv":
                shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{norm}.weight": (width,), f"blocks.{index}.{norm}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for head in ("head", "aux_head"):
        shapes |= {f"{head}.weight": (classes, width), f"{head}.bias": (classes,)}
    return shapes


def original_state_dict(config: LVViTConfig) -> dict[str, torch.Tensor]:
    """The recipe's weights under the authors' names."""
    return {
        name: torch.from_numpy(np.asarray(recipe_values(name, shape)))
        for name, shape in original_shapes(config).items()
    }


def recipe_images(batch_size: int, side: int) -> torch.Tensor:
    """Inputs of the recipe, `(batch_size, 3, side, side)`; a smaller batch is a prefix of a larger one."""
    shape = (batch_size, 3, side, side)
    return torch.from_numpy(generator("pixel_values").standard_normal(shape, dtype=np.float32))
