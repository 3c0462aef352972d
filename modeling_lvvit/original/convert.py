"""Converts a checkpoint of the authors' code (github.com/zihangJiang/TokenLabeling) to a folder that `AutoModel` loads.

    lvvit convert CHECKPOINT OUTPUT_DIR [--push_to_hub --hub_model_id OWNER/NAME]

Takes classifiers, and the segmentation models that were trained with MMSegmentation (`upernet_lvvit_s.pth` ...). The size of the
model is found from the shapes of its tensors. Before the folder appears, the written model is loaded
again and its logits are compared with those of a plain rendering of the published forward pass, computed from the
original tensors.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.utils.sha import sha_fileobj
from transformers import SegformerImageProcessor
from transformers.hf_argparser import HfArg
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

from ..configuration_lvvit import LVViTConfig
from ..console import program
from ..data.files.atomic_files import atomic_directory, check_new_directory
from ..finite import check_weights
from ..hub.file_checks import CARD, write_weight_digests
from ..hub.folders import publish_model_folder
from ..hub.repository import HubTarget, HubUploadArguments
from ..modeling_lvvit import (
    LVViTForImageClassification,
    LVViTForSemanticSegmentation,
    LVViTPreTrainedModel,
    default_stages,
)
from ..options import Program
from ..variants import ADE20K_CLASSES, VARIANTS, evaluation_image_processor, find_variant, published_row
from .checkpoint import SEGMENTATION_SIGN, config_from_state_dict, load_original_checkpoint
from .family_cards import Conversion, converted_card, family_card, is_released
from .model import OriginalLVViT
from .segmentation import OriginalSegmenter


logger = logging.get_logger(__name__)
# float32 logits of two orders of summation; the published models' logits reach about 10
MAX_LOGITS_DIFFERENCE = 1e-3
# authors' name -> ours, applied in order to every key; the first ones are of segmentation models
HEADS = {"decode": "decoder", "auxiliary": "auxiliary_decoder"}
KEY_PATTERNS = (
    (r"^backbone\.side_layer(\d)\.", lambda match: f"neck.levels.{int(match[1]) - 1}."),
    (r"^backbone\.", ""),
    (r"^(decode|auxiliary)_head\.conv_seg\.", lambda match: f"{HEADS[match[1]]}.classifier.1."),
    (r"^(decode|auxiliary)_head\.", lambda match: f"{HEADS[match[1]]}."),
    (r"\.bn\.", ".batch_norm."),
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
SEGMENTATION_SIZE = {"shortest_edge": 512, "longest_edge": 2048}  # pixels, in all published configurations


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames every tensor; shapes and values stay."""
    converted = {}
    for key, value in state_dict.items():
        for pattern, replacement in KEY_PATTERNS:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    return converted


def convert_checkpoint(
    checkpoint: Path,
    output_dir: Path,
    use_ema: bool = True,
    num_attention_heads: int | None = None,
    residual_divisor: float | None = None,
    released_row: str | None = None,
) -> float:
    """Writes configuration, safetensors weights, image-processor settings, modelling code and model card to `output_dir`.

    Args:
        output_dir: New or empty.
        use_ema: Whether to prefer the averaged weights where the file has both.
        num_attention_heads, residual_divisor: See `LVViTConfig`; only for sizes that were not published.
        released_row: Row of `VARIANTS` or `SEGMENTERS` whose released weights it holds, for the card; default: known by the name of
            the file, else the card claims nothing.

    Returns:
        Largest absolute difference between the reloaded model's logits and those of the original tensors, on two
        random images.

    Raises:
        FileExistsError: If `output_dir` exists and is not empty; nothing in it is touched.
        ValueError: If the checkpoint does not fit, holds NaN or infinite values, is no such row, or the logits differ by more than
            `MAX_LOGITS_DIFFERENCE`.
    """
    check_new_directory(output_dir)
    state_dict, class_names = load_original_checkpoint(checkpoint, use_ema)
    check_weights(state_dict, checkpoint)
    config = config_from_state_dict(state_dict, num_attention_heads, residual_divisor)
    if class_names is not None and len(class_names) == config.num_labels:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}
    is_segmenter = SEGMENTATION_SIGN in state_dict
    row = published_row(config, is_segmenter)
    if released_row not in (None, row):
        raise ValueError(
            f"{checkpoint} is {row or 'no published row'} ({config.num_hidden_layers} layers, {config.hidden_size} wide, input "
            f"{config.image_height_width[0]}, {config.num_labels} classes), not {released_row}."
        )
    model_class, processor = _target(config, is_segmenter)
    with torch.device("meta"):
        model = model_class(config)
    weights, expected = convert_state_dict(state_dict), model.state_dict()
    # the third map of the FCN neck is there for the auxiliary head alone
    weights = {name: weights[name] for name in weights if name in expected or not name.startswith("neck.levels.2.")}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit an LV-ViT of its size: {error}") from error

    with atomic_directory(output_dir) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        reloaded = model_class.from_pretrained(partial, dtype=torch.float32).eval()
        difference = _logits_difference(reloaded, state_dict)
        if not difference <= MAX_LOGITS_DIFFERENCE:
            raise ValueError(f"The converted model's logits differ from the original by {difference:.2e}; not saved.")
        with checkpoint.open("rb") as file:
            conversion = Conversion(checkpoint.name, sha_fileobj(file).hex(), difference)
        if released_row is not None or is_released(row, checkpoint.name):
            card = family_card(row, conversion)
        else:
            card = converted_card(config, output_dir.resolve().name, is_segmenter, conversion)
        card.save(partial / CARD)
        write_weight_digests(partial)
    return difference


