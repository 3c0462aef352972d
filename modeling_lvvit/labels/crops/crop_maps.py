"""Reading label maps of crops in training, in the epochs and for the rows that they were made for."""

import json
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch

from ...data.image_keys import cut_keys, have_equal_keys, read_keys
from ...data.reduced_copy.record import SOURCE_HASH
from ..label_set import LabelSet
from ..reader import LabelMapReader
from ..storage import PaletteMaps
from .record import CropRecord


WHOLE = (0.0, 0.0, 1.0, 1.0)
BOX_TOLERANCE = 1e-4  # fractions of an image; boxes are drawn in whole pixels


class CropMapReader(LabelMapReader):
    """Label maps of the crops of each row in `num_epochs` epochs, after which they begin again.

    Args:
        dataset: Rows of the label set, `record.num_rows` of each epoch.
        record: How the crops were drawn.

    Raises:
        ValueError: If there are not as many rows.
    """

    def __init__(self, dataset: datasets.Dataset, record: CropRecord):
        super().__init__(dataset)
        self.record = record
        if len(dataset) != record.num_epochs * record.num_rows:
            raise ValueError(
                f"The label set of crops has {len(dataset):,} rows, its record speaks of {record.num_rows:,} in each of "
                f"{record.num_epochs} epochs."
            )

    @property
    def num_epochs(self) -> int:
        """Epochs that have labels."""
        return self.record.num_epochs

    def __len__(self) -> int:
        return self.record.num_rows if self.row_of is None else len(self.row_of)

    def fetch_epoch(self, images: Sequence[int], epoch: int) -> PaletteMaps:
        """Label maps of the crops of several images in an epoch; see `fetch`, which gives those of epoch 0."""
        return self.fetch(self._rows(images, epoch))

    def problems(
        self, images: Sequence[int], num_classes: int
    ) -> tuple[list[tuple[int, str]], tuple[int, ...] | None]:
        """As in `LabelMapReader`, of all epochs."""
        problems, shape = [], None
        for epoch in range(self.num_epochs):
            in_epoch, shape = super().problems(self._rows(images, epoch), num_classes)
            problems += [(offset, f"{text} (crop of epoch {epoch})") for offset, text in in_epoch]
        return problems, shape

    def _rows(self, images: Sequence[int], epoch: int) -> np.ndarray:
        return np.asarray(images) + epoch * self.record.num_rows


def check_drawn(record: CropRecord, options: dict[str, Any]) -> None:
    """Raises a `ValueError` that names the differing options if a run draws other crops than those that have labels.

    Args:
        options: `data_seed` and `TrainTransform.draw_options` of the run.
    """
    if differing := _differing(record.drawn, options):
        raise ValueError(
            f"The label set has labels of other crops than this run draws: {differing}. Train with the options of the label set, or label "
            "the crops of this run: lvvit annotate --crops."
        )


def join_crops(
    labels: LabelSet,
    record: CropRecord,
    dataset: datasets.Dataset,
    row_options: dict[str, Any],
    image_column: str = "image",
    key_column: str | None = None,
    key_pattern: str | None = None,
) -> CropMapReader:
    """Label maps of the crops of training rows, which must be those that were annotated, in their order: it decides what is drawn.

    Args:
        dataset: Training rows, none of them held out.
        row_options: Options that chose them, for the message of an error.
        image_column, key_column, key_pattern: As in `LabelSet.join`.

    Raises:
        ValueError: If they are other rows.
    """
    label_maps, has_numbers = CropMapReader(labels.rows, record), labels.knows_numbers_only
    keys = read_keys(dataset, image_column, None if has_numbers else key_column, has_numbers)
    label_keys = labels.keys.slice(0, record.num_rows)
    if key_pattern is not None:
        keys, label_keys = (cut_keys(side, key_pattern) for side in (keys, label_keys))
    if not have_equal_keys(keys, label_keys):
        differing = _differing(record.rows, row_options)
        reason = (
            differing or "the same options chose them, so that the data must have changed, or `key_column` differs"
        )
        raise ValueError(
            f"The label set has labels of the crops of {len(label_keys):,} training rows, and the {len(keys):,} training rows of this run are "
            f"not these in their order: {reason}. Train with the options of the label set, or label the crops of this run: lvvit annotate "
            "--crops."
        )
    if SOURCE_HASH in dataset.column_names and labels.other_files(dataset, image_column, None, may_be_copies=False):
        raise ValueError(
            "The label set has labels of crops of other image files than those of this reduced copy, and crops are drawn in pixels: other ones "
            "would be drawn here. Train on the images that were labelled, or label the crops of the copy: lvvit annotate --crops."
        )
    labels.compare_files(dataset, image_column, None, is_strict=has_numbers)
    return label_maps


def with_crop_map(sample: dict[str, Any], maps: PaletteMaps, offset: int) -> dict[str, Any]:
    """The sample of a crop with number `offset` of some label maps of crops, which covers it wholly.

    Raises:
        ValueError: If it is the map of another crop.
    """
    drawn, labelled = sample["crop_box"].tolist(), WHOLE if maps.boxes is None else maps.boxes[offset].tolist()
    if not np.allclose(drawn, labelled, rtol=0, atol=BOX_TOLERANCE):
        texts = (" ".join(f"{side:.4f}" for side in box) for box in (labelled, drawn))
        raise ValueError("the labels are of the crop {}, and the crop {} was drawn".format(*texts))
    image = {name: sample[name] for name in ("pixel_values", "normalization", "erased") if name in sample}
    return {
        **image,
        "crop_box": torch.tensor(WHOLE),
        "token_label_palette": torch.from_numpy(maps.palettes[offset]),
        "token_label_index": torch.from_numpy(maps.index[offset].copy()),
        "token_label_scores": torch.from_numpy(maps.scores[offset].copy()),
    }


def _differing(there: dict[str, Any], now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))
    names = [name for name in sorted({*there, *now}) if there.get(name) != now.get(name)]
    return ", ".join(f"`{name}` is {there.get(name)!r} there and {now.get(name)!r} here" for name in names)
