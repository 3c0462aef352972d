"""The segmentation model of a run: new, with a classifier as its backbone, or one to go on with."""

import dataclasses
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoImageProcessor, SegformerImageProcessor
from transformers.utils import logging

from ..backbones.class_rows import ClassRows, fit_heads
from ..backbones.loading import LOADING_ERRORS
from ..cli.build_model import read_config
from ..cli.model_arguments import check_config_fields
from ..configuration_lvvit import LVViTConfig
from ..finite import check_weights
from ..modeling_lvvit import LVViTForSemanticSegmentation
from ..per_class.weights import MEDIAN_FREQUENCY, balanced_weights, given_class_weights
from ..variants import variant_config
from .arguments import SegmentationDataArguments, SegmentationModelArguments
from .dataset import ClassCounts
from .inference import trained_inference


logger = logging.get_logger(__name__)
# what a backbone was trained with
BACKBONE_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "stem_hidden_size", "conv_stem", "residual_divisor",
    "hidden_act", "layer_norm_eps", "patch_size", "qkv_bias",
)  # fmt: skip
HEADS = ("neck.", "decoder.", "auxiliary_decoder.")  # weights that a classifier lacks


def pretrained_config(args: SegmentationModelArguments) -> LVViTConfig | None:
    """Configuration of the model to start from, `None` for a new one; a `ValueError` if that is no LV-ViT, or fused."""
    path = args.model_name_or_path
    if path is None:
        return None
    config = read_config(args)
    if config.model_type != LVViTConfig.model_type:
        raise ValueError(f"{path} is a {config.model_type!r} model; this program trains LV-ViT.")
    if config.fused:
        raise ValueError(f"{path} was fused for inference; train the model that it was made of.")
    return config


def is_segmenter(config: LVViTConfig | None) -> bool:
    """Whether a configuration was saved with a segmentation model."""
    return config is not None and LVViTForSemanticSegmentation.__name__ in (config.architectures or [])


def build_segmenter(
    args: SegmentationModelArguments, config: LVViTConfig | None, class_names: list[str], ignore_index: int
) -> LVViTForSemanticSegmentation:
    """The model, with the class names of the data and position tables of the size of the training crops.

    Args:
        config: Result of `pretrained_config`.
        ignore_index: Label of pixels that do not count.

    Raises:
        ValueError: If weights cannot be loaded, or the model has other classes and may not be changed.
    """
    settings: dict[str, Any] = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "semantic_loss_ignore_index": ignore_index,
        "semantic_loss_class_weights": None,  # those of this run are set later
        **_overrides(args, config),
    }
    if args.segmentation_head is not None:
        settings["segmentation_head"] = args.segmentation_head
    if config is None:
        if args.image_size is not None:
            settings["image_size"] = args.image_height_width
        config = variant_config(args.variant, **settings) if args.variant else LVViTConfig(**settings)
        return LVViTForSemanticSegmentation(config)
    rows = _match_classes(args, config, class_names) if is_segmenter(config) else None
    return _load(args, config, settings, rows)


def _overrides(args: SegmentationModelArguments, config: LVViTConfig | None) -> dict[str, Any]:
    """Configuration fields to change. A trained backbone keeps what it was trained with: recipes describe a new one."""
    overrides = dict(args.config_overrides or {})
    if config is None:
        return overrides
    check_config_fields(LVViTConfig, overrides)
    ignored = [name for name in BACKBONE_FIELDS if name in overrides and overrides[name] != getattr(config, name)]
    if ignored:
        about = ", ".join(f"{name} {getattr(config, name)} (not {overrides[name]})" for name in ignored)
        logger.warning("%s keeps its %s.", args.model_name_or_path, about)
    return {name: value for name, value in overrides.items() if name not in BACKBONE_FIELDS}


def _load(
    args: SegmentationModelArguments, config: LVViTConfig, settings: dict[str, Any], rows: ClassRows | None
) -> LVViTForSemanticSegmentation:
    path = args.model_name_or_path
    try:
        model, loading = LVViTForSemanticSegmentation.from_pretrained(
            path, output_loading_info=True, dtype=torch.float32,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes, **args.source, **settings,
        )  # fmt: skip
        check_weights(model)
    except LOADING_ERRORS as error:
        raise ValueError(f"The weights in {path} cannot be loaded: {error}") from error
    missing = sorted(loading["missing_keys"])
    backbone = [key for key in missing if not key.startswith(HEADS)]
    if backbone:
        raise ValueError(
            f"{path} lacks weights of the backbone: {', '.join(backbone)}. Was config_overrides meant for a new model?"
        )
    about_heads, heads = None, set()
    if rows is not None:
        of_model = {name: value for name, value in settings.items() if name not in ("id2label", "label2id")}
        about_heads, heads = fit_heads(
            model, rows, missing, lambda: LVViTForSemanticSegmentation.from_pretrained(path, **args.source, **of_model)
        )
    mismatched = sorted({key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]} - heads)
    if args.evaluate_only and (missing or mismatched):
        raise ValueError(
            f"{path} has no trained segmentation heads for this: {', '.join((missing + mismatched)[:3])} ... would be random. Train it "
            "first, or leave out options that change its heads."
        )
    changes = [] if about_heads is None else [about_heads]
    if missing:
        changes.append("heads new" if is_segmenter(config) else "a classifier as backbone, heads new")
    if mismatched:
        changes.append(f"new because of another shape: {', '.join(mismatched)}")
    size = args.image_height_width
    if size is not None and size != tuple(config.image_height_width):
        model.resize_position_embeddings(size)
        changes.append(f"position table resized from {config.grid_size} to {model.config.grid_size} tokens")
    if changes:
        logger.warning("Loaded %s; %s.", path, "; ".join(changes))
    return model


