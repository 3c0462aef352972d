"""Token labeling: dense labels, joint augmentation, losses and the Trainer."""

from ..annotators.online import OnlineAnnotator
from ..backbones.image_processors import ImageProcessorTransform
from ..backbones.patch_head import add_patch_head
from ..backbones.resize import resize_classifier
from .arguments import TokenLabelTrainingArguments
from .augmentation import AugmentationConfig, TokenLabelCollator, TrainTransform, finish_images
from .dataset import TokenLabelDataset
from .stream import TokenLabelStream
from .trainer import TokenLabelTrainer


LiveAnnotator = OnlineAnnotator  # its earlier name

__all__ = [
    "AugmentationConfig",
    "ImageProcessorTransform",
    "OnlineAnnotator",
    "TokenLabelCollator",
    "TokenLabelDataset",
    "TokenLabelStream",
    "TokenLabelTrainer",
    "TokenLabelTrainingArguments",
    "TrainTransform",
    "add_patch_head",
    "finish_images",
    "resize_classifier",
]
