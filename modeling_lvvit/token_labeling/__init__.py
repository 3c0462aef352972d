"""Token labeling: dense labels, joint augmentation, losses and the Trainer."""

from .arguments import TokenLabelTrainingArguments
from .collator import TokenLabelCollator
from .dataset import ImageProcessorTransform, TokenLabelDataset
from .input_size import resize_classifier
from .live_labels import LiveAnnotator
from .patch_head import add_patch_head
from .stream import TokenLabelStream
from .trainer import TokenLabelTrainer
from .transforms import AugmentationConfig, TrainTransform


__all__ = [
    "AugmentationConfig",
    "ImageProcessorTransform",
    "LiveAnnotator",
    "TokenLabelCollator",
    "TokenLabelDataset",
    "TokenLabelStream",
    "TokenLabelTrainer",
    "TokenLabelTrainingArguments",
    "TrainTransform",
    "add_patch_head",
    "resize_classifier",
]
