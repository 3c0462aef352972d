"""Annotators: image classifiers of transformers or timm, with their own preprocessing, that score every cell of an image; and image-text
models, which score it against texts of the data's classes."""

from collections.abc import Sequence
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
from ..backbones.patch_head import restore_patch_head
from ..backbones.preprocessing import Fit, Preprocessing
from ..backbones.resize import fit_classifier, forward_options, native_image_size
from ..data.classes.class_matching import ClassMap
from ..data.classes.multi_label import is_multi_label
from ..data.sources import looks_local
from ..deployment import prepare_for_cpu
from ..finite import check_scores
from .fitting.fold_heads import FoldHeads, install_fold_heads, read_fit
from .text.loading import is_text_model, load_text_model, score_texts
from .text.prompts import TEXT_PREFIX, Prompts, read_prompts


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
        fold_heads: Heads that have not seen parts of the images on which it was fitted (`lvvit fit-annotator --folds`).
    """

    name: str
    dense: nn.Module
    class_names: list[str]
    preprocessing: Preprocessing
    provenance: dict[str, Any] = field(default_factory=dict)
    class_map: ClassMap | None = None
    fold_heads: FoldHeads | None = None

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
    class_names: Sequence[str] | None = None,
    prompts: str | None = None,
) -> Annotator:
    """Loads an image classifier and makes it dense, or an image-text model, which gets the classes of the data.

    Args:
        name: Hub name or folder of a transformers image classifier; `timm/NAME` for a timm model (`NAME` as in
            `timm.create_model`, with its pretrained tag), or a folder that timm saved; `text:` and the Hub name or folder of an
            image-text model of transformers.
        image_size: Input height and width in pixels; default: the annotator's own.
        fit: See `Preprocessing`.
        device: Where it runs.
        revision, trust_remote_code: As in `from_pretrained`.
        random_weights: Builds the architecture without its weights (seed 0), to try things out.
        class_names: Of the data, for an image-text model; default: the classes that the prompts describe.
        prompts: JSON file for an image-text model, see `read_prompts`.

    Raises:
        FileNotFoundError: If there is no such file of prompts.
        ValueError: If it cannot be loaded, cannot label cells, or does not take images of this size; or prompts do not fit.
    """
    is_text, location = name.startswith(TEXT_PREFIX), name.removeprefix(TEXT_PREFIX)
    path = Path(location).expanduser()
    if looks_local(location) and not path.is_dir():
        raise ValueError(
            f"The annotator {name} cannot be loaded: there is no such folder (seen from {Path.cwd()}). `annotator` names another one."
        )
    is_timm = not is_text and (name.startswith(TIMM_PREFIX) or is_timm_folder(path))
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    asked, about_texts = (location, image_size, source, random_weights), {}
    try:
        if is_text:
            given = read_prompts(prompts)
            class_names, texts = _class_texts(given, class_names)
            model, preprocessing = load_text_model(*asked)
            about_texts = {"annotator_model_type": model.config.model_type, **given.record(texts)}
        else:
            load = _load_timm if is_timm else _load_transformers
            model, class_names, preprocessing, grid_size = load(*asked)
    except ValueError as error:
        raise ValueError(f"The annotator {name} cannot be loaded: {error}") from error
    if random_weights:
        logger.warning("%s has random weights: its labels mean nothing.", name)
    preprocessing = replace(preprocessing, fit=fit)
    model = prepare_for_cpu(model.eval().requires_grad_(False).to(device))
    weights = "random, seed 0" if random_weights else f"sha256 {fingerprint(model)}"
    if is_text:
        dense = _make_text_scores(name, model, preprocessing.image_size, source, texts, given.background)
    else:
        dense = _make_dense(name, model, preprocessing.image_size, grid_size)
    provenance = {
        "annotator": (TEXT_PREFIX if is_text else "") + (path.resolve().name if path.is_dir() else location),
        "annotator_library": "timm" if is_timm else "transformers",
        "annotator_revision": _commit_hash(model, revision),
        "annotator_weights": weights,
        "architecture": type(model).__name__,
        "image_size": list(preprocessing.image_size),
        "map_size": list(dense.grid_size),
        "fit": fit,
        "resample": Image.Resampling(preprocessing.resample).name.lower(),
        "pixel_scale": list(preprocessing.scale),
        "pixel_offset": list(preprocessing.offset),
        **about_texts,
    }
    fold_heads, about_heads = (None, {}) if random_weights else _load_fold_heads(name, model, fit)
    provenance |= about_heads
    return Annotator(name, dense, list(class_names), preprocessing, provenance, fold_heads=fold_heads)


def _load_fold_heads(name: str, model: nn.Module, fit: Fit) -> tuple[FoldHeads | None, dict[str, Any]]:
    """Heads for the images that an annotator was fitted on, put into the model; and what is recorded of them. To be called when its own
    weights were hashed."""
    folder = Path(name).expanduser()
    if (fitted_with := read_fit(folder)) not in (None, fit):
        logger.warning("%s was fitted on images brought to shape by %s, and sees them by %s.", name, fitted_with, fit)
    fold_heads, content = install_fold_heads(model, folder)
    if fold_heads is None:
        return None, {}
    return fold_heads, {"fold_heads": len(fold_heads.weight), "fold_heads_sha256": content}


def _class_texts(prompts: Prompts, class_names: Sequence[str] | None) -> tuple[Sequence[str], list[list[str]]]:
    """Names and texts of the classes: those of the data, or those that the prompts describe where the data has none.

    Raises:
        ValueError: If there are no classes, or prompts do not fit them.
    """
    class_names = tuple(prompts.classes) if class_names is None else class_names
    if not class_names:
        raise ValueError(
            "it scores classes by their names, and there are none. Name the column that has them (`label_column`), or list the "
            'classes in a JSON file (`prompts`): {"classes": {"cat": ["a cat"]}}.'
        )
    return class_names, prompts.of_classes(class_names)


def _make_text_scores(
    name: str,
    model: nn.Module,
    image_size: tuple[int, int],
    source: dict[str, Any],
    texts: list[list[str]],
    background: Sequence[str],
) -> nn.Module:
    """An image-text model as a map of class scores; run once, as in `_make_dense`."""
    try:
        dense = score_texts(model, name.removeprefix(TEXT_PREFIX), source, image_size, texts, background)
        _try_out(dense, image_size, model.device, "the image-text model")
    except ValueError as error:
        raise ValueError(f"The annotator {name} cannot label cells: {error}") from error
    return dense


def _try_out(dense: nn.Module, image_size: tuple[int, int], device: torch.device, source: str) -> None:
    """Runs a network on a gray image; raises a `ValueError` if it does not take it, or gives scores that are not finite."""
    with torch.inference_mode(), library_errors(FORWARD_ERRORS):
        scores = dense(torch.zeros(1, 3, *image_size, device=device))
    check_scores(scores, ["a gray image"], source)


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
    options = forward_options(model, image_size)
    try:
        if grid_size is None:
            return DenseClassifier(model, image_size, options)
        dense = PatchClassifier(model, grid_size, options)
        _try_out(dense, image_size, next(model.parameters()).device, "its patch head")
        return dense
    except ValueError as error:
        size = f"{image_size[0]} x {image_size[1]}"
        raise ValueError(f"The annotator {name} cannot label cells of images of {size} pixels: {error}") from error


def _load_transformers(name: str, image_size: tuple[int, int] | None, source: dict[str, Any], random_weights: bool):
    try:
        model, unexpected = create_transformers_model(name, source, random_weights)
    except ValueError as error:
        if not is_text_model(name, source):
            raise
        raise ValueError(f"{error} It is an image-text model: give it as {TEXT_PREFIX}{name}.") from error
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
    model, _ = fit_classifier(model, image_size)
    class_names = transformers_class_names(model)
    model = restore_patch_head(model, image_size, name, source["revision"], unexpected)
    if hasattr(model, "patch_grid_size"):
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
