"""Loaders side by side: decoding, augmentation and collation, in one process."""

import io
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import v2

from ..labels.label_maps import encode_top_k
from ..token_labeling import TokenLabelCollator, TokenLabelDataset, TrainTransform


LOADERS = ("token_labels", "plain_labels", "timm", "torchvision")
ANNOTATOR_CELLS, TOP_K = 18, 5
CLASSES_IN_AN_IMAGE = 40


def synthetic_rows(count: int, num_classes: int, image_size: tuple[int, int] = (500, 375), seed: int = 0):
    """Photo-like JPEG files with label maps of 18 x 18 cells.

    Args:
        count: Rows.
        num_classes: Class ids lie in `[0, num_classes)`.
        image_size: Width and height in pixels.

    Returns:
        `datasets.Dataset` with `image`, `label`, `token_label_ids`, `token_label_scores`.
    """
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
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.Value("int64"),
        token_label_ids=datasets.List(datasets.List(datasets.List(datasets.Value("int32")))),
        token_label_scores=datasets.List(datasets.List(datasets.List(datasets.Value("float16")))),
    )
    return datasets.Dataset.from_list(rows, features=features)


def with_label_maps(rows: datasets.Dataset, num_classes: int, seed: int = 0) -> datasets.Dataset:
    """The images and labels of given rows with synthetic label maps."""
    maps = synthetic_rows(len(rows), num_classes, image_size=(16, 16), seed=seed)
    rows = rows.select_columns(["image", "label"])
    return datasets.concatenate_datasets(
        [rows, maps.select_columns(["token_label_ids", "token_label_scores"])], axis=1
    )


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
    with_maps: bool = True,
) -> torch.utils.data.DataLoader:
    """Our loader with the published augmentation, shuffled."""
    columns = {"ids_column": "token_label_ids", "scores_column": "token_label_scores"} if with_maps else {}
    samples = TokenLabelDataset(
        rows, TrainTransform(image_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), **columns
    )
    samples.start_epoch(0, 0)
    collator = TokenLabelCollator(grid_size)
    return torch.utils.data.DataLoader(samples, batch_size, shuffle=True, collate_fn=collator, drop_last=True)


class _Files(torch.utils.data.Dataset):
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


def timm_loader(rows: datasets.Dataset, batch_size: int, image_size: tuple[int, int]) -> torch.utils.data.DataLoader:
    """timm's loader with the same augmentation; it augments after the crop and does not follow it with labels."""
    return timm.data.create_loader(
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


def torchvision_loader(
    rows: datasets.Dataset, batch_size: int, image_size: tuple[int, int]
) -> torch.utils.data.DataLoader:
    """A plain torchvision v2 pipeline on Pillow images with the same kinds of operations."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            v2.RandomErasing(0.25, value="random"),
        ]
    )
    return torch.utils.data.DataLoader(_Files(rows, transform), batch_size, shuffle=True, drop_last=True)


def loader_call(
    name: str, rows: datasets.Dataset, batch_size: int, image_size: tuple[int, int], grid_size: tuple[int, int]
) -> Callable[[], object]:
    """A call that takes all batches of an epoch of a loader of `LOADERS`, drawn again."""
    if name == "timm":
        loader = timm_loader(rows, batch_size, image_size)
    elif name == "torchvision":
        loader = torchvision_loader(rows, batch_size, image_size)
    else:
        loader = token_label_loader(rows, batch_size, image_size, grid_size, with_maps=name == "token_labels")
    return lambda: deque(loader, maxlen=0)


def endless(loader: torch.utils.data.DataLoader) -> Iterator[Any]:
    """Batches of one epoch after another."""
    while True:
        yield from loader
