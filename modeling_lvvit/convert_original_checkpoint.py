"""Converts a checkpoint of the authors' code (github.com/zihangJiang/TokenLabeling) to a folder that `AutoModel` loads.

    python -m modeling_lvvit.convert_original_checkpoint CHECKPOINT OUTPUT_DIR

Takes classifiers, and the segmentation models that were trained with MMSegmentation (`upernet_lvvit_s.pth` ...). The size of the
model is found from the shapes of its tensors. Before the folder appears, the written model is loaded
again and its logits are compared with those of a plain rendering of the published forward pass, computed from the
original tensors.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torchvision.models import ResNet50_Weights
from transformers import SegformerImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_lvvit import LVViTConfig
from .modeling_lvvit import LVViTForImageClassification, LVViTPreTrainedModel
from .modeling_lvvit_segmentation import LVViTForSemanticSegmentation, default_stages
from .original_model import OriginalLVViT
from .original_segmentation import OriginalSegmenter
from .variants import VARIANTS, evaluation_image_processor, find_variant


# float32 logits of two orders of summation; the published models' logits reach about 10
MAX_LOGITS_DIFFERENCE = 1e-3
# authors' name -> ours, applied in order to every key
KEY_PATTERNS = (
    (r"^cls_token$", "lvvit.embeddings.cls_token"),
    (r"^pos_embed$", "lvvit.embeddings.position_embeddings"),
    (r"^patch_embed\.conv(\d)\.", r"lvvit.embeddings.patch_embeddings.conv\1."),
    (r"^patch_embed\.bn(\d)\.", r"lvvit.embeddings.patch_embeddings.norm\1."),
    (r"^patch_embed\.proj\.", "lvvit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"lvvit.layers.\1.attention.projection."),
    (r"^blocks\.(\d+)\.attn\.", r"lvvit.layers.\1.attention."),
    (r"^blocks\.(\d+)\.", r"lvvit.layers.\1."),
    (r"^norm\.", "lvvit.layernorm."),
    (r"^head\.", "classifier."),
    (r"^aux_head\.", "patch_classifier."),
)
SEGMENTATION_PATTERNS = (
    (r"^backbone\.side_layer(\d)\.", lambda match: f"neck.levels.{int(match[1]) - 1}."),
    (r"^(decode|auxiliary)_head\.conv_seg\.", lambda match: f"{HEADS[match[1]]}.classifier.1."),
    (r"^(decode|auxiliary)_head\.", lambda match: f"{HEADS[match[1]]}."),
)
HEADS = {"decode": "decoder", "auxiliary": "auxiliary_decoder"}
SEGMENTATION_SIGN = "decode_head.conv_seg.weight"  # a tensor that every segmentation checkpoint has
# The published segmentation runs had an epsilon of 1e-6 in all layer norms (classifiers: 1e-5), and L divided nothing, as its
# configuration leaves `skip_lam` out; their weights need these constants.
SEGMENTATION_LAYER_NORM_EPS = 1e-6
SEGMENTATION_SIZE = {"shortest_edge": 512, "longest_edge": 2048}  # pixels, in all published configurations
ADE20K_CLASSES = 150
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
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
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
        num_labels = state_dict["head.weight"].shape[0]
        labels = ResNet50_Weights.IMAGENET1K_V2.meta["categories"] if num_labels == 1000 else None
        names = {"id2label": dict(enumerate(labels))} if labels else {"num_labels": num_labels}
        if labels:
            names["label2id"] = {label: index for index, label in enumerate(labels)}
        return LVViTConfig(**_trunk_fields(state_dict, num_attention_heads, residual_divisor), **names)
    trunk = {key.removeprefix("backbone."): value for key, value in state_dict.items() if key.startswith("backbone.")}
    width = trunk["pos_embed"].shape[-1]
    divisor = residual_divisor or SEGMENTATION_RESIDUAL_DIVISORS.get(width)
    is_upernet = "decode_head.bottleneck.conv.weight" in state_dict
    num_labels, decoder_channels = state_dict[SEGMENTATION_SIGN].shape[:2]
    return LVViTConfig(
        **_trunk_fields(trunk, num_attention_heads, divisor),
        layer_norm_eps=SEGMENTATION_LAYER_NORM_EPS,
        segmentation_head="upernet" if is_upernet else "fcn",
        neck_channels=trunk[f"side_layer4.{0 if is_upernet else 3}.weight"].shape[0],
        decoder_channels=decoder_channels,
        auxiliary_loss_weight=0.4 if "auxiliary_head.conv_seg.weight" in state_dict else 0.0,
        num_labels=num_labels,
    )


def _trunk_fields(
    state_dict: dict[str, torch.Tensor], num_attention_heads: int | None, residual_divisor: float | None
) -> dict[str, Any]:
    width, stem, kernel, _ = state_dict["patch_embed.proj.weight"].shape
    layers = 1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("blocks."))
    published = next(
        (v for v in VARIANTS.values() if v.architecture["hidden_size"] == width
         and v.architecture["num_hidden_layers"] == layers), None
    )  # fmt: skip
    if published is not None:
        num_attention_heads = num_attention_heads or published.architecture["num_attention_heads"]
        residual_divisor = residual_divisor or published.architecture["residual_divisor"]
    if num_attention_heads is None or residual_divisor is None:
        raise ValueError(
            f"No published LV-ViT has width {width} and {layers} layers; pass --num_attention_heads and "
            "--residual_divisor (`skip_lam` in the authors' code)."
        )
    num_patches = state_dict["pos_embed"].shape[1] - 1
    rows = next((r for r in range(1, num_patches + 1) if r * r == num_patches), None)
    if rows is None:
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


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames every tensor; shapes and values stay."""
    return {_renamed(key): value for key, value in state_dict.items()}


