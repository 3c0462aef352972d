"""What the page shows of an image by a segmentation model."""

import numpy as np
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoConfig

from ..backbones.loading import LOADING_ERRORS, library_errors, load_image_processor, transformers_class_names
from ..data.classes.class_matching import shown_names
from ..data.images import Normalization
from ..finite import check_weights
from ..modeling_lvvit import LVViTForSemanticSegmentation
from ..segmentation.build_model import is_segmenter
from ..segmentation.inference import predict_classes, trained_inference
from .explanation import Annotated, annotated


MAX_SIDE = 1024  # pixels of an image on the page


def is_segmentation_model(name: str) -> bool:
    """Whether a Hub name or folder is one of our segmentation models. A model that cannot be read is none."""
    try:
        return is_segmenter(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except (OSError, ValueError, KeyError):  # of timm, or of a repository with code of its own
        return False


class Segmenter:
    """A segmentation model that is asked about single images, in the windows of the evaluation of its training (`trained_inference`).

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
        self.settings = trained_inference(self.model.config, processor)

    @property
    def class_names(self) -> list[str]:
        """By id."""
        return shown_names(transformers_class_names(self.model))

    @property
    def description(self) -> str:
        """Kind and size of the model in one line."""
        window, stride = (" x ".join(map(str, pair)) for pair in (self.settings.window, self.settings.stride))
        return (
            f"{type(self.model).__name__}, {self.model.num_parameters() / 1e6:.1f} million parameters, "
            f"{len(self.class_names)} classes, windows of {window} pixels every {stride}"
        )

    def segment(self, image: Image.Image) -> Annotated:
        """The image with a mask for each of its most frequent classes."""
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        pixel_values = self.normalize(v2.functional.pil_to_tensor(image))[None]
        classes = predict_classes(lambda pixels: self.model(pixels).logits, pixel_values, self.settings)[0].numpy()
        return annotated(np.asarray(image) / 255.0, classes, np.full(classes.shape, 0.8), self.class_names)
