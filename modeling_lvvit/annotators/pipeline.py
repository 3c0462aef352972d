"""From images to label maps: the one path that every label set takes."""

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets.utils import logging

from ..data.decoding import EncodedImage
from ..data.images import IMAGE_ERRORS, UndecodableError, content_hash, image_note, read_content
from ..finite import check_scores
from ..labels.label_maps import encode_top_k, mass_outside
from ..labels.storage import LabelMaps, LabelSetLayout


logger = logging.get_logger(__name__)
LOST_MASS = 0.25  # more than this moved outside the kept classes by the stored scores gets a warning
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError)  # no file, or neither bytes nor path
ScoreKind = Literal["logits", "relative"]


@torch.inference_mode()
def annotate_batches(
    score_map: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Label maps of all images.

    Args:
        score_map: Dense annotator: `pixel_values` `(B, channels, height, width)` to scores (logits)
            `(B, num_classes, rows, columns)`, one for each cell of its last feature map.
        batches: Batches of preprocessed images on the annotator's device.
        k: Classes kept per cell.

    Returns:
        Ids and scores of all images, `(num_images, k, rows, columns)` each (see `label_maps.encode_top_k`).
    """
    encoded = [encode_top_k(score_map(pixel_values), k) for pixel_values in batches]
    ids, scores = zip(*encoded)
    return np.concatenate(ids), np.concatenate(scores)


def encode_scores(
    score_maps: torch.Tensor, k: int, score_kind: ScoreKind = "logits"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keeps the k best classes of each cell, and how much probability the others have.

    Args:
        score_maps: Logits `(B, C, rows, columns)`.
        k: Classes kept per cell.
        score_kind: `"logits"` keeps them as they are, as the authors of the paper did. `"relative"` measures them from the
            logarithm of the mean of `exp` of the C - k other logits of the cell, so that a softmax in which those others
            have score 0 gives every kept class its own probability, whatever the scale or offset of the annotator.

    Returns:
        Ids and scores `(B, k, rows, columns)` (see `label_maps.encode_top_k`), and the probability outside the kept
        classes, mean of the cells, `(B,)` float32.
    """
    score_maps = score_maps.float()
    num_classes = score_maps.shape[1]
    if num_classes <= k:
        return *encode_top_k(score_maps, k), np.zeros(len(score_maps), dtype=np.float32)
    top = score_maps.topk(k, dim=1).indices
    others = score_maps.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)  # (B, 1, rows, columns)
    outside = (others - score_maps.logsumexp(dim=1, keepdim=True)).exp().mean(dim=(1, 2, 3))
    if score_kind == "relative":
        score_maps = score_maps - (others - torch.log(torch.tensor(float(num_classes - k))))
    return *encode_top_k(score_maps, k), outside.cpu().numpy()


@dataclass
class PreparedImage:
    """An image on its way to the annotator.

    Args:
        pixels: uint8 `[3, height, width]`, `None` if the image cannot be read.
        box: Region of the image that they show.
        content_hash: Hash of the file, `None` if it cannot be read at all.
        note: What is special about the image, or why it cannot be read.
    """

    pixels: torch.Tensor | None
    box: tuple[float, float, float, float]
    content_hash: int | None
    note: str


def prepare_image(value: dict[str, Any], preprocessing: Callable) -> PreparedImage:
    """Reads and preprocesses an image; one that is damaged is told by its note.

    Raises:
        OSError: If a file cannot be fetched or read now, which is no fault of the image.
    """
    whole = (0.0, 0.0, 1.0, 1.0)
    if value is None:
        return PreparedImage(None, whole, None, "unreadable: no image")
    try:
        content = read_content(value)
    except MISSING as error:
        if "://" in (value["path"] or ""):
            raise
        return PreparedImage(None, whole, None, f"unreadable: {_lasting_text(error)}")
    number = content_hash(content)
    try:
        note = image_note(content)
    except IMAGE_ERRORS as error:
        return PreparedImage(None, whole, number, f"unreadable: {_lasting_text(error)}")
    try:
        pixels, box = preprocessing(EncodedImage.open({"bytes": content, "path": None}))
    except UndecodableError as error:
        return PreparedImage(None, whole, number, f"unreadable: {_lasting_text(error)}")
    return PreparedImage(pixels, box, number, note)


def _lasting_text(error: Exception) -> str:
    """An error in words that are the same in every run and every folder: no addresses, no paths."""
    if isinstance(error, OSError) and error.strerror:
        return f"[Errno {error.errno}] {error.strerror}"
    return re.sub(r" <[^>]*>", "", str(error)) or type(error).__name__


