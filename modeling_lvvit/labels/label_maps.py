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

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


def id_dtype(num_classes: int) -> np.dtype:
    """Smallest signed integer type that holds every class id: int16 up to 32,768 classes, else int32."""
    return np.dtype(np.int16 if num_classes <= 2**15 else np.int32)


def encode_top_k(score_maps: torch.Tensor, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the `k` best classes of each cell.

    Args:
        score_maps: Annotator scores (logits), `(..., num_classes, rows, columns)`, floating point.

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
    """Score map over `num_classes` classes, 0 where a cell does not name a class; in training those of a palette, not all.

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

    For maps that are stored as ids; a label set stores palettes. On the CPU: the size of the result depends on the data.

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


def pad_palettes(palettes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lists of classes `(U,)` in one tensor `(batch_size, U)` int64, padded with 0 to the longest."""
    return pad_sequence(palettes, batch_first=True).long()


def mass_outside(scores: np.ndarray, num_classes: int, temperature: float = 1.0) -> np.ndarray:
    """Probability that a softmax of stored scores `(n, K, rows, columns)`, divided by the temperature, gives to the classes that a
    cell does not name, score 0 each: `(n, rows, columns)` float32."""
    if num_classes <= scores.shape[1]:
        return np.zeros((len(scores), *scores.shape[2:]), dtype=np.float32)
    named = np.logaddexp.reduce(scores.astype(np.float32) / temperature, axis=1)
    others = np.float32(np.log(num_classes - scores.shape[1]))
    return 1 / (1 + np.exp(np.minimum(named - others, np.float32(80))))
