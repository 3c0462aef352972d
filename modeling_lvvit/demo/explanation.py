"""What the page shows of an image: classes, relevance and cells."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from ..annotators.annotator import load_annotator
from ..backbones.loading import FORWARD_ERRORS, library_errors
from ..data.classes.class_matching import readable_names
from ..evaluate.classifier import Classifier, InputOptions, load_classifier
from ..visualization.figures import MIN_STRENGTH, best_cells, heat, note_on_weak_cells
from ..visualization.panels import short, shown_image
from ..visualization.relevance import relevance_maps


MIN_SIDE = 448  # pixels of images on the page
NUM_CELL_CLASSES = 12  # that are told apart

# image (height, width, 3) uint8; masks (height, width) in [0, 1] with their names
Annotated = tuple[np.ndarray, list[tuple[np.ndarray, str]]]


@dataclass
class Explanation:
    """Why a class.

    Args:
        relevance, attention: Images uint8 `(height, width, 3)`; `None` where the model has none.
        note: What is missing and why, `""` if nothing is.
    """

    relevance: np.ndarray | None
    attention: np.ndarray | None
    note: str


class Explainer:
    """A classifier that is asked about single images.

    Args:
        name: See `load_classifier`.
        trust_remote_code: See `from_pretrained`.

    Raises:
        ValueError: If it cannot be loaded.
    """

    def __init__(self, name: str, trust_remote_code: bool = False):
        self.name, self.trust_remote_code = name, trust_remote_code
        self.classifier: Classifier = load_classifier(name, InputOptions(), trust_remote_code=trust_remote_code)

    @cached_property
    def class_names(self) -> list[str]:
        """By id, WordNet ids with what they stand for."""
        return readable_names(self.classifier.class_names)

    @cached_property
    def distinct_names(self) -> list[str]:
        """Class names, those that several classes have, or that look so when they are cut, with the number of the class."""
        counts = Counter(short(name) for name in self.class_names)
        numbered = [
            name if counts[short(name)] == 1 else f"{short(name)} [{index}]"
            for index, name in enumerate(self.class_names)
        ]
        if len(set(numbered)) == len(numbered):
            return numbered
        return [f"{short(name)} [{index}]" for index, name in enumerate(self.class_names)]

    @property
    def description(self) -> str:
        """Kind, size and input of the model in one line."""
        facts = self.classifier.facts
        shape = " x ".join(map(str, facts["input_size"]))
        name = type(self.classifier.model).__name__
        return f"{name}, {facts['parameters'] / 1e6:.1f} million parameters, {len(self.class_names):,} classes, {shape} pixels"

    @torch.no_grad()
    def probabilities(self, image: Image.Image) -> torch.Tensor:
        """Of all classes, `(C,)`; they add up to 1 unless an image may have several classes."""
        return self.classifier.probabilities(self.classifier.logits(self.classifier.transform(image)[None]))[0]

    def explain(self, image: Image.Image, class_id: int) -> Explanation:
        """Relevance for a class, and attention."""
        pixel_values = self.classifier.transform(image)[None]
        shown = shown_image(pixel_values[0])
        try:
            with library_errors(FORWARD_ERRORS):
                maps = relevance_maps(
                    self.classifier.model, pixel_values, torch.tensor([class_id]), self.classifier.forward_options
                )
        except ValueError as error:
            return Explanation(None, None, f"No relevance: {error}")
        large = _enlarged(shown)
        relevance, attention = (
            np.uint8(255 * heat(large, values[0].numpy()).clip(0, 1)) for values in (maps.relevance, maps.attention)
        )
        return Explanation(relevance, attention, "")

    def cells(self, image: Image.Image) -> tuple[Annotated | None, str]:
        """The image with the classes of its cells, by the patch head or, where none was trained, by the classifier at each cell; or
        why there are none."""
        if isinstance(self._dense, str):
            return None, f"No cells: {self._dense}"
        pixels, _ = self._dense.preprocessing(image)
        with torch.inference_mode():
            scores = self._dense.score_map(pixels[None])[0].permute(1, 2, 0)  # (rows, columns, classes)
        ids, strengths = best_cells(scores)
        note = note_on_weak_cells(strengths, len(self.class_names))
        shown = annotated(_enlarged(shown_image(pixels)), ids, strengths, self.distinct_names)
        return shown, "" if note is None else f"Cells: {note}."

    @cached_property
    def _dense(self):
        """The model as an annotator, or what keeps it from being one."""
        try:
            return load_annotator(self.name, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            return str(error)


def annotated(image: np.ndarray, ids: np.ndarray, strengths: np.ndarray, class_names: list[str]) -> Annotated:
    """A grey copy of an image with a mask for each of its most frequent classes.

    Args:
        image: `(height, width, 3)` in [0, 1].
        ids, strengths: Class and opacity in [0, 1] of each cell, `(rows, columns)`.
        class_names: By id.
    """
    strengths = np.where(strengths < MIN_STRENGTH, 0, strengths)
    weights = np.bincount(ids.ravel(), weights=strengths.ravel(), minlength=len(class_names))
    order = [index for index in np.argsort(-weights, kind="stable")[:NUM_CELL_CLASSES] if weights[index] > 0]
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    size = image.shape[1::-1]
    sections = []
    for index in order:
        opacity = np.where(ids == index, strengths, 0).astype(np.float32)
        mask, share = Image.fromarray(opacity), 100 * (opacity > 0).mean()
        sections.append(
            (np.asarray(mask.resize(size, Image.Resampling.NEAREST)), f"{_first(class_names[index])} {share:.0f} %")
        )
    return np.uint8(255 * grey), sections


def _first(name: str) -> str:
    """The first of a class's names, or all of it where that is nothing."""
    return name.split(",")[0].strip() or name


def _enlarged(shown: np.ndarray) -> np.ndarray:
    """A small image at a size that can be seen, a whole number of times as large."""
    factor = max(1, -(-MIN_SIDE // max(shown.shape[:2])))
    return shown.repeat(factor, axis=0).repeat(factor, axis=1)
