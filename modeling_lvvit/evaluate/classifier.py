"""Image classifiers of transformers and timm with their own preprocessing, ready to be evaluated."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import PreTrainedModel

from ..backbones.feature_search import output_logits
from ..backbones.image_processors import ImageProcessorTransform, choose_image_size, fitted_processor, read_settings
from ..backbones.loading import (
    FORWARD_ERRORS,
    TIMM_PREFIX,
    create_timm_model,
    create_transformers_model,
    is_timm_folder,
    library_errors,
    load_image_processor,
    timm_class_names,
    transformers_class_names,
)
from ..backbones.resize import fit_classifier, native_image_size
from ..configuration_lvvit import LVViTConfig
from ..data.classes.multi_label import is_multi_label
from ..data.sources import looks_local
from ..finite import check_scores


TRIAL_SIZE = (320, 200)  # of the image that every classifier is tried with


@dataclass
class InputOptions:
    """How images are given to a classifier, where that is not its own way.

    Args:
        image_size: Height and width of the input in pixels.
        crop_pct: Share of the resized image that the center crop keeps, in (0, 1].
    """

    image_size: tuple[int, int] | None = None
    crop_pct: float | None = None

    def __post_init__(self):
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must lie in (0, 1], got {self.crop_pct}.")

    @property
    def are_given(self) -> bool:
        """Whether something is to be changed."""
        return self.image_size is not None or self.crop_pct is not None


@dataclass
class Classifier:
    """A classifier that can be evaluated.

    Args:
        name: As the user gave it.
        model: Network.
        transform: From an RGB image to its input, float32 `(3, height, width)`.
        class_names: By id.
        facts: What a record says of it: library, parameters, resolution, crop, ...
        forward_options: Arguments of every forward pass.
        view: Shares of width and height of an image of 8:5 that it sees (`ProcessorSettings.view`); `None` if that is not known.
        is_multi_label: Whether an image may have several of its classes, or none (`config.problem_type`).
    """

    name: str
    model: nn.Module
    transform: Callable[[Image.Image], torch.Tensor]
    class_names: list[str]
    facts: dict[str, Any]
    forward_options: dict[str, Any] = field(default_factory=dict)
    view: tuple[float, float] | None = None
    is_multi_label: bool = False

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, height, width)` to `(B, classes)`, float32."""
        return output_logits(self.model(pixel_values, **self.forward_options)).float()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, the shape of `logits`: by softmax, or by sigmoid where an image may have several classes."""
        return logits.sigmoid() if self.is_multi_label else logits.softmax(dim=-1)


class ProcessorTransform:
    """From an image to what an image processor makes of it, float32 `(3, height, width)`."""

    def __init__(self, processor: Any):
        self.transform = ImageProcessorTransform(processor)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(image)["pixel_values"]


def load_classifier(
    name: str,
    options: InputOptions,
    revision: str | None = None,
    trust_remote_code: bool = False,
    random_weights: bool = False,
) -> Classifier:
    """Loads a classifier with its preprocessing.

    Args:
        name: Hub name or folder of a classifier of transformers; `timm/NAME`, or a folder that timm saved.
        options: Changes of its preprocessing.
        revision, trust_remote_code: As in `from_pretrained`.
        random_weights: Builds the architecture without its weights (seed 0), to try things out.

    Raises:
        ValueError: If it cannot be loaded, does not take images of the size that was asked for, or has weights or gives scores that
            are NaN or infinite.
    """
    if looks_local(name) and not Path(name).expanduser().is_dir():
        raise ValueError(f"There is no model folder {name} (seen from {Path.cwd()}).")
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    is_timm = name.startswith(TIMM_PREFIX) or is_timm_folder(Path(name).expanduser())
    load = _load_timm if is_timm else _load_transformers
    try:
        classifier = load(name, options, source, random_weights)
    except ValueError as error:
        raise ValueError(f"{name} cannot be evaluated: {error}") from error
    classifier.model.eval().requires_grad_(False)
    pixel_values = classifier.transform(Image.new("RGB", TRIAL_SIZE))[None]
    try:
        with torch.inference_mode(), library_errors(FORWARD_ERRORS):
            scores = classifier.logits(pixel_values)
    except ValueError as error:
        size = classifier.facts["input_size"]
        raise ValueError(f"{name} cannot be evaluated on images of {size} pixels: {error}") from error
    check_scores(scores, ["a black image"], name)
    if scores.shape[-1] != len(classifier.class_names):
        raise ValueError(
            f"{name} gives {scores.shape[-1]} scores and has names for {len(classifier.class_names)} classes."
        )
    classifier.facts = {
        "library": "timm" if is_timm else "transformers",
        "parameters": sum(parameter.numel() for parameter in classifier.model.parameters()),
        "weights": "random" if random_weights else "trained",
        **classifier.facts,
    }
    return classifier


def _load_transformers(name: str, options: InputOptions, source: dict[str, Any], random_weights: bool) -> Classifier:
    model, _ = create_transformers_model(name, source, random_weights)
    processor = load_image_processor(name, source)
    if options.are_given:
        processor = fitted_processor(processor, options.image_size, options.crop_pct, native_image_size(model))
    settings = read_settings(processor)
    size = choose_image_size(processor, settings.image_size)
    model, forward_options = _fitted(model, size)
    stated = {
        key: getattr(processor, key, None) for key in ("size", "crop_size", "do_center_crop", "resample", "crop_pct")
    }
    facts = {
        "input_size": list(size),
        "preprocessing": {key: _plain(value) for key, value in stated.items() if value is not None},
    }
    facts["preprocessing"] |= getattr(processor, "data_config", {})  # of timm
    return Classifier(
        name,
        model,
        ProcessorTransform(processor),
        transformers_class_names(model),
        facts,
        forward_options,
        settings.view,
        is_multi_label(model.config),
    )


def _fitted(model: PreTrainedModel, size: tuple[int, int]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model that takes images of a size, and the arguments that its forward passes need for it."""
    if model.config.model_type == LVViTConfig.model_type:
        if size != native_image_size(model):
            with library_errors((StrictDataclassError,)):  # by which configurations are checked
                model.resize_position_embeddings(size)
        return model, {}
    return fit_classifier(model, size)


def _load_timm(name: str, options: InputOptions, source: dict[str, Any], random_weights: bool) -> Classifier:
    model = create_timm_model(name, options.image_size, source, random_weights)
    changes = {}
    if options.image_size is not None:
        changes["input_size"] = (3, *options.image_size)
    if options.crop_pct is not None:
        changes["crop_pct"] = options.crop_pct
    # the size of timm's own published evaluations
    settings = resolve_model_data_config(model, args=changes, use_test_size=True)
    transform = create_transform(**settings, is_training=False)
    recorded = ("crop_pct", "crop_mode", "interpolation")
    facts = {
        "input_size": list(settings["input_size"][-2:]),
        "preprocessing": {key: settings[key] for key in recorded},
    }
    return Classifier(name, model, transform, timm_class_names(model), facts)


def _plain(value: Any) -> Any:
    """A setting of an image processor as JSON can hold it."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if part is not None}
    return value if isinstance(value, (bool, int, float, str)) else str(value)
