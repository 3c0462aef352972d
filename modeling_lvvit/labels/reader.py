"""Where the label maps of an image dataset come from: two of its own columns, or a label set joined to it."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..data.images import LYING, read_orientation
from .columns import (
    IDS_COLUMN,
    SCORES_COLUMN,
    LabelMapError,
    check_column_types,
    label_map_problems,
    scale_problems,
    to_numpy,
)
from .label_maps import id_dtype
from .packing import unpacked_rows
from .storage import (
    BOX_COLUMN,
    EPOCH_COLUMN,
    INDEX_COLUMN,
    PALETTE_COLUMN,
    PaletteMaps,
    decoded_scores,
    map_problems,
    position_problems,
    read_map_boxes,
    read_maps,
)


# from the frame of a file to that of the upright image, by Exif orientation, on the last two axes
TURNS = {
    2: lambda array: array[..., ::-1],
    3: lambda array: array[..., ::-1, ::-1],
    4: lambda array: array[..., ::-1, :],
    5: lambda array: array.swapaxes(-1, -2),
    6: lambda array: array.swapaxes(-1, -2)[..., ::-1],
    7: lambda array: array.swapaxes(-1, -2)[..., ::-1, ::-1],
    8: lambda array: array.swapaxes(-1, -2)[..., ::-1, :],
}
SIDEWAYS = "its map of {} x {} cells cannot be turned on its side with the image, which has an Exif orientation: turn the image file upright"


class LabelMapReader:
    """Label maps of the rows of an image dataset, read from Arrow a batch at a time.

    Args:
        dataset: Rows with label maps: columns of ids and scores, or those of a label set (see `storage`).
        row_of: For each image, the row of its map, int64; `None` when image i has map i.
        ids_column, scores_column: Names of the columns of ids and scores. A label set has fixed names.

    Raises:
        ValueError: If a column is missing or has a wrong type.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        row_of: np.ndarray | None = None,
        ids_column: str = IDS_COLUMN,
        scores_column: str = SCORES_COLUMN,
    ):
        dataset = unpacked_rows(dataset)
        self.is_compact = ids_column not in dataset.column_names and INDEX_COLUMN in dataset.column_names
        self.is_of_crops = self.is_compact and EPOCH_COLUMN in dataset.column_names
        columns = [PALETTE_COLUMN, INDEX_COLUMN, SCORES_COLUMN] if self.is_compact else [ids_column, scores_column]
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(f"There is no column {names}; the data has {dataset.column_names}.")
        if not self.is_compact:
            schema = dataset.features.arrow_schema
            check_column_types(schema.field(ids_column).type, schema.field(scores_column).type)
        self.ids_column, self.scores_column = ids_column, scores_column
        self.class_names = label_class_names(dataset)
        self.num_classes = len(self.class_names) if self.class_names else 2**31
        if BOX_COLUMN in dataset.column_names:
            columns.append(BOX_COLUMN)
        self.rows = dataset.select_columns(columns).with_format("arrow")
        self.row_of = row_of
        self.ignores_regions = False
        self._mapped: MmapLabelReader | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.row_of is None else len(self.row_of)

    def without_regions(self) -> "LabelMapReader":
        """The source with every map taken to cover the whole image, as the authors' training code does."""
        return self._changed(ignores_regions=True)

    def select(self, images: np.ndarray) -> "LabelMapReader":
        """The source of some of the images, given by their numbers."""
        return self._changed(row_of=np.asarray(images if self.row_of is None else self.row_of[images]))

    def _changed(self, **attributes: Any) -> "LabelMapReader":
        source = copy.copy(self)
        source.__dict__.update(attributes)
        return source

    def fetch(self, images: Sequence[int]) -> PaletteMaps:
        """Label maps of several images.

        Raises:
            LabelMapError: If one cannot be read; its `row` counts within `images`.
        """
        if not self.is_compact:
            table = self._table(images)
            maps = PaletteMaps.from_ids(*self._ids_and_scores(table), read_map_boxes(table))
        else:
            if self._mapped is None:
                self._mapped = MmapLabelReader(self.rows, id_dtype(self.num_classes))
            rows = np.asarray(images) if self.row_of is None else self.row_of[np.asarray(images)]
            maps = self._mapped.fetch(rows)
            if maps is None:
                maps = read_maps(self._table(images), self.num_classes)  # which names what is wrong
            maps.as_stored = None if maps.boxes is None else np.isnan(maps.boxes[:, 0])
        if self.ignores_regions:
            maps.boxes = None
        return maps

    def as_stored(self, images: Sequence[int]) -> np.ndarray:
        """Which maps of several images show them as their files store them (see `PaletteMaps`), bool `(n,)`."""
        boxes = read_map_boxes(self._table(images)) if self.is_compact else None
        return np.zeros(len(images), dtype=bool) if boxes is None else np.isnan(boxes[:, 0])

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process maps the file itself; views sent there would be the whole label set."""
        return {**self.__dict__, "_mapped": None}

    def problems(
        self, images: Sequence[int], num_classes: int
    ) -> tuple[list[tuple[int, str]], tuple[int, ...] | None]:
        """What is wrong with the maps of several images: offsets within `images` and descriptions; and their common
        `[K, rows, columns]`, `None` where they cannot be read."""
        table = self._table(images)
        if self.is_compact and (problems := map_problems(table, num_classes)):
            return problems, None
        try:
            if self.is_compact:
                maps = read_maps(table, self.num_classes)
                ids, scores = maps.ids, maps.scores
            else:
                ids, scores = self._ids_and_scores(table)
        except LabelMapError as error:
            return [(error.row, str(error))], None
        problems = label_map_problems(ids, scores, num_classes)
        if not self.is_compact and not problems:  # of label sets `lvvit annotate` and `lvvit check labels` say it
            problems = scale_problems(scores, num_classes)
        return problems, ids.shape[1:]

    def _table(self, images: Sequence[int]) -> pa.Table:
        if self.row_of is not None:
            images = self.row_of[np.asarray(images)].tolist()
        return self.rows[images]

    def _ids_and_scores(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        return to_numpy(table[self.ids_column]), to_numpy(table[self.scores_column])


class MmapLabelReader:
    """Columns of a label set as NumPy views of the file that they lie in.

    Rows are copied out of the views one by one. That takes half the time of gathering Arrow slices, of which a batch of
    random rows needs one for each row and column; nothing but the rows asked for is read.

    Args:
        dataset: Label set in Arrow format.
        id_type: Type of the class ids that are returned.
    """

    def __init__(self, dataset: datasets.Dataset, id_type: np.dtype):
        self.id_type = id_type
        self.is_usable, self.has_boxes = dataset._indices is None, False
        self.starts, self.parts = [0], []
        for batch in dataset.data.table.to_batches() if self.is_usable else []:
            if len(batch) and self.is_usable:
                self._add(batch)
        self.starts = np.asarray(self.starts)

    def _add(self, batch: pa.RecordBatch) -> None:
        palettes, maps = batch.column(PALETTE_COLUMN), []
        self.is_usable = isinstance(palettes, pa.ListArray) and not palettes.null_count
        for name in (INDEX_COLUMN, SCORES_COLUMN):
            column, shape = batch.column(name), [len(batch)]
            while isinstance(column, pa.FixedSizeListArray) and not column.null_count:
                shape.append(column.type.list_size)
                column = column.flatten()
            self.is_usable &= len(shape) == 4 and not column.null_count
            if not self.is_usable:
                return
            maps.append(column.to_numpy(zero_copy_only=False).reshape(shape))
        boxes = read_map_boxes(pa.Table.from_batches([batch]))
        if boxes is not None and (boxes == (0, 0, 1, 1)).all():
            boxes = None
        self.has_boxes |= boxes is not None
        self.parts.append((*maps, palettes.offsets.to_numpy(), palettes.values.to_numpy(), boxes))
        self.starts.append(self.starts[-1] + len(batch))

    def fetch(self, rows: np.ndarray) -> PaletteMaps | None:
        """Label maps of rows, `None` if something about the columns or these rows needs a closer look."""
        if not self.is_usable or not len(rows) or rows.min() < 0 or rows.max() >= self.starts[-1]:
            return None
        part_of = np.searchsorted(self.starts, rows, side="right") - 1
        offsets = rows - self.starts[part_of]
        first_index, first_scores = self.parts[0][:2]
        index = np.empty((len(rows), *first_index.shape[1:]), np.int32)
        scores = np.empty((len(rows), *first_scores.shape[1:]), first_scores.dtype)
        boxes = np.tile(np.float32([0, 0, 1, 1]), (len(rows), 1)) if self.has_boxes else None
        palettes = []
        for row, (part, offset) in enumerate(zip(part_of.tolist(), offsets.tolist())):
            part_index, part_scores, borders, classes, part_boxes = self.parts[part]
            index[row], scores[row] = part_index[offset], part_scores[offset]
            palettes.append(classes[borders[offset] : borders[offset + 1]].astype(self.id_type))
            if part_boxes is not None:
                boxes[row] = part_boxes[offset]
        lengths = np.array([len(palette) for palette in palettes])
        if not lengths.all() or position_problems(index, lengths):
            return None
        return PaletteMaps(palettes, index, decoded_scores(scores), boxes)


def label_class_names(labels: datasets.Dataset) -> list[str] | None:
    """Names of the classes that a label set counts, `None` if it has none."""
    feature = getattr(labels.features.get(PALETTE_COLUMN), "feature", None)
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def covered_region(box: np.ndarray | None, width: int, height: int) -> tuple[float, float, float, float]:
    """Region of an image that its map covers, (left, top, right, bottom) as fractions.

    Args:
        box: `(4,)`, NaN for the center square; `None` for the whole image.
        width, height: Size of the image in pixels.
    """
    if box is None:
        return 0.0, 0.0, 1.0, 1.0
    if not np.isnan(box[0]):
        return tuple(box.tolist())
    across, down = min(width, height) / width / 2, min(width, height) / height / 2
    return 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down


def turn_with_images(maps: PaletteMaps, values: Sequence[Any]) -> PaletteMaps:
    """Label maps in the frame of their upright images, which those of images as their files store them are not.

    Args:
        values: Of an image column, `{"bytes": ..., "path": ...}` or Arrow scalars of that; one for each map.

    Raises:
        LabelMapError: If a map that is not square would have to be laid on its side: all maps have one size.
    """
    if maps.as_stored is None or not maps.as_stored.any():
        return maps
    index, scores = maps.index.copy(), maps.scores.copy()
    for row in np.flatnonzero(maps.as_stored).tolist():
        value = values[row].as_py() if isinstance(values[row], pa.Scalar) else values[row]
        orientation = 1 if value is None else read_orientation(value)
        if orientation == 1:
            continue
        if orientation in LYING and index.shape[-2] != index.shape[-1]:
            raise LabelMapError(row, SIDEWAYS.format(*index.shape[-2:]))
        for array in (index, scores):
            array[row] = TURNS[orientation](array[row]).copy()
    return replace(maps, index=index, scores=scores, as_stored=None)
