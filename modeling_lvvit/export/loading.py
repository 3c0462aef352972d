"""Models that can be exported, with all that their users need to know."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import resolve_model_data_config
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperImageProcessor,
)

from ..backbones.feature_search import output_logits
from ..backbones.image_preparation import ImagePreparation, read_preparation
from ..backbones.loading import (
    FORWARD_ERRORS,
    LOADING_ERRORS,
    TIMM_PREFIX,
    create_timm_model,
    create_transformers_model,
    first_line,
    is_timm_folder,
    library_errors,
    load_image_processor,
    timm_class_names,
    transformers_class_names,
)
from ..backbones.patch_head import restore_patch_head
from ..backbones.resize import fit_classifier
from ..configuration_lvvit import LVViTConfig
from ..data.classes.multi_label import is_multi_label
from ..data.sources import looks_local
from ..finite import NotFiniteError, check_weights
from ..modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTPreTrainedModel


EXPORTED_FROM = "exported_from"  # in configurations of exported folders: class of the model
LVVIT_CLASSES = {
    model_class.__name__: model_class for model_class in (LVViTForImageClassification, LVViTForSemanticSegmentation)
}


@dataclass(frozen=True)
class Exportable:
    """A model to be exported.

    Args:
        model: In float32, for evaluation, without gradients; with its patch head, if it was saved with one.
        processor: Its image processor; of networks of timm a `TimmWrapperImageProcessor` with the settings of their published
            evaluation.
        preparation: What that does.
        class_names: By id.
        is_multi_label: Whether an image may have several classes, or none.
    """

    model: nn.Module
    processor: Any
    preparation: ImagePreparation
    class_names: tuple[str, ...]
    is_multi_label: bool = False

    @property
    def kind(self) -> Literal["classifier", "segmenter"]:
        """What it predicts: classes of images, or of pixels."""
        return "segmenter" if isinstance(self.model, LVViTForSemanticSegmentation) else "classifier"

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of what its image processor gives; `None` for one, of an LV-ViT, that gives several sizes."""
        return self.preparation.image_size


def load(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Exportable:
    """Loads a model for export.

    Args:
        name: Folder or Hub name of an image classifier of transformers or an LV-ViT for segmentation; `timm/NAME`, or a folder that
            timm saved.
        revision, trust_remote_code: As in `from_pretrained`.

    Raises:
        ValueError: If there is none, it is another model, weights are missing, NaN or infinite, there is no image processor, it is of a
            kind that a file cannot follow, or the model does not take what it gives.
    """
    if looks_local(name) and not Path(name).expanduser().is_dir():
        raise ValueError(f"There is no model folder {name} (seen from {Path.cwd()}).")
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    if name.startswith(TIMM_PREFIX) or is_timm_folder(Path(name).expanduser()):
        return _load_timm(name, source)
    try:
        config = AutoConfig.from_pretrained(name, **source)
    except LOADING_ERRORS as error:
        raise ValueError(f"{name} is no model: {first_line(error)}") from error
    _check_kind(name, config)
    try:
        processor = load_image_processor(name, source)
    except ValueError as error:
        raise ValueError(
            f"{name} has no preprocessor_config.json, which says how images are prepared; save the image processor "
            f"of its training next to the model. ({error})"
        ) from error
    try:
        preparation = read_preparation(processor)
        if config.model_type != LVViTConfig.model_type:
            model = _load_transformers(name, preparation, source)
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error
    if config.model_type == LVViTConfig.model_type:
        model = _load_lvvit(name, config, revision)
    names = tuple(transformers_class_names(model))
    return Exportable(model.eval().requires_grad_(False), processor, preparation, names, is_multi_label(model.config))


def _check_kind(name: str, config: PreTrainedConfig) -> None:
    """Raises a `ValueError` if a model is neither an image classifier nor an LV-ViT for segmentation, or was exported already."""
    if hasattr(config, EXPORTED_FROM):
        raise ValueError(f"{name} is an exported folder; give the model that it was made of.")
    architectures = config.architectures or ()
    if config.model_type == LVViTConfig.model_type:
        is_known = any(architecture in LVVIT_CLASSES for architecture in architectures)
    else:
        is_known = type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or hasattr(config, "auto_map")
    if not is_known:
        description = ", ".join(architectures) or f"a {config.model_type!r} model"
        raise ValueError(
            f"{name} is {description}; {' and '.join(LVVIT_CLASSES)} and other image classifiers can be exported."
        )


def _load_lvvit(name: str, config: LVViTConfig, revision: str | None) -> LVViTPreTrainedModel:
    model_class = next(LVVIT_CLASSES[entry] for entry in config.architectures if entry in LVVIT_CLASSES)
    try:
        options = {"revision": revision, "dtype": torch.float32, "output_loading_info": True}
        model, report = model_class.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])} ...")
    try:
        check_weights(model)
    except NotFiniteError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error
    return model


def _load_transformers(name: str, preparation: ImagePreparation, source: dict[str, Any]) -> PreTrainedModel:
    """A classifier of transformers that takes what its image processor gives."""
    model, unexpected = create_transformers_model(name, source)
    size = _fixed_size(preparation)
    model, options = fit_classifier(model, size)
    model = restore_patch_head(model, size, name, source["revision"], unexpected).eval()
    _check_output(model, size, options, model.config.num_labels)
    return model


def _load_timm(name: str, source: dict[str, Any]) -> Exportable:
    """A network of timm, prepared as in its published evaluation."""
    try:
        model = create_timm_model(name, None, source).eval().requires_grad_(False)
        settings = resolve_model_data_config(model, use_test_size=True)
        processor = TimmWrapperImageProcessor(pretrained_cfg=settings)
        preparation, names = read_preparation(processor), tuple(timm_class_names(model))
        _check_output(model, _fixed_size(preparation), {}, len(names))
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error
    return Exportable(model, processor, preparation, names)


def _fixed_size(preparation: ImagePreparation) -> tuple[int, int]:
    """Height and width in pixels of what an image processor gives; a `ValueError` if it gives several sizes."""
    if preparation.image_size is None:
        raise ValueError(
            "its image processor gives images of several sizes, and the file takes one; expected a `size` with height and width, or a center crop "
            "(`crop_size`)."
        )
    return preparation.image_size


def _check_output(model: nn.Module, size: tuple[int, int], options: dict[str, Any], num_classes: int) -> None:
    """Raises a `ValueError` if a classifier does not take images of a size, or gives other scores than it has classes."""
    height, width = size
    try:
        with torch.inference_mode(), library_errors(FORWARD_ERRORS):
            logits = output_logits(model(torch.zeros(1, 3, height, width), **options))
    except ValueError as error:
        raise ValueError(
            f"it does not take images of {height} x {width} pixels, which its image processor gives: {error}"
        ) from error
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"it gives scores {tuple(logits.shape)} for an image, and has names for {num_classes} classes."
        )
