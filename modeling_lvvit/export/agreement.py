"""Whether two files, or a file and its model, say the same of real images."""

from collections.abc import Iterable, Sized
from dataclasses import dataclass

import numpy as np
import torch

from ..console import progress_bar
from .verification import Run


@dataclass(frozen=True)
class ImageAgreement:
    """How a file's predictions compare with those of another.

    Args:
        images: Number of images.
        same_class: Share of the predictions, each the best class of an image or of a pixel, or whether an image shows a class, that are the
            same.
        largest_change: Largest absolute difference of a probability.
        mean_change: Mean over predictions of the largest difference of a probability; over all classes and images where an image may show
            several.
    """

    images: int
    same_class: float
    largest_change: float
    mean_change: float

    def __str__(self) -> str:
        return (
            f"same predictions on {self.images:,} images: {self.same_class:.2%}; probabilities change by up to {self.largest_change:.3f}, "
            f"by {self.mean_change:.4f} on average"
        )

    def require(self, least: float) -> None:
        """Raises a `ValueError` if less than this share of the predictions is the same, or probabilities are NaN."""
        if not (self.same_class >= least and np.isfinite(self.largest_change)):
            raise ValueError(f"Expected at least {least:.2%} of equal predictions. {str(self).capitalize()}.")


@torch.no_grad()
def compare_on_images(
    run: Run, reference: Run, images: Iterable[np.ndarray], multi_label: bool = False
) -> ImageAgreement:
    """Compares the `logits` of two files, or of a file and its model, on real images.

    Args:
        run, reference: Images to logits: of a classifier `(1, classes)`, of a segmentation model `(1, classes, height, width)`.
        images: Any number, float32 `(1, 3, height, width)`, each of its own size, as both take them.
        multi_label: Whether an image may show several classes: each has a probability of its own, and is shown from 0.5 on.

    Raises a `ValueError` if there is no image.
    """
    number, predictions, same, total_change, largest = 0, 0, 0, 0.0, 0.0
    total = len(images) if isinstance(images, Sized) else None
    for image in progress_bar(images, total=total, desc="Comparing predictions", unit="image"):
        pixel_values = torch.as_tensor(image)
        both = torch.cat([run(pixel_values)["logits"], reference(pixel_values)["logits"]]).float()
        probabilities = both.sigmoid() if multi_label else both.softmax(dim=1)  # (2, classes, ...)
        classes = probabilities >= 0.5 if multi_label else probabilities.argmax(dim=1)
        changes = (probabilities[0] - probabilities[1]).abs()
        changes = changes if multi_label else changes.amax(dim=0)
        number, predictions = number + 1, predictions + changes.numel()
        same += (classes[0] == classes[1]).sum().item()
        total_change += changes.sum(dtype=torch.float64).item()
        largest = np.maximum(largest, changes.max().item())  # unlike `max`, keeps a NaN
    if not number:
        raise ValueError("Expected at least one image to compare predictions on, got none.")
    return ImageAgreement(number, same / predictions, float(largest), total_change / predictions)
