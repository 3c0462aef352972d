"""Small classifiers of transformers and timm."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BitImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

from modeling_lvvit.token_labeling import AugmentationConfig, TokenLabelDataset, TrainTransform
from support.models import NUM_CLASSES


SIZE = (64, 64)
WINDOWS = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VIT = {"image_size": 64, "patch_size": 16, **WIDTH}
REGISTERED = {name: value for name, value in VIT.items() if name != "intermediate_size"}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 1, 1]}
TRANSFORMERS = {
    "vit": (VIT, (4, 4)),
    "deit": (VIT, (4, 4)),
    "beit": (VIT, (4, 4)),
    "dinov2": (REGISTERED, (4, 4)),
    "dinov2_with_registers": (REGISTERED, (4, 4)),
    "swin": (WINDOWS, (8, 8)),
    "swinv2": (WINDOWS, (8, 8)),
    "convnext": (STAGES, (2, 2)),
    "convnextv2": (STAGES, (2, 2)),
    "resnet": ({**STAGES, "embedding_size": 8}, (2, 2)),
    "regnet": ({**STAGES, "embedding_size": 8, "groups_width": 8}, (2, 2)),
    "segformer": (PYRAMID, (2, 2)),
    "focalnet": ({"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1]}, (2, 2)),
    "poolformer": (STAGES, (2, 2)),
    "pvt": ({**PYRAMID, "image_size": 64}, (2, 2)),
    "clip": ({"vision_config": VIT, "text_config": WIDTH}, (4, 4)),
    "mobilenet_v2": ({"image_size": 64, "depth_multiplier": 0.35}, (2, 2)),
    # whose maps are parts of tuples, or whose heads do not work on single cells
    "cvt": ({"embed_dim": [8, 16, 32], "num_heads": [1, 1, 1], "depth": [1, 2, 3]}, (4, 4)),
    "donut-swin": (WINDOWS, (8, 8)),
    "hiera": ({"image_size": [64, 64], "embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}, (2, 2)),
    "pvt_v2": ({**PYRAMID, "image_size": 64}, (2, 2)),
}


def transformers_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, num_labels=NUM_CLASSES, architectures=[], **TRANSFORMERS[kind][0])
    return AutoModelForImageClassification.from_config(config)


def samples_of(rows, **columns: str) -> TokenLabelDataset:
    augmentation = AugmentationConfig(horizontal_flip=0.0, rand_augment="none", random_erasing=0.0)
    columns = columns or {"ids_column": "token_label_ids", "scores_column": "token_label_scores"}
    return TokenLabelDataset(rows, TrainTransform(SIZE, [0.5] * 3, [0.5] * 3, augmentation), **columns)


def save_annotator(folder: Path, names: list[str]) -> Path:
    """A tiny residual network with random weights and the given classes."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(names))
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder
