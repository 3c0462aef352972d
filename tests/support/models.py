"""Small models."""

from modeling_lvvit import LVViTConfig


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
