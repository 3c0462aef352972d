"""LV-ViT and token labeling for the Hugging Face ecosystem.

Importing this package registers LV-ViT with the Auto classes of transformers.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
    BitImageProcessorPil,
)

from .configuration_lvvit import LVViTConfig
from .modeling_lvvit import (
    LVViTBackbone,
    LVViTForImageClassification,
    LVViTForSemanticSegmentation,
    LVViTModel,
    LVViTPreTrainedModel,
)


def _register(auto_class, model_class):
    # the first call lets a program that imported this package load by name; the second makes `save_pretrained` write
    # the code next to the weights, for programs that did not
    auto_class.register(LVViTConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)


AutoConfig.register(LVViTConfig.model_type, LVViTConfig, exist_ok=True)
LVViTConfig.register_for_auto_class()
_register(AutoModel, LVViTModel)
_register(AutoModelForImageClassification, LVViTForImageClassification)
_register(AutoBackbone, LVViTBackbone)
_register(AutoModelForSemanticSegmentation, LVViTForSemanticSegmentation)
_processors = {"torchvision": BitImageProcessor, "pil": BitImageProcessorPil}
AutoImageProcessor.register(LVViTConfig, image_processor_classes=_processors, exist_ok=True)

__version__ = "0.1.0"
__all__ = [
    "LVViTBackbone",
    "LVViTConfig",
    "LVViTForImageClassification",
    "LVViTForSemanticSegmentation",
    "LVViTModel",
    "LVViTPreTrainedModel",
]
