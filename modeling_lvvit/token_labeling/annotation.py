"""From a dense annotator to label maps; the one path that every label set takes."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from .label_maps import encode_top_k


@torch.inference_mode()
def annotate_batches(
    score_map_of: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Label maps of all images.

    Args:
        score_map_of: Dense annotator: `pixel_values` `(B, channels, height, width)` to scores (logits)
            `(B, num_classes, rows, columns)`, one for each cell of its last feature map.
        batches: Batches of preprocessed images on the annotator's device.
        k: Classes kept per cell.

    Returns:
        Ids and scores of all images, `(num_images, k, rows, columns)` each (see `label_maps.encode_top_k`).
    """
    encoded = [encode_top_k(score_map_of(pixel_values), k) for pixel_values in batches]
    ids, scores = zip(*encoded)
    return np.concatenate(ids), np.concatenate(scores)
