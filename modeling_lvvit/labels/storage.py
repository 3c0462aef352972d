"""The stored form of a label set: label maps in Parquet shards, apart from the images that they belong to.

One row for each image:

    image_key            string            what tells which image it is (see `image_keys`)
    image_hash           int64 or null     hash of the image file that was annotated
    token_label_palette  list of classes   the U classes that the map names, ascending; empty for an empty label
    token_label_index    uint16 [K][R][C]  position in the palette of the K classes of each cell, ascending within a cell
    token_label_scores   float16 [K][R][C] their scores; uint8 in the lossy form (`SCORE_STEP`), in older sets int8 in quarters
    map_box              float32 [4]       region of the image that the map covers, (left, top, right, bottom) as fractions
                                           of the image; null: its center square, as wide as its shorter side, in a map
                                           of the image as its file stores it, which its Exif orientation turns later
    outside_mass         float32 or null   probability that the annotator gave to classes outside the K, mean of the cells
    image_note           string            what was special about the image
    epoch                int32             only in a set of training crops (package `crops`): the epoch that draws the crop

The class names are those of the palette's `ClassLabel`. Files have the maps packed, in two other columns (see `packing`), which is undone
when a set is opened. Sets of earlier versions, of few classes, or of many classes a cell, have the columns above in their files.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.files.atomic_files import write_atomically
from .columns import (
    INDEX_COLUMN,
    PALETTE_COLUMN,
    SCORES_COLUMN,
    LabelMapError,
    nested_feature,
    read_palettes,
    to_arrow,
    to_numpy,
)
from .label_maps import build_palette, id_dtype
from .packing import pack, packed_leaves, unpack


KEY_COLUMN, HASH_COLUMN, BOX_COLUMN = "image_key", "image_hash", "map_box"
OUTSIDE_COLUMN, NOTE_COLUMN = "outside_mass", "image_note"
EPOCH_COLUMN = "epoch"
SCORE_STEP = 0.375  # unit of uint8 scores: they are off by at most 3/16
ZERO_SCORE = 86  # uint8 score of 0: they reach from -32.25 to 63.375
ROWS_PER_GROUP = 4096
COMPRESSION_LEVEL = 19  # of zstd; slow to write (about a millisecond a map), as fast to read as any other

# float16 values of lossy scores, indexed by their bits: NumPy multiplies float16 slowly
_LOSSY_SCORES = {
    np.dtype(np.uint8): ((np.arange(256) - ZERO_SCORE) * SCORE_STEP).astype(np.float16),
    np.dtype(np.int8): (np.arange(256, dtype=np.uint8).view(np.int8) * 0.25).astype(np.float16),  # of older sets
}

ScoreType = Literal["float16", "int8"]


@dataclass
class LabelMaps:
    """Label maps of several images, before they are stored.

    Args:
        ids: `(n, K, rows, columns)` integers.
        scores: The same shape, float16.
        boxes: Region of its image that each map covers, `(n, 4)` float32, NaN for the center square; `None` if all maps
            cover the whole image.
    """

    ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PaletteMaps:
    """Label maps of several images as they are read: a class is a position in the palette of its map.

    Args:
        palettes: Of each map the classes that it names, `(U,)` integers, ascending.
        index: Positions, `(n, K, rows, columns)` integers.
        scores: The same shape, float16.
        boxes: As in `LabelMaps`.
        as_stored: Which maps show their image as its file stores it, not turned upright, bool `(n,)`; `None` if none does.
    """

    palettes: list[np.ndarray]
    index: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray | None = None
    as_stored: np.ndarray | None = None

    @classmethod
    def from_ids(cls, ids: np.ndarray, scores: np.ndarray, boxes: np.ndarray | None = None) -> "PaletteMaps":
        """The same maps as `LabelMaps` of these arrays, in their order of classes."""
        padded, index = build_palette(torch.tensor(ids))
        lengths = (index.flatten(1).amax(dim=1) + 1).tolist()
        palettes = [palette[:length] for palette, length in zip(padded.numpy().astype(ids.dtype), lengths)]
        return cls(palettes, index.numpy(), scores, boxes)

    @property
    def ids(self) -> np.ndarray:
        """Class ids, `(n, K, rows, columns)`."""
        return np.stack([palette[index] for palette, index in zip(self.palettes, self.index)])


@dataclass(frozen=True)
class LabelSetLayout:
    """What all rows of a label set share.

    Args:
        k: Classes kept for each cell.
        map_size: Rows and columns of a map.
        score_type: `"float16"`, lossless; or `"int8"`, 8 bits: scores rounded to `SCORE_STEP`.
    """

    class_names: tuple[str, ...]
    k: int
    map_size: tuple[int, int]
    score_type: ScoreType = "float16"

    @property
    def features(self) -> datasets.Features:
        """Features of the columns."""
        shape = (self.k, *self.map_size)
        return datasets.Features(
            {
                KEY_COLUMN: datasets.Value("string"),
                HASH_COLUMN: datasets.Value("int64"),
                PALETTE_COLUMN: datasets.List(datasets.ClassLabel(names=list(self.class_names))),
                INDEX_COLUMN: nested_feature(shape, "uint16"),
                SCORES_COLUMN: nested_feature(shape, "uint8" if self.score_type == "int8" else self.score_type),
                BOX_COLUMN: datasets.List(datasets.Value("float32"), length=4),
                OUTSIDE_COLUMN: datasets.Value("float32"),
                NOTE_COLUMN: datasets.Value("string"),
            }
        )

    def table(
        self,
        keys: Sequence[str],
        hashes: Sequence[int | None],
        maps: LabelMaps,
        outside_mass: Sequence[float | None],
        notes: Sequence[str],
        is_empty: Sequence[bool],
    ) -> pa.Table:
        """Rows of the stored form, all arguments with one entry for each image; maps of empty labels are not looked at."""
        palettes, index, scores = compact(maps.ids, maps.scores, is_empty)
        if self.score_type == "int8":
            steps = np.rint(scores.astype(np.float32) / SCORE_STEP) + ZERO_SCORE
            if steps.min(initial=0) < 0 or steps.max(initial=0) > 255:
                warnings.warn(
                    f"Scores from {scores.min():.1f} to {scores.max():.1f} are cut to what int8 holds, -32.25 to 63.375. Store "
                    "float16, or relative scores (`scores`).",
                    stacklevel=2,
                )
            scores = steps.clip(0, 255).astype(np.uint8)
        lengths = [len(palette) for palette in palettes]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        boxes = maps.boxes if maps.boxes is not None else np.tile(np.float32([0, 0, 1, 1]), (len(maps), 1))
        is_center_square = pa.array(np.isnan(boxes).any(axis=1))
        columns = [
            pa.array(keys, pa.string()),
            pa.array(hashes, pa.int64()),
            pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(palettes).astype(np.int64))),
            to_arrow(index),
            to_arrow(scores),
            pa.FixedSizeListArray.from_arrays(
                pa.array(boxes.astype(np.float32).reshape(-1)), 4, mask=is_center_square
            ),
            pa.array(outside_mass, pa.float32()),
            pa.array(notes, pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=self.features.arrow_schema)


def compact(
    ids: np.ndarray, scores: np.ndarray, is_empty: Sequence[bool]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Palettes, positions in them, and scores, from `(n, K, rows, columns)`; the classes of each cell in ascending order. Those of
    `is_empty` `(n,)` get an empty palette, positions and scores 0."""
    order = np.argsort(ids, axis=1, kind="stable")
    ids, scores = np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    index, palettes = np.zeros(ids.shape, dtype=np.uint16), []
    for row, empty in enumerate(is_empty):
        if empty:
            palettes.append(ids[row, :0, 0, 0])
            scores[row] = 0
            continue
        palette, position = np.unique(ids[row], return_inverse=True)
        if len(palette) > 2**16:
            raise ValueError(f"A map names {len(palette)} classes; at most 65,536 can be stored. Keep fewer per cell.")
        palettes.append(palette)
        index[row] = position.reshape(ids.shape[1:])
    return palettes, index, scores


