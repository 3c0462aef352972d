"""The model of a training run: from random weights, or from a checkpoint of another resolution or class count."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TrainingArguments,
)
from transformers.utils import logging

from ..backbones.class_rows import ClassRows, fit_heads
from ..backbones.image_processors import fitted_processor
from ..backbones.loading import BUILDING_ERRORS, LOADING_ERRORS, load_image_processor
from ..backbones.patch_head import PATCH_HEAD
from ..configuration_lvvit import LVViTConfig
from ..data.classes.multi_label import MULTI_LABEL, is_multi_label
from ..data.image_dataset import read_image_sizes
from ..data.sources import looks_local
from ..finite import check_weights
from ..modeling_lvvit import LVViTForImageClassification
from ..variants import AUTO, DEFAULT_CROP_PCT, VARIANTS, choose_variant, evaluation_image_processor, variant_config
from .build_backbone import finish_pretrained, random_classifier
from .model_arguments import ModelArguments, ModelSourceArguments, check_config_fields


logger = logging.get_logger(__name__)
SINGLE_LABEL = "single_label_classification"


def build_model(
    args: ModelArguments, class_names: list[str], has_several_classes: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Model and image processor; class names of the data become those of the model. Other models than LV-ViT get a patch head.

    Args:
        has_several_classes: Whether an image may have several classes, or none (`problem_type` multi_label_classification).

    Raises:
        FileNotFoundError: If a local model folder does not exist.
        ValueError: If it is no image classifier, is damaged, has other classes and may not be changed, or cannot learn from token
            labels.
    """
    names = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    asked = (args.config_overrides or {}).get("problem_type")
    if asked not in (None, MULTI_LABEL if has_several_classes else SINGLE_LABEL):
        raise ValueError(
            f"`config_overrides` has the `problem_type` {asked}, and images of the data have {'several classes' if has_several_classes else 'one class'}"
            " each. Leave it out: it follows from the label column."
        )
    if has_several_classes:
        names["problem_type"] = MULTI_LABEL
    if args.model_name_or_path is not None:
        return _load_pretrained(args, class_names, names)
    if args.architecture is not None:
        return random_classifier(args, names)
    settings = {**(args.config_overrides or {}), **names}
    if args.image_size is not None:
        settings["image_size"] = args.image_height_width
    config = variant_config(args.variant, **settings) if args.variant else LVViTConfig(**settings)
    fraction = VARIANTS[args.variant].crop_pct if args.variant else DEFAULT_CROP_PCT
    processor = evaluation_image_processor(config.image_height_width, args.crop_pct or fraction)
    return LVViTForImageClassification(config), processor


def choose_for_data(
    args: ModelArguments, rows: datasets.Dataset, image_column: str, num_classes: int, training_args: TrainingArguments
) -> tuple[ModelArguments, str]:
    """What `--variant auto` stands for on some training rows: the options, and why.

    Raises:
        ValueError: If the rows are a stream, whose images are not counted, or no image can be read.
    """
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"`variant` {AUTO} counts the images, which a stream does not allow. Name one of {', '.join(VARIANTS)}."
        )
    sizes = read_image_sizes(rows, image_column)
    if not len(sizes):
        raise ValueError(f"`variant` {AUTO} looks at the sizes of images, and none could be read.")
    choice = choose_variant(
        len(rows),
        num_classes,
        int(np.median(sizes.min(axis=1))),
        _accelerator_memory(training_args.device),
        training_args.per_device_train_batch_size,
        args.image_height_width,
        (args.config_overrides or {}).get("patch_size"),
    )
    overrides = choice.settings | (args.config_overrides or {})
    return replace(args, variant=None, image_size=list(choice.image_size), config_overrides=overrides), choice.reason


def _accelerator_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator, those of the machine where it shares them; `None` for a CPU."""
    if device.type == "cpu":
        return None
    return (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )


def model_image_size(model: PreTrainedModel) -> tuple[int, int]:
    """Height and width in pixels of the images that a model of `build_model` takes."""
    hook = getattr(model, "feature_hook", None)
    return model.config.image_height_width if hook is None else hook.image_size


def read_config(args: ModelSourceArguments) -> PreTrainedConfig:
    """Configuration of the checkpoint to start from.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = args.model_name_or_path
    if looks_local(path) and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"There is no model folder {path}.")
    try:
        return AutoConfig.from_pretrained(path, **args.source)
    except OSError as error:
        raise FileNotFoundError(
            f"{path} is neither a model folder (seen from {Path.cwd()}) nor a model that the Hub gives: {error}"
        ) from error


