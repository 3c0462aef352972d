"""Token labeling: dense labels, joint augmentation, losses and the Trainer."""

from .arguments import TokenLabelTrainingArguments
from .collator import TokenLabelCollator
from .dataset import ImageProcessorTransform, TokenLabelDataset
from .stream import TokenLabelStream
from .trainer import TokenLabelTrainer
from .transforms import AugmentationConfig, TrainTransform


__all__ = [
    "AugmentationConfig",
    "ImageProcessorTransform",
    "TokenLabelCollator",
    "TokenLabelDataset",
    "TokenLabelStream",
    "TokenLabelTrainer",
    "TokenLabelTrainingArguments",
    "TrainTransform",
]
