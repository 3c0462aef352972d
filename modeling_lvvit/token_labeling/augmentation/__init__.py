"""From an image and its label map to a sample, from samples to a batch, and what is left to do to its images on the device."""

from .collator import MIX_METHODS, TokenLabelCollator
from .finish import ErasedBox, finish_images
from .transforms import AugmentationConfig, TrainTransform


__all__ = ["MIX_METHODS", "AugmentationConfig", "ErasedBox", "TokenLabelCollator", "TrainTransform", "finish_images"]
