"""Small models."""

from pathlib import Path

import torch

from modeling_lvvit import LVViTConfig, LVViTForImageClassification
from modeling_lvvit.variants import evaluation_image_processor


NUM_CLASSES, K, MAP_ROWS, MAP_COLUMNS = 7, 3, 6, 5


def tiny_config(**overrides) -> LVViTConfig:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "stem_hidden_size": 8,
        "image_size": (32, 48),
        "patch_size": 8,
        "num_labels": NUM_CLASSES,
    }
    return LVViTConfig(**{**settings, **overrides})


def save_tiny_lvvit(folder: Path, class_names: list[str]) -> Path:
    """Saves a tiny LV-ViT with random weights for images of 32 x 32 pixels."""
    torch.manual_seed(0)
    config = tiny_config(image_size=32, num_labels=len(class_names))
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    LVViTForImageClassification(config).save_pretrained(folder)
    evaluation_image_processor((32, 32), 0.8).save_pretrained(folder)
    return folder
