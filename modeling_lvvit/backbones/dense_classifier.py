"""Turns any image classifier into a dense one: its own head applied to each cell of its last feature map.

A hook cuts the feature map into single cells, so that whatever follows (pooling, norms, class token, linear layers) runs on one
cell at a time. Pooling one cell gives the cell itself, hence the result is what the annotators of the paper computed: the
classifier at each cell.
"""

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..launching import is_main_process
from .feature_search import FeatureSearch


logger = logging.get_logger(__name__)
REMEDY = (
    "so its maps are rough. Better annotators are convolutional networks, and LV-ViTs whose patches have learned to label: "
    "lvvit train RECIPE self_emerging/labeler"
)


class DenseClassifier(nn.Module):
    """Applies an image classifier at each cell of its last feature map.

    Args:
        model: Classifier in evaluation mode: `pixel_values` to logits, or to an output with `logits`.
        image_size: Height and width in pixels of the images that will be given.
        forward_options: Keyword arguments of every forward pass.

    Raises:
        ValueError: If it has no feature map on whose single cells its head works (see `FeatureSearch.find`).
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], forward_options: dict[str, Any] | None = None):
        super().__init__()
        self.model = model
        self.search = FeatureSearch(model, image_size, forward_options or {})
        self.feature_map = self.search.find()
        if self.feature_map.class_token and is_main_process():
            is_untrained = getattr(getattr(model, "config", None), "patch_logits_weight", None) == 0
            untrained = "the patch head of this LV-ViT was not trained, and " if is_untrained else ""
            logger.warning(
                "%s: %sits classifier reads the class token and has never seen single patches, %s.", type(model).__name__, untrained, REMEDY
            )  # fmt: skip

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        return self.feature_map.grid_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, height, width)` to logits `(B, C, rows, columns)`."""
        logits = self.search.run(pixel_values, self.feature_map, self.feature_map.single_cells)
        return logits.unflatten(0, (len(pixel_values), *self.grid_size)).permute(0, 3, 1, 2)
