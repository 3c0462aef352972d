"""Whether weights and scores are finite: NaN and infinite values are refused by the name of what holds them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn


MAX_NAMES = 3  # in a message


class NotFiniteError(ValueError):
    """A weight, a loss or a score is NaN or infinite."""


def finite_flags(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[list[str], torch.Tensor]:
    """Names of floating-point tensors, and whether all values of each are finite: `(number,)`, boolean. Nothing waits for the device."""
    names, flags = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point():
            names.append(name)
            flags.append(tensor.detach().isfinite().all())
    return names, torch.stack(flags) if flags else torch.ones(0, dtype=torch.bool)


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def check_weights(
    weights: nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], source: object = None
) -> None:
    """Raises a `NotFiniteError` with the names of tensors that hold NaN or infinite values.

    Args:
        weights: A model, whose saved weights and statistics are looked at, or tensors by name.
        source: Where they come from, for the message.
    """
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    names, flags = finite_flags(tensors.items() if isinstance(tensors, Mapping) else tensors)
    if bad := [name for name, is_finite in zip(names, flags.tolist()) if not is_finite]:
        raise NotFiniteError(
            f"{'' if source is None else f'{source}: '}the weights hold NaN or infinite values, in {listed(bad)}: the training diverged, or the file is damaged. Take an earlier "
            "checkpoint, or train it again."
        )


def check_weight_files(folder: Path, pattern: str = "*.safetensors") -> None:
    """Raises a `NotFiniteError` if a safetensors file of a folder holds NaN or infinite values. One tensor at a time is in memory."""
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, framework="pt") as file:
            check_weights(((name, file.get_tensor(name)) for name in file.keys()), path)  # noqa: SIM118  it is no mapping


def check_scores(scores: torch.Tensor, names: Sequence[object], source: str) -> None:
    """Raises a `NotFiniteError` with the names of images whose scores are NaN or infinite.

    Args:
        scores: `(B, ...)`.
        names: Of the B images.
        source: What gave the scores.
    """
    is_finite = scores.flatten(1).isfinite().all(dim=1).tolist()
    if bad := list(dict.fromkeys(str(name) for name, good in zip(names, is_finite) if not good)):
        raise NotFiniteError(
            f"{source} gives scores that are NaN or infinite for {listed(bad)}. Look at these images; if they are sound, compute in "
            "float32."
        )
