"""Owner of the dense-label format: encode, decode, and crop to the token grid.

A *label map* describes one image on a grid of cells (18 x 18 in the paper), rows first. For each cell it keeps the K
classes with the highest annotator scores:

    token_label_ids     [K, rows, columns]  integer class ids, distinct within a cell
    token_label_scores  [K, rows, columns]  float16 scores (logits) of those classes, descending

A class that a cell does not name has score 0 there, as in the authors' label files.

Nothing here ever expands a batch to all classes. A batch keeps, for each image, the *palette* of the U classes that its
map names at all (a few dozen of 1000); pooling and softmax run over the palette, and all other classes share one
probability. Cost and memory therefore do not depend on the number of classes.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


LabelCrop = Literal["correct", "authors"]


def id_dtype(num_classes: int) -> np.dtype:
    """Smallest signed integer type that holds every class id: int16 up to 32,768 classes, else int32."""
    return np.dtype(np.int16 if num_classes <= 2**15 else np.int32)


def encode_top_k(score_maps: torch.Tensor, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the `k` best classes of each cell.

    Args:
        score_maps: Annotator scores (logits), `(..., num_classes, rows, columns)`, floating point.
        k: Classes kept per cell, `1 <= k <= num_classes`.

    Returns:
        Ids `(..., k, rows, columns)` int16 or int32, and scores of the same shape, float16, descending along k.

    Raises:
        ValueError: If `k` is out of range, or a kept score is not finite in float16.
    """
    num_classes = score_maps.shape[-3]
    if not 1 <= k <= num_classes:
        raise ValueError(f"k must lie in [1, {num_classes}] (the number of classes), got {k}.")
    scores, ids = score_maps.float().topk(k, dim=-3)
    scores = scores.half()
    if not torch.isfinite(scores).all():
        raise ValueError("The annotator gave scores that are NaN, infinite or beyond the float16 range (65504).")
    return ids.cpu().numpy().astype(id_dtype(num_classes)), scores.cpu().numpy()