def spread_to_borders(values: np.ndarray, boxes: Sequence[tuple[float, ...]]) -> np.ndarray:
    """Gives cells that lie outside their image, on borders that were added, what the nearest cell inside has.

    A crop at the edge of an image interpolates with the cells beyond it, which know the border color only.

    Args:
        values: Ids or scores `(n, K, rows, columns)`.
        boxes: Region of its image that each map covers, (left, top, right, bottom) as fractions.
    """
    values = values.copy()
    for row, (left, top, right, bottom) in enumerate(boxes):
        for axis, start, end in ((1, top, bottom), (2, left, right)):
            size = values.shape[axis + 1]
            centers = start + (end - start) * (np.arange(size) + 0.5) / size
            inside = np.flatnonzero((centers >= 0) & (centers <= 1))
            if 0 < len(inside) < size:
                values[row] = values[row].take(np.arange(size).clip(inside[0], inside[-1]), axis=axis)
    return values


class Scorer:
    """Runs a dense annotator on batches of prepared images.

    Args:
        score_map: Pixels uint8 `(B, 3, height, width)` to logits `(B, classes, rows, columns)`.
        layout: Of the label set.
        score_kind: See `encode_scores`.
        device: Where the annotator runs.
        autocast: Makes the context of its precision.
    """

    def __init__(
        self,
        score_map: Callable[[torch.Tensor], torch.Tensor],
        layout: LabelSetLayout,
        score_kind: ScoreKind,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.score_map, self.layout, self.score_kind = score_map, layout, score_kind
        self.device, self.autocast = device, autocast
        self.warned = False

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, scores and outside mass (see `encode_scores`); a `NotFiniteError` with the keys of images whose scores are NaN or
        infinite."""
        with self.autocast():
            score_maps = self.score_map(pixels.to(self.device, non_blocking=True))
        check_scores(score_maps, keys, "the annotator")
        maps = encode_scores(score_maps, self.layout.k, self.score_kind)
        if not self.warned:
            self._warn_of_flat_labels(maps[1], maps[2])
        return maps

    def _warn_of_flat_labels(self, scores: np.ndarray, outside: np.ndarray) -> None:
        """Compares what a softmax of the stored scores leaves to the other classes with what the annotator gives them."""
        stored = mass_outside(scores, len(self.layout.class_names))
        self.warned = bool(stored.mean() - outside.mean() > LOST_MASS)
        if self.warned:
            logger.warning(
                "The annotator gives %.0f %% to classes outside the %d that are kept, its stored scores would give them "
                "%.0f %%: labels get flat. Store relative scores (`scores`), or train with a `label_temperature` below 1.",
                100 * outside.mean(), self.layout.k, 100 * stored.mean(),
            )  # fmt: skip


class ShardBuilder:
    """Collects the rows of one shard after another.

    Args:
        scorer: Annotates pixels.
        layout: What the rows share.
        keep_damaged: Whether an image that cannot be read gets an empty label.
        choose_heads: Called with the content hashes of the images before each forward pass.
    """

    def __init__(
        self,
        scorer: Scorer,
        layout: LabelSetLayout,
        keep_damaged: bool,
        choose_heads: Callable[[list[int | None]], None] | None = None,
    ):
        self.scorer, self.layout, self.keep_damaged = scorer, layout, keep_damaged
        self.choose_heads = choose_heads
        self.batches: list[tuple] = []

    def add(self, keys: list[str], images: list[PreparedImage], is_last: bool) -> pa.Table | None:
        """Annotates a batch; returns the shard when it is complete.

        Raises:
            ValueError: If an image cannot be read and none may be, or its scores are NaN or infinite.
        """
        damaged = [f"{key} is {image.note}" for key, image in zip(keys, images) if image.pixels is None]
        if damaged and not self.keep_damaged:
            raise ValueError(
                f"Image {damaged[0]}. Mend the file, or give such images an empty label with `on_error` empty; then start "
                "again: what was annotated so far is kept. (Without the image the data is another one, and so is its set.)"
            )
        shape = (len(images), self.layout.k, *self.layout.map_size)
        ids, scores = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float16)
        outside = np.full(len(images), np.nan, dtype=np.float32)
        readable = [offset for offset, image in enumerate(images) if image.pixels is not None]
        if readable:
            pixels = torch.stack([images[offset].pixels for offset in readable])
            if self.choose_heads is not None:
                self.choose_heads([images[offset].content_hash for offset in readable])
            maps = self.scorer(pixels, [keys[offset] for offset in readable])
            boxes = [images[offset].box for offset in readable]
            ids[readable], scores[readable] = (spread_to_borders(values, boxes) for values in maps[:2])
            outside[readable] = maps[2]
        self.batches.append((keys, images, ids, scores, outside))
        return self._table() if is_last else None

    def _table(self) -> pa.Table:
        keys, images, ids, scores, outside = zip(*self.batches)
        self.batches = []
        keys, images = list(chain.from_iterable(keys)), list(chain.from_iterable(images))
        boxes = np.float32([image.box for image in images])
        return self.layout.table(
            keys,
            [image.content_hash for image in images],
            LabelMaps(np.concatenate(ids), np.concatenate(scores), boxes),
            pa.array(np.concatenate(outside), from_pandas=True),  # NaN becomes null
            [image.note for image in images],
            [image.pixels is None for image in images],
        )