def read_maps(table: pa.Table, num_classes: int) -> PaletteMaps:
    """Label maps from rows of the stored form; the inverse of `LabelSetLayout.table`. `num_classes` decides the type of the ids.

    Raises:
        LabelMapError: If a row has no map, an empty one, or one with positions outside its palette; names the first.
    """
    table = unpack(table)
    index = to_numpy(table[INDEX_COLUMN]).astype(np.int32)
    lengths, classes = read_palettes(table)
    if (lengths == 0).any():
        raise LabelMapError(int(np.flatnonzero(lengths == 0)[0]), "it has an empty label (see `image_note`)")
    if problems := position_problems(index, lengths):
        raise LabelMapError(*problems[0])
    palettes = np.split(classes.astype(id_dtype(num_classes)), np.cumsum(lengths))[:-1]
    return PaletteMaps(palettes, index, decoded_scores(to_numpy(table[SCORES_COLUMN])), read_map_boxes(table))


def position_problems(index: np.ndarray, lengths: np.ndarray) -> list[tuple[int, str]]:
    """Row offsets and descriptions of positions outside their palette; empty palettes are passed over."""
    highest = index.max(axis=(1, 2, 3), initial=0)
    return [
        (row, f"position {highest[row]} is outside its palette of {lengths[row]} classes")
        for row in np.flatnonzero((highest >= lengths) & (lengths > 0)).tolist()
    ]


