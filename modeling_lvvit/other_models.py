"""Image classifiers other than LV-ViT: from random weights, and what is added to make them learn from token labels."""

import difflib
from contextlib import suppress
from typing import Any

import timm
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from .command_line import ModelArguments, check_config_fields
from .configuration_lvvit import LVViTConfig
from .token_labeling import add_patch_head
from .token_labeling.annotators import TIMM_PREFIX, probe_processor
from .token_labeling.patch_head import load_patch_head
from .variants import evaluation_image_processor


logger = logging.get_logger(__name__)
DEFAULT_IMAGE_SIZE = (224, 224)
DEFAULT_CROP_FRACTION = 0.9
# what the libraries raise for values that do not fit, or for packages that are not there
BUILDING_ERRORS = (
    ValueError,
    TypeError,
    AssertionError,
    RuntimeError,
    ZeroDivisionError,
    IndexError,
    KeyError,
    ImportError,
)


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
    except BUILDING_ERRORS as error:
        raise ValueError(
            f"--architecture {args.architecture} cannot be built: {error or type(error).__name__}"
        ) from error
    processor = evaluation_image_processor(image_size, args.crop_fraction or DEFAULT_CROP_FRACTION)
    return add_patch_head(model, image_size), processor


def _random_timm(args: ModelArguments, names: dict[str, Any]) -> tuple[PreTrainedModel, tuple[int, int]]:
    name = args.architecture.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('_')[0]}*")[:5] or timm.list_models()[:5]
        raise ValueError(f"timm has no model {name!r}; near it: {', '.join(near)}.")
    overrides = args.config_overrides or {}
    own_size = tuple(timm.get_pretrained_cfg(name).input_size[1:])
    image_size = args.image_height_width or own_size

    def build(**more: Any) -> PreTrainedModel:
        config = TimmWrapperConfig(architecture=name, model_args={**overrides, **more} or None, **names)
        return TimmWrapperForImageClassification(config)

    if image_size != own_size:
        with suppress(TypeError):  # a network without a fixed input size
            return build(img_size=list(image_size)), image_size
    return build(), image_size


def _random_transformers(args: ModelArguments, names: dict[str, Any]) -> tuple[PreTrainedModel, tuple[int, int]]:
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    if args.architecture == LVViTConfig.model_type:
        raise ValueError("LV-ViT is chosen with --variant.")
    if args.architecture not in known:
        near = difflib.get_close_matches(args.architecture, known, n=3)
        raise ValueError(
            f"transformers has no image classifier of type {args.architecture!r}"
            + (f" (did you mean {', '.join(near)}?)" if near else f"; it has {', '.join(sorted(known))}")
            + ". Models of timm are written timm/NAME."
        )
    own = AutoConfig.for_model(args.architecture)
    overrides = dict(args.config_overrides or {})
    check_config_fields(type(own), overrides)
    image_size = args.image_height_width or _side_lengths(getattr(own, "image_size", None)) or DEFAULT_IMAGE_SIZE
    if hasattr(own, "image_size"):
        square = image_size[0] == image_size[1]
        overrides["image_size"] = image_size[0] if square else list(image_size)
    # some models are loaded by the class that `architectures` names
    config = AutoConfig.for_model(args.architecture, architectures=[], **overrides, **names)
    return AutoModelForImageClassification.from_config(config), image_size


def finish_pretrained(
    model: PreTrainedModel, args: ModelArguments, source: dict[str, Any]
) -> tuple[PreTrainedModel, BitImageProcessor]:
    """Patch head and image processor of a loaded classifier.

    Args:
        model: Classifier.
        args: Its name, image size and crop.
        source: Revision, and whether remote code may run.
    """
    path = args.model_name_or_path
    preprocessing = probe_processor(AutoImageProcessor.from_pretrained(path, **source))
    image_size = args.image_height_width or preprocessing.image_size
    std = [1 / (255 * scale) for scale in preprocessing.scale]
    mean = [-offset * deviation for offset, deviation in zip(preprocessing.offset, std)]
    processor = evaluation_image_processor(image_size, args.crop_fraction or DEFAULT_CROP_FRACTION, mean, std)
    model = add_patch_head(model, image_size)
    if not load_patch_head(model, path, source["revision"]):
        logger.info("%s has no patch head for these classes; it starts from random weights.", path)
    if model.feature_tap.forward_options:
        logger.warning(
            "%s was made for other pictures than %d x %d: its position table is resized in every forward pass, and later users of "
            "the trained model must ask for this (interpolate_pos_encoding=True).",
            path,
            *image_size,
        )
    return model, processor


def _side_lengths(size: Any) -> tuple[int, int] | None:
    if isinstance(size, (list, tuple)):
        return tuple(size[-2:])
    return None if size is None else (size, size)
