"""Label sets of random maps."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from modeling_lvvit.data.files.shard_folder import package_versions
from modeling_lvvit.labels.publishing import finish_label_set
from modeling_lvvit.labels.storage import LabelMaps, LabelSetLayout
from modeling_lvvit.labels.writer import LabelSetWriter


NUM_CLASSES, MAP_SHAPE = 7, (3, 4, 6)  # K, rows, columns


def random_maps(count: int, num_classes: int = NUM_CLASSES, shape=MAP_SHAPE, seed: int = 0) -> LabelMaps:
    """Maps whose cells name random classes, best first."""
    rng = np.random.default_rng(seed)
    k, rows, columns = shape
    ids = rng.integers(0, num_classes - k + 1, (count, k, rows, columns))
    ids = np.sort(ids, axis=1) + np.arange(k).reshape(1, k, 1, 1)  # distinct within a cell
    scores = -np.sort(-rng.normal(2, 3, ids.shape), axis=1).astype(np.float16)
    return LabelMaps(rng.permuted(ids, axis=1), scores)


def layout_of(maps: LabelMaps, num_classes: int = NUM_CLASSES, score_type: str = "float16") -> LabelSetLayout:
    names = tuple(f"class {index}" for index in range(num_classes))
    return LabelSetLayout(names, maps.ids.shape[1], maps.ids.shape[2:], score_type)


def table_of(maps: LabelMaps, layout: LabelSetLayout | None = None, **columns) -> pa.Table:
    """Rows of the stored form; keys are row numbers, nothing else is known, unless `columns` says more."""
    count = len(maps)
    defaults = {
        "keys": [f"row:{row}" for row in range(count)],
        "hashes": [None] * count,
        "outside_mass": [None] * count,
        "notes": [""] * count,
        "is_empty": [False] * count,
    }
    return (layout or layout_of(maps)).table(maps=maps, **{**defaults, **columns})


def write_label_set(
    folder: Path, table: pa.Table, layout: LabelSetLayout, rows_per_shard: int = 4, split: str = "train"
) -> Path:
    """A finished label set."""
    writer = LabelSetWriter(folder, split, layout, {"annotator": "dice"}, package_versions(), rows_per_shard)
    writer.begin()
    starts = range(0, len(table), rows_per_shard)
    for shard, start in enumerate(starts):
        writer.write(shard, table.slice(start, rows_per_shard))
    finish_label_set(writer, len(starts), "Dice", None)
    return folder


def load(folder: Path, split: str = "train") -> datasets.Dataset:
    return datasets.load_dataset(str(folder), split=split)


def assert_same_cells(ours: LabelMaps, reference: LabelMaps) -> None:
    """Every cell has the same set of (class, score)."""
    for our_part, part in zip(by_class(ours.ids, ours.scores), by_class(reference.ids, reference.scores)):
        assert np.array_equal(our_part, part)


def by_class(ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of each cell, ordered by class."""
    order = np.argsort(ids, axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
