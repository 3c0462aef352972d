"""Annotators: image classifiers of transformers or timm, with their own preprocessing, that score every cell of an image."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn
from transformers.utils import logging

from ..backbones.dense_classifier import DenseClassifier
from ..backbones.image_processors import checked_settings, choose_image_size, pillow_filter
from ..backbones.loading import (
    FORWARD_ERRORS,
    TIMM_PREFIX,
    create_timm_model,
    create_transformers_model,
    fingerprint,
    is_timm_folder,
    library_errors,
    load_image_processor,
    timm_class_names,
    transformers_class_names,
)
from ..backbones.patch_head import PATCH_HEAD, add_patch_head, load_patch_head
from ..backbones.preprocessing import Fit, Preprocessing
from ..backbones.resize import must_interpolate, native_image_size, resize_classifier
from ..data.class_matching import ClassMap
from ..data.multi_label.columns import is_multi_label
from ..data.sources import looks_local
from ..deployment import prepare_for_cpu
from ..finite import check_scores


logger = logging.get_logger(__name__)


@dataclass
class Annotator:
    """A dense classifier with its preprocessing and class names.

    Args:
        name: As the user gave it.
        dense: Network: `(B, 3, height, width)` to logits `(B, annotator classes, rows, columns)`.
        class_names: Names of the annotator's classes, by id.
        preprocessing: What it does to an image.
        provenance: What a label set records of it.
        class_map: From its classes to those of the dataset; `None` leaves them as they are.
    """

    name: str
    dense: nn.Module
    class_names: list[str]
    preprocessing: Preprocessing
    provenance: dict[str, Any] = field(default_factory=dict)
    class_map: ClassMap | None = None

    def score_map(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Pixels `(B, 3, height, width)`, uint8 or floating values 0 to 255, to logits `(B, classes, rows, columns)`.

        Args:
            pixels: Images.
            dtype: That of the network's weights.
        """
        scores = self.dense(self.preprocessing.normalize(pixels).to(dtype))
        return scores if self.class_map is None else self.class_map.apply(scores)


class PatchClassifier(nn.Module):
    """The patch head of a model with `patch_logits`, as a map."""

    def __init__(self, model: nn.Module, grid_size: tuple[int, int], forward_options: dict[str, Any]):
        super().__init__()
        self.model, self.grid_size, self.forward_options = model, grid_size, forward_options

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patch_logits = self.model(pixel_values, **self.forward_options).patch_logits  # (B, N, C)
        return patch_logits.mT.unflatten(2, self.grid_size)  # (B, C, rows, columns)


def load_annotator(
    name: str,
    image_size: tuple[int, int] | None = None,
    fit: Fit = "squash",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
) -> Annotator:
    """Loads an image classifier and makes it dense.

    Args:
        name: Hub name or folder of a transformers image classifier; `timm/NAME` for a timm model (`NAME` as in
            `timm.create_model`, with its pretrained tag), or a folder that timm saved.
        image_size: Input height and width in pixels; default: the annotator's own.
        fit: See `Preprocessing`.
        device: Where it runs.
        revision, trust_remote_code: As in `from_pretrained`.
        random_weights: Builds the architecture without its weights (seed 0), to try things out.

    Raises:
        ValueError: If it cannot be loaded, cannot label cells, or does not take images of this size.
    """
    if looks_local(name) and not Path(name).expanduser().is_dir():
        raise ValueError(
            f"The annotator {name} cannot be loaded: there is no such folder (seen from {Path.cwd()}). `annotator` names another one."
        )
    is_timm = name.startswith(TIMM_PREFIX) or is_timm_folder(Path(name).expanduser())
    load = _load_timm if is_timm else _load_transformers
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        model, class_names, preprocessing, grid_size = load(name, image_size, source, random_weights)
    except ValueError as error:
        raise ValueError(f"The annotator {name} cannot be loaded: {error}") from error
    if random_weights:
        logger.warning("%s has random weights: its labels mean nothing.", name)
    preprocessing = replace(preprocessing, fit=fit)
    model = prepare_for_cpu(model.eval().requires_grad_(False).to(device))
    dense = _make_dense(name, model, preprocessing.image_size, grid_size)
    provenance = {
        "annotator": Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name,
        "annotator_library": "timm" if is_timm else "transformers",
        "annotator_revision": _commit_hash(model, revision),
        "annotator_weights": "random, seed 0" if random_weights else f"sha256 {fingerprint(model)}",
        "architecture": type(model).__name__,
        "image_size": list(preprocessing.image_size),
        "map_size": list(dense.grid_size),
        "fit": fit,
        "resample": Image.Resampling(preprocessing.resample).name.lower(),
        "pixel_scale": list(preprocessing.scale),
        "pixel_offset": list(preprocessing.offset),
    }
    return Annotator(name, dense, class_names, preprocessing, provenance)