def decoded_scores(scores: np.ndarray) -> np.ndarray:
    """Scores as float16, whatever they are stored as."""
    values = _LOSSY_SCORES.get(scores.dtype)
    return scores if values is None else values.take(scores.view(np.uint8))


def read_map_boxes(table: pa.Table) -> np.ndarray | None:
    """`map_box` as `(n, 4)` float32 with NaN for null; `None` without the column."""
    if BOX_COLUMN not in table.column_names:
        return None
    boxes = np.full((len(table), 4), np.nan, dtype=np.float32)
    column = table[BOX_COLUMN].combine_chunks()
    boxes[np.asarray(column.is_valid())] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    return boxes


def map_problems(table: pa.Table, num_classes: int) -> list[tuple[int, str]]:
    """Row offsets and descriptions of what is wrong with the stored form itself, before maps are read."""
    try:
        index = to_numpy(table[INDEX_COLUMN])
        lengths, classes = read_palettes(table)
    except LabelMapError as error:
        return [(error.row, str(error))]
    problems = position_problems(index, lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for position in np.flatnonzero((classes < 0) | (classes >= num_classes))[:10].tolist():
        problems.append((int(owner[position]), f"class id {classes[position]} is outside [0, {num_classes})"))
    order = np.lexsort((classes, owner))
    repeats = order[1:][(np.diff(classes[order]) == 0) & (np.diff(owner[order]) == 0)]
    problems += [(row, "its palette names a class twice") for row in np.unique(owner[repeats])[:10].tolist()]
    if (boxes := read_map_boxes(table)) is not None:
        bad = ((boxes[:, 2:] <= boxes[:, :2]) | np.isinf(boxes[:, 2:]) | np.isinf(boxes[:, :2])).any(axis=1)
        bad |= np.isnan(boxes).any(axis=1) & ~np.isnan(boxes).all(axis=1)
        problems += [(row, f"map_box {boxes[row].tolist()} is no region") for row in np.flatnonzero(bad).tolist()]
    return sorted(problems)


def write_shard(path: Path, table: pa.Table) -> None:
    """Writes rows to a Parquet file, their maps packed, whole or not at all, also when the program is killed."""
    table = pack(table)
    leaves = packed_leaves(table.schema) or [name + ".list.element" * 3 for name in (INDEX_COLUMN, SCORES_COLUMN)]
    options = {
        "row_group_size": ROWS_PER_GROUP,
        "compression": "zstd",
        "compression_level": COMPRESSION_LEVEL,
        "use_dictionary": [f"{BOX_COLUMN}.list.element", NOTE_COLUMN],
        "column_encoding": dict.fromkeys(
            [*leaves, f"{PALETTE_COLUMN}.list.element", OUTSIDE_COLUMN], "BYTE_STREAM_SPLIT"
        ),
    }
    write_atomically(path, lambda file: pq.write_table(table, file, **options))
