"""Where an image classifier has its feature map: the last layer output that holds all that its head reads, cell by cell.

No table of model families is needed. Models of timm say it (`forward_features`). Others are run on two images, every layer output is
noted, and from the last one backwards each is tried: it must hold everything that the logits depend on, and it must be a map of the
image.
"""

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..finite import check_scores
from .feature_layout import FeatureMap, candidate_maps
from .loading import FORWARD_ERRORS, library_errors


Change = Callable[[torch.Tensor], torch.Tensor | None]
MAX_CANDIDATES = 24  # layer outputs looked at, from the last one backwards: one further back would skip real layers
NUM_TRIALS = 4  # images of which a quarter is replaced


def output_logits(output: Any) -> torch.Tensor:
    """Logits `(B, C)` of an image classifier of transformers or timm.

    Raises:
        ValueError: If the output has none.
    """
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"its output, {type(output).__name__}, has no `logits`.")
    return logits


def probe_images(image_size: tuple[int, int]) -> torch.Tensor:
    """Two images that even an untrained network tells apart, noise and a slope of brightness, `(2, 3, H, W)`."""
    noise = torch.randn(3, *image_size, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(-2, 2, image_size[1]).expand(3, *image_size)
    return torch.stack([noise, slope])


class FeatureSearch:
    """Finds the feature map of a classifier, and runs the classifier with other features.

    Args:
        model: Classifier in evaluation mode: `pixel_values` to logits, or to an output with `logits`.
        image_size: Height and width in pixels of the images that will be given.
        forward_options: Keyword arguments of every forward pass.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], forward_options: dict[str, Any]):
        self.model, self.image_size, self.forward_options = model, tuple(image_size), forward_options
        self.images = probe_images(self.image_size).to(next(model.parameters()).device)

    @torch.no_grad()
    def find(self, is_run_on_cells: bool = True) -> FeatureMap:
        """The last feature map.

        Args:
            is_run_on_cells: Whether the head must work on single cells: with cells that are all alike each alone must give the
                logits of the whole map. Otherwise such a map is preferred; without one, a map that the head reads in another way
                (with a number of rows that it knows, with two branches, by flattening) will do.

        A map that the head was not run on cell by cell, or that is part of a tuple, must be seen to lie over the image: when a
        quarter of the image is replaced, its cells in this quarter change most.

        Raises:
            ValueError: If there is none.
        """
        outputs, grids, logits = self._record()
        check_scores(logits, ["images of random pixels"] * len(logits), type(self.model).__name__)
        spread = (logits[0] - logits[1]).abs().max().item()
        if not spread > 1e-4 * logits.abs().max().item():
            raise ValueError("It gives every image the same scores: it is not trained, or its head is empty.")
        complete = []
        for *place, features in outputs:
            for feature_map in candidate_maps(*place, features.shape, grids, self.image_size):
                if not self._holds_everything(feature_map, logits):
                    continue
                is_certain = self._works_on_cells(feature_map, logits)
                if is_certain and (not feature_map.is_part or self._lies_over_image(feature_map)):
                    return feature_map
                complete.append(feature_map)
        for feature_map in complete if not is_run_on_cells else []:
            # where the head was not run, the grid must be one that the network has elsewhere
            if feature_map.grid_size in grids and self._lies_over_image(feature_map):
                return feature_map
        wanted = (
            "from which its head reads by pooling or a class token, so its cells cannot be labelled"
            if is_run_on_cells
            else "that holds all that its head reads, so its cells cannot learn"
        )
        raise ValueError(
            f"{type(self.model).__name__} has no feature map {wanted}. Choose a convolutional network or a vision transformer."
        )

    def run(self, pixel_values: torch.Tensor, feature_map: FeatureMap, change: Change) -> torch.Tensor:
        """Logits when the features are replaced by `change(features)`; `None` leaves them."""
        calls = 0

        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != feature_map.call + 1:
                return None
            changed = change(feature_map.select_tensor(output))
            return changed if changed is None or not feature_map.is_part else (changed, *output[1:])

        handle = self.model.get_submodule(feature_map.module_name).register_forward_hook(replace)
        try:
            return output_logits(self.model(pixel_values, **self.forward_options))
        finally:
            handle.remove()

    def features(self, pixel_values: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
        """Features of images, `(B, rows * columns, channels)`."""
        cells = []
        self.run(pixel_values, feature_map, lambda features: cells.append(feature_map.flatten_cells(features)))
        return cells[0]

    def _record(self) -> tuple[list[tuple[str, int, bool, torch.Tensor]], list[tuple[int, int]], torch.Tensor]:
        """The last layer outputs that could be feature maps, from the last one backwards (module name, call, whether it is part of a
        tuple, features); rows and columns of all convolutions; and the logits."""
        outputs: deque[tuple[str, int, bool, torch.Tensor]] = deque(maxlen=MAX_CANDIDATES)
        grids, calls = [], Counter()

        def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
            call, calls[name] = calls[name], calls[name] + 1
            is_part = isinstance(output, tuple) and len(output) > 0
            tensor = output[0] if is_part else output
            if isinstance(tensor, torch.Tensor) and tensor.ndim in (3, 4) and len(tensor) == len(self.images):
                outputs.append((name, call, is_part, tensor))
                grids.extend([tuple(tensor.shape[2:])] if isinstance(module, nn.Conv2d) else [])

        handles = [module.register_forward_hook(partial(note, name)) for name, module in self.model.named_modules()]
        try:
            with library_errors(FORWARD_ERRORS):
                features, logits = self._forward()
        finally:
            for handle in handles:
                handle.remove()
        outputs.reverse()
        # those that timm calls the features come first
        return sorted(outputs, key=lambda output: output[-1] is not features), grids, logits.float()

    def _forward(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the model itself calls its features, where it is one of timm, and logits."""
        network = getattr(self.model, "timm_model", self.model)
        if not hasattr(network, "forward_head"):
            return None, output_logits(self.model(self.images, **self.forward_options))
        features = network.forward_features(self.images)
        return features, network.forward_head(features)

    def _run(self, feature_map: FeatureMap, change: Change) -> torch.Tensor | None:
        """Logits of changed features; `None` if the head does not take them."""
        try:
            return self.run(self.images, feature_map, change)
        except FORWARD_ERRORS:
            return None

    def _holds_everything(self, feature_map: FeatureMap, logits: torch.Tensor) -> bool:
        """Whether nothing passes this layer by: with the features of two images exchanged the logits are exchanged."""
        return _agree(self._run(feature_map, lambda features: features.flip(0)), logits.flip(0), logits)

    def _works_on_cells(self, feature_map: FeatureMap, logits: torch.Tensor) -> bool:
        """Whether the head works on single cells; notes whether it reads the class token only."""
        blank = self._run(feature_map, lambda features: feature_map.cells_replaced(features, uniform=False))
        feature_map.class_token = feature_map.prefix > 0 and _agree(blank, logits, logits)
        if feature_map.class_token:
            cells = self._run(feature_map, feature_map.single_cells)
            return cells is not None and len(cells) == len(self.images) * feature_map.num_cells
        whole = self._run(feature_map, lambda features: feature_map.cells_replaced(features, uniform=True))
        if whole is None:
            return False
        cells = self._run(
            feature_map, lambda features: feature_map.single_cells(feature_map.cells_replaced(features, True))
        )
        return _agree(cells, whole.repeat_interleave(feature_map.num_cells, dim=0), logits)

    def _lies_over_image(self, feature_map: FeatureMap) -> bool:
        """Whether cells are where their pixels are, in rows and columns."""
        rows, columns = feature_map.grid_size
        if min(rows, columns) < 2:
            return False
        height, width = self.image_size
        quarters = [(bottom, right) for bottom in (False, True) for right in (False, True)]
        masks = torch.zeros(len(quarters), 1, 1, height, width, dtype=torch.bool)
        for mask, (bottom, right) in zip(masks, quarters):
            mask[..., _half(height, bottom), _half(width, right)] = True
        generator = torch.Generator().manual_seed(0)
        image, other = torch.randn(2, NUM_TRIALS, 3, height, width, generator=generator)
        images = torch.cat([image, torch.where(masks, other, image).flatten(0, 1)])  # (5 * trials, 3, H, W)
        cells = self.features(images.to(self.images), feature_map).float().unflatten(0, (-1, NUM_TRIALS))
        change = (cells[1:] - cells[0]).norm(dim=-1).mean(dim=1).unflatten(1, (rows, columns))  # (4, rows, columns)
        change = torch.stack(
            [change[:, _half(rows, b), _half(columns, r)].mean(dim=(1, 2)) for b, r in quarters], dim=1
        )
        return change.argmax(dim=1).tolist() == [0, 1, 2, 3]


def _half(length: int, is_second: bool) -> slice:
    """The first or the second half of an axis, without the middle of an odd one."""
    return slice(length - length // 2, length) if is_second else slice(0, length // 2)


def _agree(left: torch.Tensor | None, right: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether logits are alike, measured by how far those of two images lie apart."""
    tolerance = 1e-2 * (logits[0] - logits[1]).abs().max().item()
    return left is not None and left.shape == right.shape and (left - right).abs().max().item() <= tolerance
