"""Image classifiers other than LV-ViT: from random weights, and what is added to make them learn from token labels."""

import difflib
from contextlib import suppress
from typing import Any

import timm
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BitImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from ..backbones.class_rows import ClassRows
from ..backbones.image_processors import fitted_processor, read_settings
from ..backbones.loading import BUILDING_ERRORS, TIMM_PREFIX, library_errors, load_image_processor
from ..backbones.patch_head import load_patch_head
from ..backbones.resize import native_image_size, resize_classifier, vision_config
from ..configuration_lvvit import LVViTConfig
from ..token_labeling import add_patch_head
from ..variants import DEFAULT_CROP_PCT, evaluation_image_processor
from .model_arguments import ModelArguments, check_config_fields


logger = logging.get_logger(__name__)
DEFAULT_IMAGE_SIZE = (224, 224)


def random_classifier(args: ModelArguments, names: dict[str, Any]) -> tuple[PreTrainedModel, BitImageProcessor]:
    """Model of `args.architecture` with random weights and a patch head, and its image processor.

    Args:
        args: Architecture, image size and overrides.
        names: `id2label` and `label2id`.

    Raises:
        ValueError: If there is no such architecture, it has no such fields, or it cannot learn from token labels.
    """
    make = _random_timm if args.architecture.startswith(TIMM_PREFIX) else _random_transformers
    try:
        model, image_size = make(args, names)
    except ValueError as error:
        raise ValueError(f"`architecture` {args.architecture} cannot be built: {error}") from error
    processor = evaluation_image_processor(image_size, args.crop_pct or DEFAULT_CROP_PCT)
    return add_patch_head(model, image_size), processor


def _random_timm(args: ModelArguments, names: dict[str, Any]) -> tuple[PreTrainedModel, tuple[int, int]]:
    name = args.architecture.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('_')[0]}*")[:5] or timm.list_models()[:5]
        raise ValueError(f"timm has no model {name!r}; near it: {', '.join(near)}.")
    overrides = args.config_overrides or {}
    default_size = tuple(timm.get_pretrained_cfg(name).input_size[1:])
    image_size = args.image_height_width or default_size

    def build(**more: Any) -> PreTrainedModel:
        config = TimmWrapperConfig(architecture=name, model_args={**overrides, **more} or None, **names)
        return TimmWrapperForImageClassification(config)

    with library_errors(BUILDING_ERRORS):
        if image_size != default_size:
            with suppress(TypeError):  # a network without a fixed input size
                return build(img_size=list(image_size)), image_size
        return build(), image_size


def _random_transformers(args: ModelArguments, names: dict[str, Any]) -> tuple[PreTrainedModel, tuple[int, int]]:
    model_types = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if args.architecture == LVViTConfig.model_type:
        raise ValueError("LV-ViT is chosen with `variant`.")
    if args.architecture not in model_types:
        near = difflib.get_close_matches(args.architecture, model_types, n=3)
        raise ValueError(
            f"transformers has no image classifier of type {args.architecture!r}"
            + (f" (did you mean {', '.join(near)}?)" if near else f"; it has {', '.join(sorted(model_types))}")
            + ". Models of timm are written timm/NAME."
        )
    default = AutoConfig.for_model(args.architecture)
    overrides = dict(args.config_overrides or {})
    check_config_fields(type(default), overrides)
    part = vision_config(default)
    image_size = args.image_height_width or _side_lengths(getattr(part, "image_size", None)) or DEFAULT_IMAGE_SIZE
    if hasattr(part, "image_size"):
        is_number = image_size[0] == image_size[1] and not isinstance(part.image_size, (list, tuple))
        size = {"image_size": image_size[0] if is_number else list(image_size)}
        nested = {"vision_config": {**overrides.get("vision_config", {}), **size}}
        overrides |= size if part is default else nested
    with library_errors(BUILDING_ERRORS):
        # some models are loaded by the class that `architectures` names
        config = AutoConfig.for_model(args.architecture, architectures=[], **overrides, **names)
        return AutoModelForImageClassification.from_config(config), image_size


def finish_pretrained(
    model: PreTrainedModel, args: ModelArguments, source: dict[str, Any], has_patch_head: bool, rows: ClassRows
) -> tuple[PreTrainedModel, Any]:
    """A loaded classifier made ready for the asked-for size, with a patch head; and its image processor.

    Args:
        model: Classifier.
        args: Its name, image size and crop.
        source: Revision, and whether remote code may run.
        has_patch_head: Whether the checkpoint has weights of one.
        rows: Which of its classes are those of the data.
    """
    path, default_size = args.model_name_or_path, native_image_size(model)
    processor = fitted_processor(
        load_image_processor(path, source), args.image_height_width, args.crop_pct, default_size
    )
    image_size = read_settings(processor).image_size
    if default_size not in (None, image_size):
        logger.warning(
            "%s was made for images of %d x %d pixels, and is made to take %d x %d.", path, *default_size, *image_size
        )
    model = add_patch_head(resize_classifier(model, image_size), image_size)
    if not load_patch_head(model, path, source["revision"], rows) and has_patch_head:
        logger.warning(
            "The patch head of %s is not taken over: it has other classes, or is not stored as safetensors.", path
        )
    if isinstance(model, TimmWrapperForImageClassification):
        # where a configuration has them, image processors are made of timm's settings, which are those of the old size
        vars(model.config).pop("pretrained_cfg", None)
    return model, processor


def _side_lengths(size: Any) -> tuple[int, int] | None:
    if isinstance(size, (list, tuple)):
        return tuple(size[-2:])
    return None if size is None else (size, size)
