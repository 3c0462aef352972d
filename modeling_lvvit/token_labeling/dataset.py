"""A view of a `datasets.Dataset` whose rows become training or evaluation samples."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers.utils import logging

from ..data.classes.class_labels import class_ids
from ..data.classes.multi_label import is_list, multi_hot
from ..data.decoding import EncodedImage
from ..data.image_dataset import ImageDataset, check_has_columns, with_image_column
from ..data.images import LYING, SampleError, read_orientation
from ..labels.columns import LabelMapError
from ..labels.crops import CropMapReader, with_crop_map
from ..labels.reader import SIDEWAYS, LabelMapReader, covered_region, turn_with_images
from ..labels.storage import PaletteMaps


logger = logging.get_logger(__name__)
REMOTE = "remote"


def transformed(transform: Callable, image: EncodedImage, maps: PaletteMaps | None, offset: int) -> dict[str, Any]:
    """What a transform makes of an image and, where there are maps, of number `offset` of them. It gets a decoded image unless it says that
    it `reads_regions`."""
    image = image.read_by(transform)
    if maps is None:
        return transform(image)
    region = covered_region(None if maps.boxes is None else maps.boxes[offset], *image.size)
    sample = transform(image, maps.index[offset], maps.scores[offset], region)
    return {**sample, "token_label_palette": torch.from_numpy(maps.palettes[offset])}


class TokenLabelDataset(ImageDataset):
    """Decodes images and label maps of a `datasets.Dataset` and transforms them together; label maps never become Python lists.

    Args:
        dataset: Rows with an image column and an integer or `ClassLabel` column; or one of lists of `ClassLabel`, for images with several
            classes (without dense labels).
        transform: Called with an image, and where there are maps with the palette positions, scores and region of its map;
            returns a dict of tensors (`TrainTransform`, `ImageProcessorTransform`).
        ids_column, scores_column: Dense-label columns of the dataset itself, or `None` for both.
        label_maps: Instead of them, a label set joined to the rows (`LabelSet.join`), or one of training crops (`join_crops`): then
            epochs repeat after those that have labels, with their crops.
        may_lack_labels: Whether the class -1 stands for images without a human label, which dense labels teach.
        name: What messages call the dataset.

    Raises:
        ValueError: If a column is missing or has a wrong type.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable,
        image_column: str = "image",
        label_column: str = "label",
        ids_column: str | None = None,
        scores_column: str | None = None,
        name: str = "train",
        label_maps: LabelMapReader | None = None,
        may_lack_labels: bool = False,
    ):
        if (ids_column is None) != (scores_column is None):
            raise ValueError("Give both dense-label columns, ids and scores, or neither.")
        if ids_column is not None and label_maps is not None:
            raise ValueError("Give dense-label columns or a label set, not both.")
        self.transform, self.label_column, self.may_lack_labels = transform, label_column, may_lack_labels
        dataset = with_image_column(dataset, image_column)
        super().__init__(dataset, [image_column, label_column], name)
        self.label_feature = dataset.features[label_column]
        label_type = dataset.features.arrow_schema.field(label_column).type
        self.is_multi_label = is_list(label_type) and isinstance(self.label_feature.feature, datasets.ClassLabel)
        if self.is_multi_label:
            self.label_feature = self.label_feature.feature
        elif not pa.types.is_integer(label_type):
            raise ValueError(
                f"Column {label_column!r} of the {name} data must hold class ids, got {label_type}; lists of `ClassLabel` are several classes of an image."
            )
        self.label_maps = label_maps
        if ids_column is not None:
            check_has_columns(dataset, [ids_column, scores_column], name)
            self.label_maps = LabelMapReader(dataset, ids_column=ids_column, scores_column=scores_column)
        if self.label_maps is not None and len(self.label_maps) != len(dataset):
            raise ValueError(f"The {name} data has {len(dataset)} rows, its label maps are {len(self.label_maps)}.")
        if self.label_maps is not None and self.is_multi_label:
            raise ValueError(
                f"The {name} data has several classes of each image; such data is trained on without dense labels."
            )

    @property
    def has_label_maps(self) -> bool:
        """Whether samples carry dense labels."""
        return self.label_maps is not None

    @property
    def has_crop_maps(self) -> bool:
        """Whether these are labels of the very crops that are drawn."""
        return isinstance(self.label_maps, CropMapReader)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """As in `ImageDataset`; with labels of crops, the crops of an epoch come again when all epochs with labels are over."""
        super().start_epoch(seed, epoch % self.label_maps.num_epochs if self.has_crop_maps else epoch)

    def fetch(self, table: pa.Table, indices: list[int]) -> tuple[list[int] | torch.Tensor, PaletteMaps | None]:
        """Class ids, or 1 for each class of an image `(rows, classes)`; and, where there are any, label maps."""
        column = table[self.label_column]
        labels = multi_hot(column, self.label_feature.num_classes) if self.is_multi_label else column.to_pylist()
        return labels, self._fetch_maps(table, indices) if self.has_label_maps else None

    def sample(
        self,
        image: EncodedImage,
        fetched: tuple[list[int] | torch.Tensor, PaletteMaps | None],
        offset: int,
        index: int,
    ) -> dict[str, Any]:
        """What the transform makes of a row, the palette of its map, and as `labels` its class id, or float32 `(classes,)`."""
        labels, maps = fetched
        if self.has_crop_maps:
            crop = transformed(self.transform, image, None, offset)
            try:
                return {**with_crop_map(crop, maps, offset), "labels": labels[offset]}
            except ValueError as error:
                raise SampleError(
                    f"The label map of row {index} of the {self.name} data does not belong to its crop in epoch {self.seed_and_epoch()[1]}: "
                    f"{error}. Seed, augmentation, images and the versions of timm and PyTorch must be those with which the crops were labelled."
                ) from error
        return {**transformed(self.transform, image, maps, offset), "labels": labels[offset]}

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Rows of each class, `(num_classes,)` int64; ids that are none of a class are left out."""
        ids = self.class_ids()
        return np.bincount(ids[(ids >= 0) & (ids < num_classes)], minlength=num_classes)

    @property
    def num_unlabeled(self) -> int:
        """Rows without a human label, of class -1."""
        return 0 if self.is_multi_label else int((self.class_ids() == -1).sum())

    def class_ids(self) -> np.ndarray:
        """Class ids of all rows, `(n,)` int64; -1 for missing ones."""
        return class_ids(self.rows, self.label_column)

    def labels(self, count: int) -> list[int]:
        """Class ids of the first `count` rows."""
        return self.rows[:count][self.label_column].to_pylist()

    def label_map(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores of a row, `[K, rows, columns]` each, of the upright image before any transform."""
        maps = self._fetch_maps(self.rows[[index]], [index])
        return maps.ids[0], maps.scores[0]

    def check_num_classes(self, num_classes: int) -> None:
        """Raises a `ValueError` if the class names of the data are not as many as the model's outputs."""
        if isinstance(self.label_feature, datasets.ClassLabel) and self.label_feature.num_classes != num_classes:
            raise ValueError(
                f"The {self.name} data has {self.label_feature.num_classes} classes in column {self.label_column!r}, the "
                f"model has {num_classes}. Give the model as many classes (`num_labels`; with a pretrained model also "
                "`ignore_mismatched_sizes=True`, which makes new heads)."
            )

    def check_rows(self, num_classes: int, decode: bool = False) -> None:
        """Looks at every row before training: labels and label maps wholly, image files and errors as `check_all_rows` does. Says how
        many maps turn with their images."""
        expected_shape = None  # [K, rows, columns], which all blocks must share
        turned = Counter()

        def find_problems(table: pa.Table, start: int) -> list[tuple[int, str]]:
            nonlocal expected_shape
            if self.is_multi_label:  # `with_labels` has looked at the lists
                return []
            labels = table[self.label_column]
            lowest = -1 if self.may_lack_labels else 0
            bad = pc.fill_null(pc.or_(pc.less(labels, lowest), pc.greater_equal(labels, num_classes)), True)
            offsets = np.flatnonzero(bad.to_numpy()).tolist()
            problems = [(offset, f"class id {labels[offset]} is outside [0, {num_classes})") for offset in offsets]
            if not self.has_label_maps:
                return problems
            map_problems, shape = self.label_maps.problems(range(start, start + len(table)), num_classes)
            expected_shape = expected_shape or shape
            orientations = self._orientations(table, start)
            turned.update(orientations.values())
            if shape is not None and shape[-2] != shape[-1]:
                lying = [offset for offset, orientation in orientations.items() if orientation in LYING]
                problems += [(offset, SIDEWAYS.format(*shape[-2:])) for offset in lying]
            if shape not in (None, expected_shape):
                text = f"its label map has [K, rows, columns] {list(shape)}, earlier rows {list(expected_shape)}"
                return [*problems, (0, text)]
            return problems + map_problems

        self.check_all_rows(find_problems, decode)
        if num_turned := turned.total() - turned[1] - turned[REMOTE]:
            logger.warning(
                "%d of %d label maps of the %s data show images as their files store them; they are turned upright with the images, "
                "as the Exif orientation of the files says.", num_turned, len(self), self.name,
            )  # fmt: skip
        if turned[REMOTE]:
            logger.warning(
                "%d label maps of the %s data belong to remote images, whose Exif orientation is only read in training.",
                turned[REMOTE], self.name,
            )  # fmt: skip

    def _orientations(self, table: pa.Table, start: int) -> dict[int, int | str]:
        """Exif orientations of the images whose maps turn with them, by their offset in `table`; `REMOTE` for those that are not
        opened here."""
        offsets = np.flatnonzero(self.label_maps.as_stored(range(start, start + len(table)))).tolist()
        values = {offset: table[self.image_column][offset].as_py() for offset in offsets}
        return {
            offset: REMOTE if value["bytes"] is None and "://" in (value["path"] or "") else read_orientation(value)
            for offset, value in values.items()
            if value is not None
        }

    def _fetch_maps(self, table: pa.Table, indices: list[int]) -> PaletteMaps:
        try:
            if self.has_crop_maps:
                return self.label_maps.fetch_epoch(indices, max(self.seed_and_epoch()[1], 0))
            return turn_with_images(self.label_maps.fetch(indices), table[self.image_column])
        except LabelMapError as error:
            raise SampleError(
                f"The label map of row {indices[error.row]} of the {self.name} data: {error}."
            ) from error