def _load_pretrained(args: ModelArguments, class_names: list[str], names: dict[str, Any]):
    path = args.model_name_or_path
    config, source = read_config(args), args.source
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"{path} is a {config.model_type!r} model, which is no image classifier.")
    check_config_fields(type(config), args.config_overrides or {})
    if getattr(config, "fused", False):
        raise ValueError(
            f"{path} was fused for inference and has no batch norms left; train the model that it was made of."
        )
    if config.num_labels != len(class_names) and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"{path} has {config.num_labels} classes, the data has {len(class_names)}. "
            "`ignore_mismatched_sizes` makes heads for the classes of the data: new ones, but for classes of the same name."
        )
    is_lvvit = config.model_type == LVViTConfig.model_type
    options = {**source, **names, **(args.config_overrides or {}), "dtype": torch.float32}
    if config.model_type == TimmWrapperConfig.model_type:
        options["num_labels"] = len(class_names)  # it would take that of the checkpoint, whatever names it is given
    errors = LOADING_ERRORS if is_lvvit else (*LOADING_ERRORS, *BUILDING_ERRORS)
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            path, ignore_mismatched_sizes=args.ignore_mismatched_sizes, output_loading_info=True, **options
        )
        check_weights(model)
    except errors as error:
        raise ValueError(f"The weights in {path} cannot be loaded: {error}") from error
    if is_multi_label(model.config) and "problem_type" not in names:
        model.config.problem_type = SINGLE_LABEL
    if hasattr(model.config, "label_names"):  # timm's own list, which would be saved next to the new names
        model.config.label_names = list(class_names)
    old_names = [(config.id2label or {}).get(index, f"LABEL_{index}") for index in range(config.num_labels)]
    rows = ClassRows.match(old_names, class_names)
    trained_options = {name: value for name, value in options.items() if name not in (*names, "num_labels")}
    about_heads, heads = fit_heads(
        model,
        rows,
        loading["missing_keys"],
        lambda: AutoModelForImageClassification.from_pretrained(path, **trained_options),
    )
    changes = _changes(loading, heads, about_heads)
    processor = _fit_resolution(model, args, config, source, changes) if is_lvvit else None
    if changes:
        logger.warning("Loaded %s; %s.", path, "; ".join(changes))
    if is_lvvit:
        return model, processor
    has_patch_head = any(PATCH_HEAD in key for key in loading["unexpected_keys"])
    return finish_pretrained(model, args, source, has_patch_head, rows)


def _fit_resolution(
    model: PreTrainedModel, args: ModelArguments, config: LVViTConfig, source: dict[str, Any], changes: list[str]
) -> Any:
    """Makes an LV-ViT take images of the asked-for size; returns their image processor and adds to `changes`."""
    processor = load_image_processor(args.model_name_or_path, source)
    size = args.image_height_width or tuple(config.image_height_width)
    if size != tuple(config.image_height_width):
        model.resize_position_embeddings(size)
        changes.append(f"position table resized from {config.grid_size} to {model.config.grid_size} tokens")
    return fitted_processor(processor, args.image_height_width, args.crop_pct, size)


def _changes(loading: dict[str, Any], heads: set[str], about_heads: str | None) -> list[str]:
    """What of a checkpoint was not taken over, and what became of its `heads`."""
    changes = []
    mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    for title, keys in (
        ("new because of another shape", sorted(mismatched - heads)),
        ("new because the checkpoint lacks them", sorted(loading["missing_keys"])),
        ("left out because the model has no such weights", _without_patch_head(loading["unexpected_keys"])),
    ):
        if keys:
            changes.append(f"{title}: {', '.join(keys)}")
    return changes if about_heads is None else [*changes, about_heads]


def _without_patch_head(keys: Iterable[str]) -> list[str]:
    """Keys besides those of an added patch head, which is loaded apart."""
    return sorted(key for key in keys if PATCH_HEAD not in key)
