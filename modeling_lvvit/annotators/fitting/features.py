"""Features of images, computed once and kept: of a backbone, of its preprocessing, and of the content of an image file.

    FOLDER/<digest>/settings.json        backbone, preprocessing and precision, of which the digest is made
    FOLDER/<digest>/00000.safetensors    `hashes` (n,) int64, and for each head its input (n, D) float32

An image is known by its content. So a run that was killed goes on, copies are computed once, and neither new labels nor further images
make the features of the others useless.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from transformers.utils import logging

from ...backbones.loading import fingerprint
from ...backbones.preprocessing import Preprocessing
from ...backbones.resize import forward_options
from ...console import progress_bar
from ...data.files.atomic_files import write_atomically, write_json
from ...data.image_keys import Strings
from ...data.images import content_hash, read_content
from ...finite import check_scores
from ..image_batches import ImageBatches
from ..pipeline import MISSING, PreparedImage
from ..prefetch import prepared_ahead
from .backbone import mean_of_cells


logger = logging.get_logger(__name__)
ROWS_PER_SHARD = 512
HASHES = "hashes"


def backbone_fingerprint(model: nn.Module, heads: list[str]) -> str:
    """Hash of all weights but those of the heads."""
    layers = {name: model.get_submodule(name) for name in heads}
    for name in heads:
        model.set_submodule(name, nn.Identity())
    try:
        return fingerprint(model)
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


class FeatureStore:
    """Features in a folder.

    Args:
        folder: Of all features, those of other settings too.
        settings: Whatever the features depend on but the images, JSON values.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.folder, self.settings = folder / digest, settings

    def read(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Content hashes `(n,)` and features by head `(n, D)` of all images that are there; shards that are damaged are removed."""
        shards = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                shards.append(load_file(path))
            except (SafetensorError, OSError) as error:
                logger.warning("%s is damaged (%s) and is made again.", path, error)
                path.unlink(missing_ok=True)
        hashes = [shard.pop(HASHES).numpy() for shard in shards]
        names = shards[0] if shards else ()
        features = {name: np.concatenate([shard[name].numpy() for shard in shards]) for name in names}
        return np.concatenate(hashes) if hashes else np.empty(0, dtype=np.int64), features

    def write(self, hashes: list[int], features: dict[str, torch.Tensor]) -> None:
        """Adds a shard."""
        if not self.folder.is_dir():
            write_json(self.folder / "settings.json", self.settings)
        number = 1 + max((int(path.stem) for path in self.folder.glob("*.safetensors")), default=-1)
        content = save({HASHES: torch.tensor(hashes), **features})
        write_atomically(self.folder / f"{number:05d}.safetensors", lambda file: file.write(content))


class FeatureExtractor:
    """Runs a backbone up to its heads.

    Args:
        model: Classifier in evaluation mode.
        heads: Names of the layers whose input is wanted.
        preprocessing: From images to its input.
        bf16: Whether to compute in bfloat16.
    """

    def __init__(self, model: nn.Module, heads: list[str], preprocessing: Preprocessing, bf16: bool):
        self.model, self.heads, self.preprocessing, self.bf16 = model, heads, preprocessing, bf16
        self.device = next(model.parameters()).device
        self.options = forward_options(model, preprocessing.image_size)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels uint8 `(B, 3, height, width)` to the features of each head, float32 `(B, D)` on the CPU; of a head that is applied to
        many tokens or cells, their mean."""
        inputs: dict[str, torch.Tensor] = {}
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, values, name=name: inputs.update({name: values[0]})
            )
            for name in self.heads
        ]
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                self.model(self.preprocessing.normalize(pixels.to(self.device, non_blocking=True)), **self.options)
        finally:
            for handle in handles:
                handle.remove()
        return {
            name: mean_of_cells(value.float(), channels_first=value.ndim == 4).cpu().contiguous()
            for name, value in inputs.items()
        }


def hash_images(rows: datasets.Dataset, keys: Strings, column: str, num_workers: int) -> list[int | None]:
    """Content hash of each image, `None` of those that cannot be read."""

    def read_hash(value: dict[str, Any] | None) -> int | None:
        try:
            return None if value is None else content_hash(read_content(value))
        except MISSING:
            return None

    batches = ImageBatches(rows, column, keys, len(rows), ROWS_PER_SHARD)
    with (
        ThreadPoolExecutor(num_workers) as pool,
        progress_bar(total=len(rows), desc="Reading images", unit="image") as bar,
    ):
        hashes: list[int | None] = []
        for _, values in batches.batches([0]):
            hashes += pool.map(read_hash, values)
            bar.update(len(values))
    return hashes


def compute_features(
    rows: datasets.Dataset,
    keys: Strings,
    column: str,
    hashes: list[int | None],
    extract: FeatureExtractor,
    store: FeatureStore,
    batch_size: int,
    num_workers: int,
) -> tuple[dict[str, np.ndarray], int]:
    """Features of all rows by head, `(n, D)` float32, and how many were computed, the others having been there.

    Args:
        rows, keys, column, hashes: Images, with the name of their column.
        extract: Backbone.
        store: Where features are kept.
        batch_size: Images of a forward pass.
        num_workers: Processes that decode images.

    Raises:
        ValueError: If an image cannot be read, or its features are NaN or infinite; what was computed is kept.
    """
    there, features = store.read()
    first = {number: row for row, number in reversed(list(enumerate(hashes))) if number is not None}
    unreadable = [row for row, number in enumerate(hashes) if number is None]
    missing = sorted([*(first[number] for number in first.keys() - set(there.tolist())), *unreadable])
    if missing:
        selected, selected_keys = rows.select(missing), keys.take(missing)
        batches = ImageBatches(selected, column, selected_keys, ROWS_PER_SHARD, batch_size)
        _fill_store(batches, extract, store, num_workers)
        there, features = store.read()
    order = np.argsort(there, kind="stable")
    places = order[np.searchsorted(there, np.asarray(hashes), sorter=order)]
    return {name: features[name][places] for name in extract.heads}, len(missing)


def _fill_store(batches: ImageBatches, extract: FeatureExtractor, store: FeatureStore, num_workers: int) -> None:
    shard: list[tuple[list[int], dict[str, torch.Tensor]]] = []
    with progress_bar(total=len(batches.rows), desc="Computing features", unit="image") as bar:
        for batch, images in _prepared(batches, extract, num_workers):
            features = extract(torch.stack([image.pixels for image in images]))
            for values in features.values():
                check_scores(values, batch.keys, "the backbone")
            shard.append(([image.content_hash for image in images], features))
            if batch.is_last:
                hashes = [number for part, _ in shard for number in part]
                store.write(hashes, {name: torch.cat([part[name] for _, part in shard]) for name in features})
                shard = []
            bar.update(len(images))


def _prepared(
    batches: ImageBatches, extract: FeatureExtractor, num_workers: int
) -> Iterator[tuple[Any, list[PreparedImage]]]:
    """Batches of images that could all be read; a `ValueError` names one that could not."""
    wanted = batches.batches(range(batches.num_shards))
    for batch, images in prepared_ahead(wanted, extract.preprocessing, num_workers):
        for key, image in zip(batch.keys, images):
            if image.pixels is None:
                raise ValueError(
                    f"Image {key} is {image.note}. Mend the file or take it out of the data; then start again: what was computed so far "
                    "is kept."
                )
        yield batch, images