def _make_dense(
    name: str, model: nn.Module, image_size: tuple[int, int], grid_size: tuple[int, int] | None
) -> nn.Module:
    """The model as a map; run once, so that a size that it does not take is refused before any work.

    Args:
        name: What messages call it.
        model: Classifier.
        image_size: Height and width in pixels.
        grid_size: Rows and columns of its patch head; `None` without one.
    """
    options = {"interpolate_pos_encoding": True} if must_interpolate(model, image_size) else {}
    try:
        if grid_size is None:
            return DenseClassifier(model, image_size, options)
        dense = PatchClassifier(model, grid_size, options)
        with torch.inference_mode(), library_errors(FORWARD_ERRORS):
            scores = dense(torch.zeros(1, 3, *image_size, device=next(model.parameters()).device))
        check_scores(scores, ["a gray image"], "its patch head")
        return dense
    except ValueError as error:
        size = f"{image_size[0]} x {image_size[1]}"
        raise ValueError(f"The annotator {name} cannot label cells of images of {size} pixels: {error}") from error


def _load_transformers(name: str, image_size: tuple[int, int] | None, source: dict[str, Any], random_weights: bool):
    model, unexpected = create_transformers_model(name, source, random_weights)
    if is_multi_label(model.config):
        raise ValueError(
            "it gives an image several classes (`problem_type` multi_label_classification), and dense labels share every cell out among classes "
            "that exclude each other. Take a classifier that chooses one class."
        )
    processor = load_image_processor(name, source)
    settings = checked_settings(processor)
    image_size = choose_image_size(processor, image_size, settings.image_size, native_image_size(model))
    statistics = (settings.image_mean, settings.image_std)
    preprocessing = Preprocessing.with_statistics(image_size, *statistics, settings.resample)
    if not must_interpolate(model, image_size):
        model = resize_classifier(model, image_size)
    class_names = transformers_class_names(model)
    if any(PATCH_HEAD in key for key in unexpected):
        model = add_patch_head(model, image_size)
        if not load_patch_head(model, name, source["revision"]):
            raise ValueError(
                "its patch head has another shape than its features need, or is not stored as safetensors."
            )
        return model, class_names, preprocessing, model.patch_grid_size
    # a patch head that was not trained has weight 0 in the prediction and is not asked
    is_trained = getattr(model.config, "patch_logits_weight", 0)
    grid_size = tuple(side // model.config.patch_size for side in image_size) if is_trained else None
    return model, class_names, preprocessing, grid_size


def _load_timm(name: str, image_size: tuple[int, int] | None, source: dict[str, Any], random_weights: bool):
    model = create_timm_model(name, image_size, source, random_weights)
    settings = resolve_model_data_config(model)
    image_size = image_size or tuple(settings["input_size"][-2:])
    resample = pillow_filter(settings["interpolation"])
    preprocessing = Preprocessing.with_statistics(image_size, settings["mean"], settings["std"], resample)
    return model, timm_class_names(model), preprocessing, None


def _commit_hash(model: nn.Module, revision: str | None) -> str | None:
    return getattr(getattr(model, "config", None), "_commit_hash", None) or revision
