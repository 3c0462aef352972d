"""Image classifiers other than LV-ViT: from random weights, and what is added to make them learn from token labels."""

import difflib
from contextlib import suppress
from typing import Any

import numpy as np
import timm
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from .command_line import ModelArguments, check_config_fields
from .configuration_lvvit import LVViTConfig
from .token_labeling import add_patch_head
from .token_labeling.annotators import TIMM_PREFIX
from .token_labeling.input_size import resize_classifier, vision_config
from .token_labeling.patch_head import load_patch_head
from .token_labeling.preprocessing import probe_processor
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
    part = vision_config(own)
    image_size = args.image_height_width or _side_lengths(getattr(part, "image_size", None)) or DEFAULT_IMAGE_SIZE
    if hasattr(part, "image_size"):
        is_number = image_size[0] == image_size[1] and not isinstance(part.image_size, (list, tuple))
        size = {"image_size": image_size[0] if is_number else list(image_size)}
        nested = {"vision_config": {**overrides.get("vision_config", {}), **size}}
        overrides |= size if part is own else nested
    # some models are loaded by the class that `architectures` names
    config = AutoConfig.for_model(args.architecture, architectures=[], **overrides, **names)
    return AutoModelForImageClassification.from_config(config), image_size


def finish_pretrained(
    model: PreTrainedModel, args: ModelArguments, source: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """A loaded classifier made ready for the asked-for size, with a patch head; and its image processor.

    Args:
        model: Classifier.
        args: Its name, image size and crop.
        source: Revision, and whether remote code may run.
    """
    path = args.model_name_or_path
    processor = _pretrained_processor(path, args, source)
    image_size = probe_processor(processor).image_size
    model = add_patch_head(resize_classifier(model, image_size), image_size)
    if not load_patch_head(model, path, source["revision"]):
        logger.info("%s has no patch head for these classes; it starts from random weights.", path)
    return model, processor


def _pretrained_processor(path: str, args: ModelArguments, source: dict[str, Any]) -> Any:
    """The image processor of a checkpoint, if nothing else was asked for and training can use it; or one of the asked-for size
    with its normalisation, filter and crop."""
    processor = AutoImageProcessor.from_pretrained(path, **source)
    own = probe_processor(processor)
    image_size = args.image_height_width or own.image_size
    if not crops_centre(processor) and args.crop_fraction is None and image_size != own.image_size:
        # it gives the whole picture, squashed; so does the new one
        height, width = image_size
        processor = AutoImageProcessor.from_pretrained(path, size={"height": height, "width": width}, **source)
    std = [1 / (255 * scale) for scale in own.scale]
    mean = [-offset * deviation for offset, deviation in zip(own.offset, std)]
    if args.crop_fraction is None and _is_usable(processor, image_size, mean, std):
        return processor
    fraction = args.crop_fraction or crop_fraction_of(processor)
    return evaluation_image_processor(image_size, fraction, mean, std, own.resample)


def crops_centre(processor: Any) -> bool:
    """Whether an image processor cuts off what is longer, instead of squashing the picture."""
    if isinstance(processor, TimmWrapperImageProcessor):
        return processor.data_config["crop_mode"] != "squash"
    return bool(getattr(processor, "do_center_crop", False) or getattr(processor, "crop_pct", None))


def crop_fraction_of(processor: Any) -> float:
    """Share of the resized picture that the evaluation crop of an image processor keeps, in (0, 1]."""
    if isinstance(processor, TimmWrapperImageProcessor):
        return processor.data_config["crop_pct"]
    if getattr(processor, "crop_pct", None):
        return processor.crop_pct
    resized, crop = processor.size, getattr(processor, "crop_size", None)
    shortest = resized.get("shortest_edge") or min(resized.get("height") or 0, resized.get("width") or 0)
    if not shortest or not crop:
        return DEFAULT_CROP_FRACTION
    return min(1.0, max(crop["height"], crop["width"]) / shortest)


def _is_usable(processor: Any, image_size: tuple[int, int], mean: list[float], std: list[float]) -> bool:
    """Whether an image processor says how it normalises, which training repeats, and makes all pictures the same size."""
    stated = [getattr(processor, name, None) for name in ("image_mean", "image_std")]
    if None in stated or not np.allclose(stated, [mean, std], atol=1e-3):
        return False
    pictures = [Image.new("RGB", size) for size in ((320, 200), (200, 320))]
    values = [processor(images=picture, return_tensors="pt")["pixel_values"] for picture in pictures]
    return all(tuple(value.shape[-2:]) == tuple(image_size) for value in values)


def _side_lengths(size: Any) -> tuple[int, int] | None:
    if isinstance(size, (list, tuple)):
        return tuple(size[-2:])
    return None if size is None else (size, size)
