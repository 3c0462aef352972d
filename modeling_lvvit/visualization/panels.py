"""What is drawn of one model and one image."""

import numpy as np
import torch
from PIL import Image

from ..data.images import IMAGE_ERRORS, decode_image
from .figures import best_cells, class_colors, note_on_weak_cells, overlay


ANNOTATOR_HELP = "Classifier, or image-text model text:NAME, whose scores of the cells are shown as dense labels."


def shown_image(pixel_values: torch.Tensor) -> np.ndarray:
    """The image as a model sees it, `(3, height, width)` to `(height, width, 3)` in [0, 1], each channel stretched to its range."""
    low, high = (getattr(pixel_values, extreme)(dim=(1, 2), keepdim=True) for extreme in ("amin", "amax"))
    return ((pixel_values - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).numpy()


def cells_panel(shown: np.ndarray, logits: torch.Tensor, names: list[str], kind: str) -> tuple[str, np.ndarray]:
    """Title and image of the best class of each cell; the title says where none stands out.

    Args:
        shown: Image `(height, width, 3)` in [0, 1].
        logits: `(rows, columns, classes)`.
        names: Of the classes, as they are shown.
        kind: What they are called.
    """
    ids, strengths = best_cells(logits)
    painted = overlay(Image.fromarray(np.uint8(255 * shown)), ids, strengths, class_colors(len(names)))
    note = note_on_weak_cells(strengths, len(names))
    return f"{kind}\n{note or 'most: ' + short(names[int(np.bincount(ids.ravel()).argmax())])}", painted


def short(name: str, length: int = 24) -> str:
    """The first of a class's names, cut."""
    return name.split(",")[0][:length]


def read_image_file(path: str) -> Image.Image:
    """The RGB image of a file; a `ValueError` if it cannot be read."""
    try:
        return decode_image({"bytes": None, "path": path})
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
