"""What annotation reads of a fit: how images were brought to shape, and heads that have not seen parts of the images.

fold_heads.safetensors     `weight` (folds, C, D), `bias` (folds, C): head n was fitted without the images of fold n
                           `hashes` (n,), `folds` (n,): content hash of each image that it was fitted on, and its fold
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ...finite import check_weights


RECORD, FOLD_HEADS = "fit.json", "fold_heads.safetensors"
ALL = -1  # the head that was fitted on all images


class FoldHeads(nn.Module):
    """Takes the place of a classifier's last layer: the layer itself for most images, for those that it was fitted on the head that has
    not seen them.

    Args:
        head: Linear layer, or convolution of 1 x 1 pixel.
        weight, bias: Of the heads of the folds, `(folds, C, D)` and `(folds, C)`.
        folds: Content hash of an image to its fold.

    Attributes:
        counts: Images by head, `True` for those of a fold.
    """

    def __init__(self, head: nn.Module, weight: torch.Tensor, bias: torch.Tensor, folds: dict[int, int]):
        super().__init__()
        self.head, self.folds = head, folds
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.counts: Counter[bool] = Counter()
        self._chosen: list[list[int]] = []  # for each of the next passes

    def choose(self, hashes: Sequence[int | None], passes: int = 1) -> None:
        """Chooses the heads of the images of the next forward passes by their content hashes; without it all get the head of all."""
        self._chosen = passes * [[self.folds.get(number, ALL) for number in hashes]]
        self.counts.update(fold != ALL for fold in self._chosen[0])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of images or of their cells, those of an image next to each other, `(B * N, ...)`, to their logits."""
        logits = self.head(features)
        if not self._chosen:
            return logits
        chosen = self._chosen.pop()
        rows = torch.tensor(chosen, device=features.device).repeat_interleave(len(features) // len(chosen))
        for fold in sorted(set(chosen) - {ALL}):
            weight, bias = self.weight[fold], self.bias[fold]
            part = features[rows == fold]
            if isinstance(self.head, nn.Conv2d):
                new = nn.functional.conv2d(part, weight[..., None, None], bias)
            else:
                new = nn.functional.linear(part, weight, bias)
            logits[rows == fold] = new.to(logits.dtype)
        return logits

    def describe(self) -> str:
        """How many images were labeled by which heads."""
        return f"{self.counts[True]:,} images by the head of their fold, {self.counts[False]:,} by the head of all"


def save_fold_heads(
    path: Path, module: str, weight: torch.Tensor, bias: torch.Tensor, hashes: np.ndarray, folds: np.ndarray
) -> None:
    """Writes the file.

    Args:
        module: Name of the layer whose place the heads take.
        weight, bias: See `FoldHeads`.
        hashes, folds: Of the images, int64 `(n,)`.
    """
    hashes, first = np.unique(hashes, return_index=True)
    tensors = {"weight": weight, "bias": bias, "hashes": torch.from_numpy(hashes)}
    tensors |= {"folds": torch.from_numpy(folds[first].astype(np.int64))}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"module": module})


def install_fold_heads(model: nn.Module, folder: Path) -> tuple[FoldHeads | None, str | None]:
    """Puts the fold heads of a folder into a model that was loaded from there; returns them, and a hash of their file. `None` where
    there are none.

    Raises:
        ValueError: If the file is damaged, or belongs to another model.
    """
    path = folder / FOLD_HEADS
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "hashes", "folds")}
            name = file.metadata()["module"]
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Fit the annotator again, or remove this file.") from error
    check_weights({part: tensors[part] for part in ("weight", "bias")}, path)
    try:
        head = model.get_submodule(name)
    except AttributeError:
        head = None
    expected = None if head is None else tuple(head.weight.flatten(1).shape)
    if expected != tuple(tensors["weight"].shape[1:]):
        raise ValueError(
            f"{path} has heads of {tuple(tensors['weight'].shape[1:])} weights for the layer {name}, the model has {expected}: they belong "
            "to another model. Fit the annotator again, or remove this file."
        )
    weights = (tensors[part].to(head.weight) for part in ("weight", "bias"))
    heads = FoldHeads(head, *weights, dict(zip(tensors["hashes"].tolist(), tensors["folds"].tolist())))
    model.set_submodule(name, heads)
    return heads.eval(), hashlib.sha256(path.read_bytes()).hexdigest()


def read_fit(folder: Path) -> str | None:
    """How images were brought to the shape on which the head in a folder was fitted; `None` where it was not fitted so.

    Raises:
        ValueError: If the record is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["fit"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Fit the annotator again, or remove this file.") from error
