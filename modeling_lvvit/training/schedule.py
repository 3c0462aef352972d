"""The published learning-rate schedule and weight decay, and how the weight average follows batch size and length of a run."""

import math

from torch import nn


# images of an optimizer step for which learning rates and decays of the published recipe hold
REFERENCE_IMAGES_PER_STEP = 1024
# The average looks back over `1 / (1 - decay)` steps. In the published run this is a thirtieth of the run; when it is more
# than a tenth, the average still holds weights of the first, poor part of training.
LONGEST_MEMORY = 0.1
# parameters of more than one dimension that the published recipe exempts from weight decay besides all vectors; the last name is
# that of the position table in timm
NO_DECAY_NAMES = ("cls_token", "position_embeddings", "pos_embed")


def published_factor(
    epoch: int, cosine_epochs: float, warmup_epochs: float, warmup_factor: float, min_factor: float
) -> float:
    """Learning rate of an epoch as a share of the peak: linear warm-up, cosine, then the minimum.

    The schedule of the published training commands (timm 0.4.5): constant within an epoch, and the cosine counts from epoch 0,
    so that warm-up replaces its beginning. Epochs after `cosine_epochs` are cool-down. `warmup_factor` and `min_factor` are shares of
    the peak.

    Example: peak 1.6e-3, 300 cosine epochs, 5 of warm-up from 1e-6, minimum 1e-5: epochs 0, 4, 5, 150 and 300 have 1e-6,
    1.2802e-3, 1.59891e-3, 8.05e-4 and 1e-5.
    """
    if epoch < warmup_epochs:
        return warmup_factor + epoch * (1 - warmup_factor) / warmup_epochs
    if epoch >= cosine_epochs:
        return min_factor
    return min_factor + 0.5 * (1 - min_factor) * (1 + math.cos(math.pi * epoch / cosine_epochs))


def scaled_ema_decay(base_decay: float, images_per_step: int, num_steps: int) -> float:
    """Decay for a run of another batch size or length than the published one.

    The memory `1 / (1 - decay)` covers as many images as with `REFERENCE_IMAGES_PER_STEP` images a step, but at most the
    share `LONGEST_MEMORY` of the run.

    Example: 0.99992 (12,500 steps of 1024 images) is 0.99996 for 512 images a step, and 0.99 in a run of 1000 steps.
    """
    rate = (1 - base_decay) * images_per_step / REFERENCE_IMAGES_PER_STEP
    shortest_rate = 1 / max(1.0, LONGEST_MEMORY * num_steps)
    return 1 - min(1.0, max(rate, shortest_rate))


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters with weight decay: matrices and convolutions; vectors, class token and position table are exempt
    (published recipe)."""
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    return [name for name in matrices if name.rpartition(".")[2] not in NO_DECAY_NAMES]


WARMUP_FACTOR = 1e-6  # share of the learning rate at the first step of the published runs


def polynomial_factor(step: int, num_steps: int, warmup_steps: int, power: float = 1.0) -> float:
    """Learning rate of a step as a share of the peak: `(1 - step / num_steps) ** power`, in the warm-up times a factor that rises
    linearly from 1e-6 to 1 (MMSegmentation's schedule of the authors' configurations).

    Example: 160,000 steps, 1500 of warm-up: steps 0, 750, 1500 and 80,000 have 1e-6, 0.49766, 0.99063 and 0.5.
    """
    factor = max(0.0, 1 - step / num_steps) ** power
    if step < warmup_steps:
        factor *= 1 - (1 - step / warmup_steps) * (1 - WARMUP_FACTOR)
    return factor
