"""Loaders side by side: decoding, augmentation and collation, in one process."""

import io
from collections import deque
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ..data.decoding import jpeg_regions
from ..labels.columns import label_map_features
from ..labels.label_maps import encode_top_k
from ..token_labeling import TokenLabelCollator, TokenLabelDataset, TrainTransform, finish_images


# ours: with label maps; without; resampled exactly; decoded by Pillow alone
OURS = ("token_labels", "plain_labels", "exact_resize", "without_library")
LOADERS = (*OURS, "timm", "torchvision")
ANNOTATOR_CELLS, TOP_K = 18, 5
CLASSES_IN_AN_IMAGE = 40


def synthetic_rows(
    count: int, num_classes: int, image_size: tuple[int, int] = (500, 375), seed: int = 0
) -> datasets.Dataset:
    """Photo-like JPEG files, width and height in pixels, with `label`, `token_label_ids` and `token_label_scores` of 18 x 18 cells."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(image_size, Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = pixels + rng.normal(0, 8, pixels.shape)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        ids, scores = synthetic_label_map(num_classes, rng)
        row = {"image": {"bytes": file.getvalue(), "path": None}, "label": int(rng.integers(num_classes))}
        rows.append(row | {"token_label_ids": ids.tolist(), "token_label_scores": scores.tolist()})
    shape = (min(TOP_K, num_classes), ANNOTATOR_CELLS, ANNOTATOR_CELLS)
    features = {"image": datasets.Image(), "label": datasets.Value("int64"), **label_map_features(*shape, "int32")}
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def with_label_maps(rows: datasets.Dataset, num_classes: int) -> datasets.Dataset:
    """The images and labels of given rows with synthetic label maps."""
    maps = synthetic_rows(len(rows), num_classes, image_size=(16, 16))
    parts = [rows.select_columns(["image", "label"]), maps.remove_columns(["image", "label"])]
    return datasets.concatenate_datasets(parts, axis=1)


def synthetic_label_map(num_classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores `[5, 18, 18]` of a smooth map that names a few dozen classes."""
    named = rng.choice(num_classes, min(CLASSES_IN_AN_IMAGE, num_classes), replace=False)
    coarse = torch.from_numpy(rng.normal(0, 6, (1, len(named), 5, 5)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(ANNOTATOR_CELLS, ANNOTATOR_CELLS), mode="bicubic")[0]
    ids, scores = encode_top_k(smooth, min(TOP_K, len(named)))
    return named[ids], scores


def token_label_loader(
    rows: datasets.Dataset,
    batch_size: int,
    image_size: tuple[int, int],
    grid_size: tuple[int, int],
    has_maps: bool,
    exact_resize: bool = False,
) -> DataLoader:
    """Our loader with the published augmentation, shuffled."""
    columns = {"ids_column": "token_label_ids", "scores_column": "token_label_scores"} if has_maps else {}
    transform = TrainTransform(image_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, exact_resize=exact_resize)
    samples = TokenLabelDataset(rows, transform, **columns)
    samples.start_epoch(0, 0)
    return DataLoader(samples, batch_size, shuffle=True, collate_fn=TokenLabelCollator(grid_size), drop_last=True)


class _Files(Dataset):
    """Images and labels as plain pipelines read them: open, convert, transform."""

    def __init__(self, rows: datasets.Dataset, transform: Callable | None = None):
        rows = rows.cast_column("image", datasets.Image(decode=False))
        self.contents = [row["image"]["bytes"] for row in rows]
        self.labels, self.transform = rows["label"][:], transform

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.open(io.BytesIO(self.contents[index])).convert("RGB")
        return self.transform(image), self.labels[index]


def loader_call(name: str, rows: datasets.Dataset, batch_size: int) -> Callable[[], object]:
    """A call that takes all batches of an epoch of a loader of `LOADERS`, drawn again, for images of 224 x 224.

    timm's loader has the same augmentation, which it does after the crop and does not follow with labels; that of torchvision the
    same kinds of operations on Pillow images.
    """
    image_size = (224, 224)
    if name == "timm":
        loader = timm.data.create_loader(
            _Files(rows),
            (3, *image_size),
            batch_size,
            is_training=True,
            use_prefetcher=False,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            color_jitter=None,
            interpolation="random",
            num_workers=0,
            persistent_workers=False,
            pin_memory=False,
        )
    elif name == "torchvision":
        steps = [
            v2.RandomResizedCrop(image_size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            v2.RandomErasing(0.25, value="random"),
        ]
        loader = DataLoader(_Files(rows, v2.Compose(steps)), batch_size, shuffle=True, drop_last=True)
    else:
        if name == "without_library":
            jpeg_regions.library = lambda: None  # of this process, which does nothing else
        loader = token_label_loader(
            rows, batch_size, image_size, (14, 14), name != "plain_labels", name == "exact_resize"
        )
    finish = finish_images if name in OURS else tuple  # what is left for the device
    return lambda: deque(map(finish, loader), maxlen=0)