def decode(ids: torch.Tensor, scores: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Score map over all classes, 0 where a cell does not name a class; for inspection, not for training.

    Args:
        ids: `(..., K, rows, columns)` integers in `[0, num_classes)`.
        scores: The same shape.

    Returns:
        `(..., num_classes, rows, columns)` float32.
    """
    shape = (*ids.shape[:-3], num_classes, *ids.shape[-2:])
    return scores.new_zeros(shape, dtype=torch.float32).scatter_(-3, ids.long(), scores.float())


def build_palette(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the distinct classes of each map and rewrites ids as positions in that list.

    Runs in the collator, on the CPU: the size of the result depends on the data.

    Args:
        ids: `(batch_size, K, rows, columns)` non-negative integers.

    Returns:
        `palette`, `(batch_size, U)` int64, ascending class ids, padded with 0 to the longest list of the batch; and
        `palette_index`, `(batch_size, K, rows, columns)` int16 (int32 for lists that need it), with `palette[b, palette_index[b]] == ids[b]`.

    Example: ids of a one-row map with K = 1, `[[[[7, 3, 7]]]]`, give palette `[[3, 7]]` and index `[[[[1, 0, 1]]]]`.
    """
    batch_size = ids.shape[0]
    flat = ids.reshape(batch_size, -1).long()
    named = torch.zeros(batch_size, int(flat.max()) + 1, dtype=torch.bool).scatter_(1, flat, True)
    position = named.cumsum(dim=1, dtype=torch.int32) - 1  # (B, classes)
    palette = torch.zeros(batch_size, int(position[:, -1].max()) + 1, dtype=torch.long)
    sample, class_id = named.nonzero(as_tuple=True)
    palette[sample, position[sample, class_id].long()] = class_id
    index_type = torch.int16 if palette.shape[1] <= 2**15 else torch.int32
    return palette, position.gather(1, flat).to(index_type).view(ids.shape)


@dataclass
class SparseTargets:
    """Soft targets over all classes in which every class outside a short list has the same probability.

        p(c) = other + excess[u]  if c == class_ids[u],  else other

    Args:
        class_ids: `(batch_size, U)` int64. Padding repeats a class with excess 0.
        excess: `(batch_size, U)` or `(batch_size, N, U)` float32.
        other: `(batch_size,)` or `(batch_size, N)` float32.
        num_classes: Number of classes C.
    """

    class_ids: torch.Tensor
    excess: torch.Tensor
    other: torch.Tensor
    num_classes: int

    @classmethod
    def from_labels(cls, labels: torch.Tensor, num_classes: int) -> "SparseTargets":
        """One-hot targets of class ids `(batch_size,)`."""
        excess = torch.ones(len(labels), 1, device=labels.device)
        return cls(labels.long().unsqueeze(1), excess, torch.zeros_like(excess[:, 0]), num_classes)

    def smooth(self, smoothing: float) -> "SparseTargets":
        """Mixes with the uniform distribution, `(1 - s) p + s / C`. The sum stays 1; the authors' code adds `s / C` to
        a target scaled by `1 - s + s / C` and so reaches `1 + s / C`."""
        keep = 1.0 - smoothing
        return SparseTargets(
            self.class_ids, keep * self.excess, keep * self.other + smoothing / self.num_classes, self.num_classes
        )

    def flip(self) -> "SparseTargets":
        """Targets of the flipped batch: sample b gets those of sample B-1-b."""
        return SparseTargets(self.class_ids.flip(0), self.excess.flip(0), self.other.flip(0), self.num_classes)

    def top_class(self) -> torch.Tensor:
        """Most probable class, of the shape of `other`, int64."""
        best = self.excess.argmax(dim=-1)
        return self.class_ids.gather(1, best.flatten(1) if best.ndim > 1 else best.unsqueeze(1)).view(best.shape)

    def to_dense(self) -> torch.Tensor:
        """Probabilities of all classes, the shape of `other` with a last axis of C; for inspection and tests."""
        dense = self.other.unsqueeze(-1).repeat(*[1] * self.other.ndim, self.num_classes)
        ids = self.class_ids.view(len(self.class_ids), *[1] * (self.excess.ndim - 2), -1).expand_as(self.excess)
        return dense.scatter_add_(-1, ids, self.excess)


def axis_weights(
    start: torch.Tensor, end: torch.Tensor, map_size: int, num_bins: int, min_cells: float = 0.0
) -> torch.Tensor:
    """Weights with which the cells of one axis of a map enter the bins of a crop.

    The rule is that of RoIAlign (He et al. 2017) with adaptive sampling: a bin that spans up to n cells is sampled at
    n equidistant points, and each point interpolates linearly between the two nearest cell centres. A point outside the
    map has the value of the nearest cell; only with `min_cells`, the authors' crops, it has none, as in RoIAlign.

    Args:
        start, end: `(batch_size,)` float32, borders of the crop as fractions of the map; a crop may leave the map.
        map_size: Cells of the map along this axis.
        num_bins: Bins (token rows or columns) of the crop.
        min_cells: Smallest extent of a crop in cells; a shorter one is extended at its end.

    Returns:
        `(batch_size, num_bins, map_size)` float32; each row sums to 1.
    """
    first = start * map_size - 0.5  # coordinate 0 is the centre of the first cell
    extent = (end * map_size - 0.5 - first).clamp(min=max(min_cells, 1e-6))
    bin_size = extent / num_bins
    # one more than a crop of the whole map needs: rounding can lift an extent over a whole number of bins
    max_samples = math.ceil(max(map_size, min_cells) / num_bins) + 1
    samples = bin_size.ceil().clamp(min=1, max=max_samples)
    bins = torch.arange(num_bins, device=start.device).view(-1, 1)
    steps = torch.arange(max_samples, device=start.device)
    first, bin_size, samples = (value.view(-1, 1, 1) for value in (first, bin_size, samples))
    points = first + bins * bin_size + (steps + 0.5) * bin_size / samples  # (B, num_bins, max_samples)
    counted = steps < samples
    if min_cells:
        counted = counted & (points >= -1.0) & (points <= map_size)
    cells = torch.arange(map_size, device=start.device)
    distance = (points.clamp(0, map_size - 1).unsqueeze(-1) - cells).abs()  # (B, num_bins, max_samples, map_size)
    weights = (1 - distance).clamp(min=0) * counted.unsqueeze(-1)
    return weights.sum(dim=2) / samples


def pool_label_maps(
    palette_scores: torch.Tensor, crop_box: torch.Tensor, grid_size: tuple[int, int], label_crop: LabelCrop
) -> torch.Tensor:
    """Mean scores of the crop on a grid of tokens.

    Args:
        palette_scores: `(batch_size, U, rows, columns)` float32.
        crop_box: `(batch_size, 4)` float32, (left, top, right, bottom) as fractions of the region that the map covers; a
            token outside it has the labels of the nearest cell.
        grid_size: Token rows and columns.
        label_crop: `"correct"`; or `"authors"`, which reproduces their exchange of rows and columns: their box is stored
            top first and handed to RoIAlign, which expects left first, so that the top half of an image gets the
            labels of its left half. That RoIAlign call also widens a crop of less than one cell to one.

    Returns:
        `(batch_size, U, token_rows, token_columns)` float32.
    """
    left, top, right, bottom = crop_box.float().unbind(1)
    min_cells = 0.0
    if label_crop == "authors":
        left, top, right, bottom, min_cells = top, left, bottom, right, 1.0
    elif label_crop != "correct":
        raise ValueError(f"label_crop must be 'correct' or 'authors', got {label_crop!r}.")
    rows, columns = palette_scores.shape[-2:]
    row_weights = axis_weights(top, bottom, rows, grid_size[0], min_cells)
    column_weights = axis_weights(left, right, columns, grid_size[1], min_cells)
    pooled = palette_scores @ column_weights.mT.unsqueeze(1)  # (B, U, rows, token_columns)
    return row_weights.unsqueeze(1) @ pooled  # (B, U, token_rows, token_columns)


def softmax_over_all_classes(pooled: torch.Tensor, palette: torch.Tensor, num_classes: int) -> SparseTargets:
    """Softmax over `num_classes` classes of which only the palette has scores other than 0.

    Args:
        pooled: `(batch_size, U)` or `(batch_size, N, U)` float32 scores; padding has score 0, like an unnamed class.
        palette: `(batch_size, U)` int64.
    """
    shift = pooled.amax(dim=-1, keepdim=True).clamp(min=0)
    exponentials = (pooled - shift).exp()
    unnamed = (-shift).exp()
    total = exponentials.sum(dim=-1, keepdim=True) + (num_classes - pooled.shape[-1]) * unnamed
    return SparseTargets(palette, (exponentials - unnamed) / total, (unnamed / total).squeeze(-1), num_classes)


def covered_tokens(crop_box: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Which tokens of a crop have their centre in the region that the map covers, bool `(batch_size, N)`, row-major.

    Args:
        crop_box: `(batch_size, 4)`, (left, top, right, bottom) as fractions of that region.
        grid_size: Token rows and columns.
    """
    left, top, right, bottom = crop_box.float().unsqueeze(2).unbind(1)  # (B, 1) each
    inside = []
    for start, end, size in ((top, bottom, grid_size[0]), (left, right, grid_size[1])):
        centres = start + (end - start) * (torch.arange(size, device=crop_box.device) + 0.5) / size  # (B, size)
        inside.append((centres >= 0) & (centres <= 1))
    return (inside[0].unsqueeze(2) & inside[1].unsqueeze(1)).flatten(1)


@torch.no_grad()
def crop_label_maps(
    palette: torch.Tensor,
    palette_index: torch.Tensor,
    scores: torch.Tensor,
    crop_box: torch.Tensor,
    grid_size: tuple[int, int],
    num_classes: int,
    label_crop: LabelCrop = "correct",
    temperature: float = 1.0,
) -> tuple[SparseTargets, SparseTargets]:
    """Targets of the class token and of every patch token for a crop of each image. A pure function; any device.

    Args:
        palette: `(batch_size, U)` int64 from `build_palette`.
        palette_index: `(batch_size, K, rows, columns)` integers from `build_palette`.
        scores: `(batch_size, K, rows, columns)`.
        crop_box: `(batch_size, 4)`, (left, top, right, bottom) as fractions of the region that the map covers.
        grid_size: Token rows and columns of the model.
        num_classes: Classes of the model.
        label_crop: See `pool_label_maps`.
        temperature: Divides the pooled scores before softmax; below 1 sharpens the targets of an annotator whose
            logits are small.

    Returns:
        Class-token targets (`excess` `(batch_size, U)`) and patch-token targets (`(batch_size, N, U)`, row-major).
    """
    batch_size, _, rows, columns = palette_index.shape
    palette_scores = scores.new_zeros(batch_size, palette.shape[1], rows, columns, dtype=torch.float32)
    palette_scores.scatter_(1, palette_index.long(), scores.float())
    pooled_tokens = pool_label_maps(palette_scores, crop_box, grid_size, label_crop).flatten(2).mT  # (B, N, U)
    # the class token is told what the map knows of the crop: the part that both cover
    known_part = crop_box.clamp(0, 1)
    pooled_crop = pool_label_maps(palette_scores, known_part, (1, 1), label_crop).flatten(1)  # (B, U)
    return (
        softmax_over_all_classes(pooled_crop / temperature, palette, num_classes),
        softmax_over_all_classes(pooled_tokens / temperature, palette, num_classes),
    )


def top_classes(ids: np.ndarray, scores: np.ndarray, num_classes: int) -> np.ndarray:
    """Most probable class of each whole map, as the class token learns it from an uncropped image, `(n,)`."""
    palette, index = build_palette(torch.tensor(ids))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(ids), 4)
    target, _ = crop_label_maps(palette, index, torch.tensor(scores), whole, (1, 1), num_classes)
    return target.top_class().numpy()
