"""Samples of small image tables."""

from collections.abc import Callable

import datasets
import torch

from modeling_lvvit.labels.columns import IDS_COLUMN, SCORES_COLUMN
from modeling_lvvit.token_labeling import AugmentationConfig, TokenLabelDataset, TrainTransform, finish_images


DENSE = {"ids_column": IDS_COLUMN, "scores_column": SCORES_COLUMN}


def plain_transform(**strengths) -> TrainTransform:
    settings = {"horizontal_flip": 0.0, "rand_augment": "none", "random_erasing": 0.0, **strengths}
    return TrainTransform((32, 48), [0.5] * 3, [0.5] * 3, AugmentationConfig(**settings))


def finished(sample: dict) -> torch.Tensor:
    """The image of a sample as the model takes it, float32 `[3, height, width]`."""
    batch = {"pixel_values": sample["pixel_values"][None], "normalization": sample["normalization"]}
    return finish_images({**batch, "erased": [sample["erased"]] if "erased" in sample else []})["pixel_values"][0]


def samples_of(rows: datasets.Dataset, transform: Callable | None = None) -> TokenLabelDataset:
    return TokenLabelDataset(rows, transform or plain_transform(), **DENSE)