def pretrained_processor(args: SegmentationModelArguments) -> Any | None:
    """Image processor of the model to start from, `None` where there is none."""
    if args.model_name_or_path is None:
        return None
    try:
        return AutoImageProcessor.from_pretrained(args.model_name_or_path, **args.source)
    except OSError:
        logger.warning("%s has no image processor: images are normalized as on ImageNet.", args.model_name_or_path)
        return None


def as_trained(
    data_args: SegmentationDataArguments,
    config: LVViTConfig,
    processor: Any | None,
    image_size: tuple[int, int] | None,
) -> SegmentationDataArguments:
    """Options for evaluating a segmentation model as in its training: those that are not given are what its configuration says, or
    where that is silent its image processor. A window without a stride, and a short side without a long one, go without the saved one.

    Args:
        image_size: Another size of the crops, which is that of the windows too; `None` keeps it.

    Raises:
        ValueError: If masks would be read in another way.
    """
    reduced = bool(getattr(processor, "do_reduce_labels", False))
    if processor is not None and reduced != data_args.reduce_labels:
        raise ValueError(
            f"The model was trained with `reduce_labels` {str(reduced).lower()}, so that its class ids mean other mask values. Add that "
            "option."
        )
    saved, trained, options = config.segmentation_inference or {}, trained_inference(config, processor), {}
    keeps_size = image_size is None or tuple(image_size) == tuple(config.image_height_width)
    if data_args.window is None and (saved or data_args.stride is None) and keeps_size:
        options |= {"window": list(trained.window), "stride": data_args.stride or list(trained.stride)}
    if data_args.short_side is None:
        options |= {"short_side": trained.short_side, "long_side": trained.long_side}
    if data_args.ignore_index is None:
        options["ignore_index"] = saved.get("ignore_index")
    if data_args.mask_values is None and not data_args.reduce_labels:
        options["mask_values"] = saved.get("mask_values")
    if data_args.scales is None:
        options["scales"] = saved.get("scales")
    if data_args.horizontal_flip is None and saved:
        options["horizontal_flip"] = float(saved["flip"])
    return dataclasses.replace(data_args, **options)


def warn_of_other_inference(name: str, saved: dict[str, Any] | None, record: dict[str, Any]) -> None:
    """Says what an evaluation does otherwise than that of the training, or that the model `name` does not tell. Both are results of
    `InferenceSettings.record`, with the scales that several would be."""
    if saved is None:
        logger.warning(
            "%s does not say how it was evaluated in its training (by another `window` or `stride` scores differ): here in windows of %s "
            "pixels every %s.", name, record["window"], record["stride"],
        )  # fmt: skip
    elif differing := [
        f"{key} {value} (not {saved.get(key)})" for key, value in record.items() if value != saved.get(key)
    ]:
        logger.warning(
            "Otherwise than in the evaluation of its training: %s. Scores may differ.", ", ".join(differing)
        )


def build_processor(
    pretrained: Any | None, data_args: SegmentationDataArguments, reduces_labels: bool
) -> SegformerImageProcessor:
    """The image processor that is saved with the model: images in the size in which they are evaluated, normalized as the backbone
    knows them (without a `pretrained_processor` as on ImageNet), whole and never squashed. `reduces_labels`: 0 in masks is no class."""
    settings: dict[str, Any] = {}
    if pretrained is not None:
        settings = {"image_mean": pretrained.image_mean, "image_std": pretrained.image_std}
    if data_args.short_side is not None:
        edges = {"shortest_edge": data_args.short_side, "longest_edge": data_args.long_side}
        settings["size"] = {name: length for name, length in edges.items() if length is not None}
    return SegformerImageProcessor(do_resize="size" in settings, do_reduce_labels=reduces_labels, **settings)


def _match_classes(args: SegmentationModelArguments, config: LVViTConfig, class_names: list[str]) -> ClassRows | None:
    """Which classes of a segmentation model are those of the data; `None` if it is evaluated as it is, with a warning where names
    differ.

    Raises:
        ValueError: If it has another number of classes, or is to be evaluated and has no heads for these.
    """
    path = args.model_name_or_path
    if config.num_labels != len(class_names) and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"{path} has {config.num_labels} classes, the data has {len(class_names)}. "
            "`ignore_mismatched_sizes` makes classifiers for the classes of the data: new ones, but for classes of the same name."
        )
    old_names = [config.id2label.get(index, f"LABEL_{index}") for index in range(config.num_labels)]
    rows = ClassRows.match(old_names, class_names)
    if not args.evaluate_only or None not in rows.sources:
        return rows
    for index, source in enumerate(rows.sources):
        if source not in (None, index):
            raise ValueError(
                f"{path} cannot be evaluated on classes that it was not trained for: {class_names[index]!r} is its class {source} and "
                f"class {index} of the data, and {class_names[rows.sources.index(None)]!r} is none of its classes."
            )
    differing = rows.sources.index(None)
    if config.num_labels == len(class_names):
        logger.warning(
            "%s calls class %d %r, the data %r: are they the same classes?",
            path, differing, old_names[differing], class_names[differing],
        )  # fmt: skip
    return None


def set_class_weights(
    model: LVViTForSemanticSegmentation, args: SegmentationDataArguments, counts: ClassCounts | None
) -> None:
    """Gives the loss the weights that were asked for, the same in all processes. Only the main process needs `counts`."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    weights = given_class_weights(args.class_weights, names)
    if args.counts_class_weights:
        counted = counts and (
            counts.median_frequency_weights()
            if args.class_weights == [MEDIAN_FREQUENCY]
            else balanced_weights(counts.pixels).tolist()
        )
        weights = broadcast_object_list([counted])[0]
    model.config.semantic_loss_class_weights = weights