def _renamed(key: str) -> str:
    for pattern, replacement in SEGMENTATION_PATTERNS:
        new_key, count = re.subn(pattern, replacement, key)
        if count:
            return new_key.replace(".bn.", ".batch_norm.")
    key = key.removeprefix("backbone.")
    for pattern, replacement in KEY_PATTERNS:
        new_key, count = re.subn(pattern, replacement, key)
        if count:
            return new_key
    return key


def convert_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    use_ema: bool = True,
    num_attention_heads: int | None = None,
    residual_divisor: float | None = None,
) -> float:
    """Writes configuration, safetensors weights, image-processor settings and modelling code to `output_dir`.

    Returns:
        Largest absolute difference between the reloaded model's logits and those of the original tensors, on two
        random images.

    Raises:
        FileExistsError: If `output_dir` exists and is not empty; nothing in it is touched.
        ValueError: If the checkpoint does not fit, or the logits differ by more than `MAX_LOGITS_DIFFERENCE`.
    """
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"{output_dir} exists and is not empty; choose another output directory.")
    state_dict, class_names = load_original_checkpoint(checkpoint, use_ema)
    config = config_from_state_dict(state_dict, num_attention_heads, residual_divisor)
    if class_names is not None and len(class_names) == config.num_labels:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
    model_class, processor = _target(config, SEGMENTATION_SIGN in state_dict)
    with torch.device("meta"):
        model = model_class(config)
    try:
        weights, known = convert_state_dict(state_dict), model.state_dict()
        # the third map of the FCN neck is there for the auxiliary head alone
        weights = {name: weights[name] for name in weights if name in known or not name.startswith("neck.levels.2.")}
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit an LV-ViT of its size: {error}") from error

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        reloaded = model_class.from_pretrained(partial, dtype=torch.float32).eval()
        difference = _logits_difference(reloaded, state_dict)
        if not difference <= MAX_LOGITS_DIFFERENCE:
            raise ValueError(f"The converted model's logits differ from the original by {difference:.2e}; not saved.")
        partial.chmod(0o755)
        if output_dir.exists():
            output_dir.rmdir()
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def _target(config: LVViTConfig, is_segmentation: bool) -> tuple[type[LVViTPreTrainedModel], Any]:
    """The class that a checkpoint becomes, and its image processor."""
    if is_segmentation:
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        # Pictures keep their shape, in the size of the published evaluation (which looks at them in windows). In the masks of the
        # published data set, ADE20K with 150 classes, 0 is no class.
        reduces = config.num_labels == ADE20K_CLASSES
        processor = SegformerImageProcessor(
            size=SEGMENTATION_SIZE, image_mean=mean, image_std=std, do_reduce_labels=reduces
        )
        return LVViTForSemanticSegmentation, processor
    variant = find_variant(config)
    fraction = VARIANTS[variant].crop_fraction if variant else 0.9
    return LVViTForImageClassification, evaluation_image_processor(config.image_height_width, fraction)


@torch.no_grad()
def _logits_difference(model: LVViTPreTrainedModel, state_dict: dict[str, torch.Tensor]) -> float:
    """Largest difference between the logits of a model and those of the original tensors, on two random images."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, *config.image_height_width, generator=generator)
    if isinstance(model, LVViTForSemanticSegmentation):
        taps = [int(stage.removeprefix("stage")) - 1 for stage in default_stages(config.num_hidden_layers)]
        reference = OriginalSegmenter(config, taps).eval()
    else:
        reference = OriginalLVViT(config).eval()
    reference.load_state_dict(state_dict)
    expected = reference(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    return (model(images).logits - expected).abs().max().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="authors' .pth or .pth.tar file")
    parser.add_argument("output_dir", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--no_ema", action="store_true", help="take the raw weights where the file also has averaged ones"
    )
    parser.add_argument("--num_attention_heads", type=int, help="only for sizes that were not published")
    parser.add_argument("--residual_divisor", type=float, help="only for sizes that were not published")
    args = parser.parse_args(arguments)
    try:
        difference = convert_checkpoint(
            args.checkpoint, args.output_dir, not args.no_ema, args.num_attention_heads, args.residual_divisor
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    config = LVViTConfig.from_pretrained(args.output_dir)
    print(f"{find_variant(config) or 'LV-ViT'}, {config.num_labels} classes -> {args.output_dir}")
    print(f"largest logits difference to the original tensors after reload: {difference:.2e}")


if __name__ == "__main__":
    main()