def _target(config: LVViTConfig, is_segmenter: bool) -> tuple[type[LVViTPreTrainedModel], Any]:
    """The class that a checkpoint becomes, and its image processor."""
    if is_segmenter:
        # Images keep their shape, in the size of the published evaluation (which looks at them in windows). In the masks of the
        # published dataset, ADE20K with 150 classes, 0 is no class.
        processor = SegformerImageProcessor(
            size=SEGMENTATION_SIZE,
            image_mean=list(IMAGENET_DEFAULT_MEAN),
            image_std=list(IMAGENET_DEFAULT_STD),
            do_reduce_labels=config.num_labels == ADE20K_CLASSES,
        )
        return LVViTForSemanticSegmentation, processor
    variant = find_variant(config)
    fraction = VARIANTS[variant].crop_pct if variant else 0.9
    return LVViTForImageClassification, evaluation_image_processor(config.image_height_width, fraction)


@torch.no_grad()
def _logits_difference(model: LVViTPreTrainedModel, state_dict: dict[str, torch.Tensor]) -> float:
    """Largest difference between the logits of a model and those of the original tensors, on two random images."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, config.num_channels, *config.image_height_width, generator=generator)
    if isinstance(model, LVViTForSemanticSegmentation):
        layer_indices = [int(stage.removeprefix("stage")) - 1 for stage in default_stages(config.num_hidden_layers)]
        reference = OriginalSegmenter(config, layer_indices).eval()
    else:
        reference = OriginalLVViT(config).eval()
    reference.load_state_dict(state_dict)
    expected = reference(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    return (model(images).logits - expected).abs().max().item()


@dataclass
class ConvertArguments(HubUploadArguments):
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {"checkpoint": "options", "hub_model_id": "upload"}

    checkpoint: str | None = HfArg(default=None, help="Authors' .pth or .pth.tar file.")
    output_dir: str | None = HfArg(default=None, help="Folder to write; must not exist or be empty.")
    ema: bool = HfArg(default=True, help="Take the averaged weights of the file where it has them, not the raw ones.")
    num_attention_heads: int | None = HfArg(default=None, help="Only for sizes that were not published.")
    residual_divisor: float | None = HfArg(default=None, help="Only for sizes that were not published.")

    def __post_init__(self):
        self.check_upload()


PROGRAM = Program(
    "lvvit convert",
    __doc__,
    (ConvertArguments,),
    ("checkpoint", "output_dir"),
    required=("checkpoint", "output_dir"),
)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        folder = Path(args.output_dir)
        difference = convert_checkpoint(
            Path(args.checkpoint), folder, args.ema, args.num_attention_heads, args.residual_divisor
        )
        config = LVViTConfig.from_pretrained(folder)
        print(f"{find_variant(config) or 'LV-ViT'}, {config.num_labels} classes -> {folder}")
        print(f"largest logits difference to the original tensors after reload: {difference:.2e}")
        if args.push_to_hub:
            target = HubTarget(args.hub_model_id, private=args.hub_private_repo, revision=args.hub_revision)
            print(f"published: {publish_model_folder(folder, target)}")


if __name__ == "__main__":
    main(sys.argv[1:])
