"""Images with masks for tests: rows of different sizes whose colors say their class."""

import io

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers import SegformerImageProcessor

from modeling_lvvit import LVViTForSemanticSegmentation
from modeling_lvvit.data.masks import MaskEncoding
from modeling_lvvit.segmentation.arguments import SegmentationTrainingArguments
from modeling_lvvit.segmentation.dataset import SegmentationDataset
from modeling_lvvit.segmentation.inference import InferenceSettings
from modeling_lvvit.segmentation.trainer import SegmentationTrainer
from modeling_lvvit.segmentation.transforms import (
    SegmentationAugmentation,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from support.images import encode_image
from support.models import tiny_config


NAMES = ["sky", "road", "car", "tree"]
COLORS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [0, 0, 0]], dtype=np.uint8)
HALF = ([0.5] * 3, [0.5] * 3)
PLAIN = SegmentationAugmentation((1.0, 1.0), 1.0, 0.0, 0.0)
SETTINGS = {"num_labels": len(NAMES), "num_hidden_layers": 4, "neck_channels": 16, "decoder_channels": 8}


def scene(height: int, width: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colors are those of its classes, and its mask: class 0 with rectangles of others and of ignored pixels."""
    mask = np.zeros((height, width), dtype=np.uint8)
    for index in (1, 2, 3, 255, 2, 1):
        top, left = rng.integers(0, height - 6), rng.integers(0, width - 6)
        mask[top : top + rng.integers(4, height), left : left + rng.integers(4, width)] = index
    mask[:4, :4] = 0
    return COLORS[np.where(mask == 255, 4, mask)], mask


def mask_bytes(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def masked_rows(count: int = 12, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((30, 44), (44, 30), (37, 41))):
    """Rows of sizes in turn, with the columns image and annotation."""
    rng = np.random.default_rng(seed)
    scenes = [scene(*sizes[index % len(sizes)], rng) for index in range(count)]
    return rows_of([image for image, _ in scenes], [mask_bytes(mask) for _, mask in scenes])


def rows_of(arrays: list[np.ndarray | bytes], masks: list[bytes | None]) -> datasets.Dataset:
    """Rows of images (or their files) and of files of masks."""
    kind = datasets.Image().pa_type
    contents = [array if isinstance(array, bytes) else encode_image(array, "PNG") for array in arrays]
    images = [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(contents)]
    files = [None if mask is None else {"bytes": mask, "path": f"{row}_mask.png"} for row, mask in enumerate(masks)]
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    columns = [pa.array(images, kind), pa.array(files, kind)]
    return datasets.Dataset(pa.Table.from_arrays(columns, schema=features.arrow_schema))


def samples_of(rows: datasets.Dataset, transform=None, encoding: MaskEncoding | None = None) -> SegmentationDataset:
    """Whole images, or what a transform makes of them."""
    transform = transform or SegmentationEvalTransform(*HALF)
    return SegmentationDataset(rows, transform, encoding or MaskEncoding(len(NAMES)), mask_column="annotation")


def crops_of(rows: datasets.Dataset, augmentation: SegmentationAugmentation | None = None, **settings):
    """Training samples of 32 x 48 pixels."""
    return samples_of(rows, SegmentationTrainTransform((32, 48), *HALF, 255, augmentation, **settings))


def segmenter(**settings) -> LVViTForSemanticSegmentation:
    """A tiny model with the seed 0."""
    torch.manual_seed(0)
    return LVViTForSemanticSegmentation(tiny_config(**{**SETTINGS, **settings}))


def trainer_of(model, folder, rows=None, evaluation=None, **options) -> SegmentationTrainer:
    """A trainer on crops of rows that evaluates whole images in windows of 32 x 48 pixels."""
    defaults = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 4}
    defaults |= {"learning_rate": 1e-2, "max_steps": 2, "use_cpu": True, "seed": 3}
    return SegmentationTrainer(
        model,
        SegmentationTrainingArguments(str(folder), **{**defaults, **options}),
        None if rows is None else crops_of(rows),
        None if evaluation is None else samples_of(evaluation),
        InferenceSettings((32, 48), (20, 30)),
        processing_class=SegformerImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    )


CLASSES = 5


def random_maps(number: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels; class 4 is nowhere, class 3 only predicted, a tenth is ignored."""
    rng = np.random.default_rng(seed)
    predictions = rng.integers(0, 4, (number, 13, 17))
    labels = rng.integers(0, 3, predictions.shape)
    labels[rng.random(labels.shape) < 0.1] = 255
    return predictions, labels
