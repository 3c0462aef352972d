"""Small backbones, and images whose classes differ in color, for fitting annotators."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from modeling_lvvit.annotators.fitting.arguments import FitAnnotatorArguments
from support.images import encode_image


NAMES = ["ant", "bee", "cat"]
COLORS = np.array([[200, 90, 60], [70, 180, 90], [80, 100, 190]])


def save_resnet(folder: Path) -> Path:
    """A residual network with random weights for 5 classes and images of 48 x 48 pixels, maps of 6 x 6 cells, 16 features."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    ResNetForImageClassification(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return folder


def colored_images(classes: list[int], seed: int = 0) -> list[bytes]:
    """PNG files of different shapes: noise around the color of the class, weak enough that some are mistaken for others."""
    rng = np.random.default_rng(seed)
    images = []
    for index in classes:
        shift = rng.normal(0, 60, 3)
        noise = rng.normal(0, 40, (rng.integers(40, 70), rng.integers(40, 70), 3))
        images.append(encode_image((COLORS[index] + shift + noise).clip(0, 255).astype(np.uint8), "PNG"))
    return images


def save_rows(path: Path, images: list[bytes], classes: list[int], names: list[str] = NAMES) -> Path:
    """A Parquet file of images called 0.png, 1.png, ... with their classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(images)]
    table = pa.Table.from_arrays(
        [pa.array(rows, datasets.Image().pa_type), pa.array(classes)], schema=features.arrow_schema
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


def arguments(data: Path, backbone: Path | str, output: Path, **more) -> FitAnnotatorArguments:
    return FitAnnotatorArguments(
        dataset_name=str(data), backbone=str(backbone), output_dir=str(output), num_workers=1, batch_size=8, **more
    )
