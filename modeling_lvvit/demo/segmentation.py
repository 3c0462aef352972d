"""What the page shows of an image by a segmentation model."""

import numpy as np
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoConfig

from ..backbones.loading import LOADING_ERRORS, library_errors, load_image_processor, transformers_class_names
from ..data.images import Normalization
from ..finite import check_weights
from ..modeling_lvvit import LVViTForSemanticSegmentation
from ..segmentation.build_model import is_segmenter
from ..segmentation.inference import InferenceSettings, predict_classes
from .explanation import Annotated, annotated


MAX_SIDE = 1024  # pixels of an image on the page
STRIDE_SHARE = 2 / 3  # of the window, as in the published evaluation


def is_segmentation_model(name: str) -> bool:
    """Whether a Hub name or folder is one of our segmentation models. A model that cannot be read is none."""
    try:
        return is_segmenter(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError, KeyError):  # of timm, or of a repository with code of its own
        return False


class Segmenter:
    """A segmentation model that is asked about single images, in windows of the size it was trained on.

    Args:
        name: Hub name or folder.

    Raises:
        ValueError: If it cannot be loaded.
    """

    def __init__(self, name: str):
        try:
            with library_errors(LOADING_ERRORS):
                self.model = LVViTForSemanticSegmentation.from_pretrained(name).eval().requires_grad_(False)
            check_weights(self.model)
            processor = load_image_processor(name, {"trust_remote_code": False})
        except ValueError as error:
            raise ValueError(f"{name} cannot be loaded: {error}") from error
        self.normalize = Normalization(processor.image_mean, processor.image_std)
        window = tuple(self.model.config.image_height_width)
        size = processor.size if processor.do_resize else {}
        self.settings = InferenceSettings(
            window=window,
            stride=tuple(max(1, round(STRIDE_SHARE * side)) for side in window),
            short_side=size.get("shortest_edge"),
            long_side=size.get("longest_edge"),
        )

    @property
    def class_names(self) -> list[str]:
        """By id."""
        return transformers_class_names(self.model)

    @property
    def description(self) -> str:
        """Kind and size of the model in one line."""
        height, width = self.settings.window
        return (
            f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:.1f} million parameters, "
            f"{len(self.class_names)} classes, windows of {height} x {width} pixels"
        )

    def segment(self, image: Image.Image) -> Annotated:
        """The image with a mask for each of its most frequent classes."""
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        pixel_values = self.normalize(v2.functional.pil_to_tensor(image))[None]
        classes = predict_classes(lambda pixels: self.model(pixels).logits, pixel_values, self.settings)[0].numpy()
        return annotated(np.asarray(image) / 255.0, classes, np.full(classes.shape, 0.8), self.class_names)
