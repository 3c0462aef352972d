"""Where an image classifier has its feature map: the last layer output that holds all that its head reads, cell by cell.

No table of model families is needed. The classifier is run on two images, every layer output is noted, and from the last one
backwards each is tried: it must hold everything that the logits depend on, and it must be a map of the image.
"""

from typing import Any

import torch
from torch import nn

from .feature_layout import FeatureMap, candidate_layouts


MAX_CANDIDATES = (
    24  # layer outputs looked at, from the last one backwards: a reading further back would skip real layers
)
NUM_TRIALS = 4  # images of which a quarter is replaced
# what models raise for images, or heads for features, in a layout that they were not made for
LAYOUT_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


def output_logits(output: Any) -> torch.Tensor:
    """Logits `(B, C)` of an image classifier of transformers or timm.

    Raises:
        ValueError: If the output has none.
    """
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"its output, {type(output).__name__}, has no `logits`.")
    return logits


class FeatureSearch:
    """Finds the feature map of a classifier, and runs the classifier with other features.

    Args:
        model: Classifier in evaluation mode: `pixel_values` to logits, or to an output with `logits`.
        image_size: Height and width in pixels of the images that will be given.
        forward_options: Keyword arguments of every forward pass.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], forward_options: dict[str, Any]):
        self.model, self.image_size, self.forward_options = model, tuple(image_size), forward_options

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
        example = self._example()
        outputs, logits = self._record(example)
        spread = (logits[0] - logits[1]).abs().max().item()
        if not spread > 1e-4 * logits.abs().max().item():
            raise ValueError("It gives every image the same scores: it is not trained, or its head is empty.")
        grids = [tuple(shape[2:]) for module, _, shape, _ in outputs if isinstance(module, nn.Conv2d)]
        held = []
        for output in outputs[: -MAX_CANDIDATES - 1 : -1]:
            for reading in candidate_layouts(*output, grids, self.image_size):
                if not self._holds_everything(reading, example, logits):
                    continue
                is_certain = self._works_on_cells(reading, example, logits)
                if is_certain and (not reading.is_part or self._lies_over_image(reading)):
                    return reading
                held.append(reading)
        for reading in held if not is_run_on_cells else []:
            # where the head was not run, the grid must be one that the network has elsewhere
            if reading.grid_size in grids and self._lies_over_image(reading):
                return reading
        wanted = (
            "from which its head reads by pooling or a class token, so its cells cannot be labelled"
            if is_run_on_cells
            else "that holds all that its head reads, so its cells cannot learn"
        )
        raise ValueError(
            f"{type(self.model).__name__} has no feature map {wanted}. Choose a convolutional network or a vision transformer."
        )

    def run(self, pixel_values: torch.Tensor, found: FeatureMap, change) -> torch.Tensor:
        """Logits when the features are replaced by `change(features)`; `None` leaves them."""
        calls = 0

        def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != found.call + 1:
                return None
            changed = change(found.select_tensor(output))
            return changed if changed is None or not found.is_part else (changed, *output[1:])

        handle = found.module.register_forward_hook(replace)
        try:
            return output_logits(self.model(pixel_values, **self.forward_options))
        finally:
            handle.remove()

    def features(self, pixel_values: torch.Tensor, found: FeatureMap) -> torch.Tensor:
        """Features of images, `(B, rows * columns, channels)`."""
        kept = []
        self.run(pixel_values, found, lambda features: kept.append(found.flatten_cells(features)))
        return kept[0]

    def _example(self) -> torch.Tensor:
        return probe_images(self.image_size).to(next(self.model.parameters()).device)

    def _record(self, example: torch.Tensor) -> tuple[list[tuple[nn.Module, int, torch.Size, bool]], torch.Tensor]:
        """Layer outputs that could be feature maps, with call, shape and whether they are part of a tuple, in the order in which
        they were computed; and the logits."""
        outputs: list[tuple[nn.Module, int, torch.Size, bool]] = []
        calls: dict[nn.Module, int] = {}

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            call = calls[module] = calls.get(module, -1) + 1
            is_part = isinstance(output, tuple) and len(output) > 0
            tensor = output[0] if is_part else output
            if isinstance(tensor, torch.Tensor) and tensor.ndim in (3, 4) and len(tensor) == len(example):
                outputs.append((module, call, tensor.shape, is_part))

        handles = [module.register_forward_hook(note) for module in self.model.modules()]
        try:
            return outputs, output_logits(self.model(example, **self.forward_options)).float()
        finally:
            for handle in handles:
                handle.remove()

    def _holds_everything(self, found: FeatureMap, example: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether nothing passes this layer by: with the features of two images exchanged the logits are exchanged."""
        try:
            return _agree(self.run(example, found, lambda features: features.flip(0)), logits.flip(0), logits)
        except LAYOUT_ERRORS:
            return False

    def _works_on_cells(self, found: FeatureMap, example: torch.Tensor, logits: torch.Tensor) -> bool:
        """Whether the head works on single cells of this reading; notes whether it reads the class token only."""
        number = found.grid_size[0] * found.grid_size[1]
        try:
            blank = self.run(example, found, lambda features: found.cells_replaced(features, uniform=False))
            found.class_token = found.prefix > 0 and _agree(blank, logits, logits)
            if found.class_token:
                return len(self.run(example, found, found.single_cells)) == len(example) * number
            whole = self.run(example, found, lambda features: found.cells_replaced(features, uniform=True))
            cells = self.run(example, found, lambda features: found.single_cells(found.cells_replaced(features, True)))
            return _agree(cells, whole.repeat_interleave(number, dim=0), logits)
        except LAYOUT_ERRORS:
            return False

    def _lies_over_image(self, found: FeatureMap) -> bool:
        """Whether cells are where their pixels are, in rows and columns."""
        rows, columns = found.grid_size
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
        cells = self.features(images.to(self._example()), found).float().unflatten(0, (-1, NUM_TRIALS))
        change = (cells[1:] - cells[0]).norm(dim=-1).mean(dim=1).unflatten(1, (rows, columns))  # (4, rows, columns)
        change = torch.stack(
            [change[:, _half(rows, b), _half(columns, r)].mean(dim=(1, 2)) for b, r in quarters], dim=1
        )
        return change.argmax(dim=1).tolist() == [0, 1, 2, 3]


def _half(length: int, is_second: bool) -> slice:
    """The first or the second half of an axis, without the middle of an odd one."""
    return slice(length - length // 2, length) if is_second else slice(0, length // 2)


def _agree(left: torch.Tensor, right: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether logits are alike, measured by how far those of two images lie apart."""
    tolerance = 1e-2 * (logits[0] - logits[1]).abs().max().item()
    return left.shape == right.shape and (left - right).abs().max().item() <= tolerance


def probe_images(image_size: tuple[int, int]) -> torch.Tensor:
    """Two images that even an untrained network tells apart, noise and a slope of brightness, `(2, 3, H, W)`."""
    noise = torch.randn(3, *image_size, generator=torch.Generator().manual_seed(0))
    slope = torch.linspace(-2, 2, image_size[1]).expand(3, *image_size)
    return torch.stack([noise, slope])
