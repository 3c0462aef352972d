"""Owner of the dense-label format: encode, decode, and the sparse form in which targets are computed.

A *label map* describes one image on a grid of cells (18 x 18 in the paper), rows first. For each cell it keeps the K
classes with the highest annotator scores:

    token_label_ids     [K, rows, columns]  integer class ids, distinct within a cell
    token_label_scores  [K, rows, columns]  float16 scores (logits) of those classes, descending

A class that a cell does not name has score 0 there, as in the authors' label files.

Nothing here ever expands a batch to all classes. A batch keeps, for each image, the *palette* of the U classes that its
map names at all (a few dozen of 1000); pooling and softmax run over the palette, and all other classes share one
probability. Cost and memory therefore do not depend on the number of classes.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch


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
        names_all: Whether `class_ids` of every image are all classes in order, so that nobody need look them up.
    """

    class_ids: torch.Tensor
    excess: torch.Tensor
    other: torch.Tensor
    num_classes: int
    names_all: bool = False

    @classmethod
    def from_labels(cls, labels: torch.Tensor, num_classes: int) -> "SparseTargets":
        """One-hot targets of class ids `(batch_size,)`."""
        excess = torch.ones(len(labels), 1, device=labels.device)
        return cls(labels.long().unsqueeze(1), excess, torch.zeros_like(excess[:, 0]), num_classes)

    def of_single_token(self) -> "SparseTargets":
        """Targets of images as those of one token each, `excess` `(batch_size, 1, U)`."""
        return replace(self, excess=self.excess.unsqueeze(1), other=self.other.unsqueeze(1))

    def smooth(self, smoothing: float) -> "SparseTargets":
        """Mixes with the uniform distribution, `(1 - s) p + s / C`. The sum stays 1; the authors' code adds `s / C` to
        a target scaled by `1 - s + s / C` and so reaches `1 + s / C`."""
        keep = 1.0 - smoothing
        return replace(self, excess=keep * self.excess, other=keep * self.other + smoothing / self.num_classes)

    def flip(self) -> "SparseTargets":
        """Targets of the flipped batch: sample b gets those of sample B-1-b."""
        return replace(self, class_ids=self.class_ids.flip(0), excess=self.excess.flip(0), other=self.other.flip(0))

    def top_class(self) -> torch.Tensor:
        """Most probable class, of the shape of `other`, int64."""
        best = self.excess.argmax(dim=-1)
        return self.class_ids.gather(1, best.flatten(1) if best.ndim > 1 else best.unsqueeze(1)).view(best.shape)

    def to_dense(self) -> torch.Tensor:
        """Probabilities of all classes, the shape of `other` with a last axis of C; for inspection and tests."""
        dense = self.other.unsqueeze(-1).repeat(*[1] * self.other.ndim, self.num_classes)
        ids = self.class_ids.view(len(self.class_ids), *[1] * (self.excess.ndim - 2), -1).expand_as(self.excess)
        return dense.scatter_add_(-1, ids, self.excess)
