"""Whether arguments, model and data fit each other, before training."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .arguments import TokenLabelTrainingArguments
from .dataset import TokenLabelDataset
from .stream import TokenLabelStream


logger = logging.get_logger(__name__)


def token_grid_of(model: nn.Module) -> tuple[int, int]:
    """Token rows and columns that the configuration of a model describes."""
    config = model.config
    if hasattr(config, "grid_size"):
        return tuple(config.grid_size)
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    return size[0] // config.patch_size, size[1] // config.patch_size


def check_fit(args: TokenLabelTrainingArguments, train_dataset: Any, num_classes: int) -> None:
    """Checks what would otherwise go wrong in training, or silently.

    Args:
        args: Training arguments.
        train_dataset: Training samples.
        num_classes: Classes of the model.

    Raises:
        ValueError: If several GPUs would share one process, dense columns would be dropped, or the data has other classes.
    """
    if args.n_gpu > 1:
        raise ValueError(
            "DataParallel would tear apart the images that are mixed with each other. Start one process per GPU: "
            f"accelerate launch --num_processes {args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES."
        )
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True would drop the dense labels and crop boxes before they reach the loss; "
            "leave it at False."
        )
    if isinstance(train_dataset, (TokenLabelDataset, TokenLabelStream)):
        train_dataset.check_num_classes(num_classes)


def set_patch_logits_weight(config: PreTrainedConfig, is_trained: bool) -> None:
    """Lets the patch head enter the prediction exactly when it is trained."""
    if not hasattr(config, "patch_logits_weight"):
        return
    if not is_trained and config.patch_logits_weight:
        logger.info("No dense labels: the patch head is not trained and left out of `logits`.")
        config.patch_logits_weight = 0.0
    elif is_trained and not config.patch_logits_weight:
        config.patch_logits_weight = type(config)().patch_logits_weight
