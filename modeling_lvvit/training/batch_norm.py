"""Batch normalization across devices, or frozen."""

from typing import Literal

import torch
from torch import nn


BatchNormMode = Literal["local", "synchronized", "frozen"]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always normalizes with its running statistics and never changes them; scale and shift still learn."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stays in evaluation mode."""
        return super().train(False)


def set_batch_norm(model: nn.Module, mode: BatchNormMode, device: torch.device, num_processes: int) -> None:
    """Chooses how the batch norms of a model take their statistics in training, in place; names of weights stay the same.

    Args:
        mode: `"local"`, over the images of one device; `"synchronized"`, over all devices; `"frozen"`, the running statistics.

    Raises:
        ValueError: If synchronization is asked for on a device that PyTorch cannot do it on.
    """
    if mode == "frozen":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = FrozenBatchNorm2d
                module.train()
    elif mode == "synchronized" and num_processes > 1:
        if device.type == "cpu":
            raise ValueError(
                "PyTorch synchronizes batch norm on accelerators only. On CPU use --batch_norm local or frozen."
            )
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
