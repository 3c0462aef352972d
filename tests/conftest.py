"""Fixtures: no network, small models, small data."""

import copy
import io
import os
import time


os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import torch
from huggingface_hub import constants
from local_hub import local_hub
from PIL import Image

from modeling_lvvit import LVViTConfig, LVViTForImageClassification
from modeling_lvvit.token_labeling.label_columns import label_map_features, to_arrow


NUM_CLASSES, K, MAP_ROWS, MAP_COLUMNS = 7, 3, 6, 5


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def _tiny_model() -> LVViTForImageClassification:
    torch.manual_seed(0)
    return LVViTForImageClassification(tiny_config())


@pytest.fixture
def tiny_model(_tiny_model) -> LVViTForImageClassification:
    """32 x 48 pixels in patches of 8: a grid of 4 rows and 6 columns."""
    return copy.deepcopy(_tiny_model)


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


def encode_picture(array: np.ndarray, file_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=file_format)
    return buffer.getvalue()


def labelled_table(num_rows: int = 12, seed: int = 0) -> pa.Table:
    """Random pictures of different sizes with labels and label maps."""
    rng = np.random.default_rng(seed)
    pictures = [
        encode_picture(rng.integers(0, 256, (rng.integers(20, 40), rng.integers(20, 60), 3), dtype=np.uint8))
        for _ in range(num_rows)
    ]
    shape = (num_rows, K, MAP_ROWS, MAP_COLUMNS)
    ids = np.argsort(rng.random((num_rows, NUM_CLASSES, MAP_ROWS, MAP_COLUMNS)), axis=1)[:, :K].astype(np.int16)
    scores = -np.sort(-rng.normal(2, 2, shape).astype(np.float16), axis=1)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {index}" for index in range(NUM_CLASSES)]),
            **label_map_features(K, MAP_ROWS, MAP_COLUMNS, "int16"),
        }
    )
    columns = [
        pa.array(
            [{"bytes": picture, "path": f"{row}.jpg"} for row, picture in enumerate(pictures)],
            datasets.Image().pa_type,
        ),
        pa.array(rng.integers(0, NUM_CLASSES, num_rows)),
        to_arrow(ids),
        to_arrow(scores),
    ]
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)


@pytest.fixture
def labelled_rows() -> datasets.Dataset:
    return datasets.Dataset(labelled_table())


@pytest.fixture
def hub(monkeypatch):
    """A hub that the clients of this process take for the real one."""
    with local_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's own repetitions
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()
