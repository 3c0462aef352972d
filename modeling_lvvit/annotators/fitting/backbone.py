"""Any pretrained image network as a classifier of the data's classes, with a new head."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, DeiTImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from ...backbones.class_rows import find_head_tensors
from ...backbones.feature_search import output_logits, probe_images
from ...backbones.image_processors import checked_settings, choose_image_size, pillow_filter
from ...backbones.loading import (
    BUILDING_ERRORS,
    LOADING_ERRORS,
    TIMM_PREFIX,
    create_timm_model,
    is_timm_folder,
    library_errors,
    load_image_processor,
)
from ...backbones.preprocessing import Fit
from ...backbones.resize import fit_classifier, forward_options, native_image_size
from ...data.files.atomic_files import write_json
from ...data.sources import looks_local
from ...finite import check_weights
from ...variants import evaluation_image_processor


VISION_TOWER = "_vision_model"  # ends the type of an image model that is saved without its text model
TIMM_CROP_MODES = {"squash": "squash", "pad": "border", "center_crop": "center"}
LINEAR = (nn.Linear, nn.Conv2d)


@dataclass
class Backbone:
    """A classifier whose head is new.

    Args:
        model: Network with as many outputs as there are classes.
        is_timm: Whether it is one of timm.
        class_names: By id.
        image_size: Height and width of its input in pixels.
        image_mean, image_std: Normalization of images in [0, 1].
        resample: Filter of Pillow.
    """

    model: nn.Module
    is_timm: bool
    class_names: list[str]
    image_size: tuple[int, int]
    image_mean: list[float]
    image_std: list[float]
    resample: int

    def save(self, folder: Path, fit: Fit) -> None:
        """Writes an ordinary classifier, whose own preprocessing brings images to its shape as `fit` does. Image processors of
        transformers cannot pad: they squash instead."""
        if self.is_timm:
            self._save_timm(folder, fit)
            return
        self.model.save_pretrained(folder)
        normalization = {"image_mean": self.image_mean, "image_std": self.image_std, "resample": self.resample}
        if fit == "center_crop":
            processor = evaluation_image_processor(self.image_size, 1.0, **normalization)
        else:
            size = dict(zip(("height", "width"), self.image_size))
            processor = DeiTImageProcessor(size=size, crop_size=size, do_center_crop=False, **normalization)
        processor.save_pretrained(folder)

    def _save_timm(self, folder: Path, fit: Fit) -> None:
        config = dict(self.model.pretrained_cfg)
        for name in ("label_names", "label_descriptions", "test_input_size", "test_crop_pct"):
            config.pop(name, None)
        config |= {"input_size": (3, *self.image_size), "mean": self.image_mean, "std": self.image_std}
        config |= {"interpolation": Image.Resampling(self.resample).name.lower(), "crop_pct": 1.0}
        config |= {"crop_mode": TIMM_CROP_MODES[fit], "num_classes": len(self.class_names)}
        self.model.pretrained_cfg = config
        made_for = native_image_size(self.model)
        model_args = None if made_for is None else {"img_size": list(made_for)}
        names = {"label_names": list(self.class_names)}
        save_for_hf(self.model, folder, model_config=names, model_args=model_args, safe_serialization=True)
        path = folder / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        # newer versions of timm state it here too, and the wrapper of transformers would then give it twice
        written.get("model_args", {}).pop("num_classes", None)
        write_json(path, written)


def load_backbone(
    name: str, class_names: list[str], image_size: tuple[int, int] | None, source: dict[str, Any]
) -> Backbone:
    """Loads a pretrained network with a new head of random weights for the given classes.

    Args:
        name: Hub name or folder of transformers, with or without a classifier; `timm/NAME`, or a folder that timm saved.
        class_names: By id.
        image_size: Height and width of its input in pixels; default: its own.
        source: `revision` and `trust_remote_code`.

    Raises:
        ValueError: If it cannot be loaded, weights other than those of the head are missing, or it has several classifiers.
    """
    if looks_local(name) and not Path(name).expanduser().is_dir():
        raise ValueError(f"The backbone {name} cannot be loaded: there is no such folder (seen from {Path.cwd()}).")
    is_timm = name.startswith(TIMM_PREFIX) or is_timm_folder(Path(name).expanduser())
    try:
        return (_load_timm if is_timm else _load_transformers)(name, class_names, image_size, source)
    except ValueError as error:
        raise ValueError(f"The backbone {name} cannot be used: {error}") from error


def _load_timm(name: str, class_names: list[str], image_size: tuple[int, int] | None, source: dict[str, Any]):
    model = create_timm_model(name, image_size, source)
    with library_errors(BUILDING_ERRORS):
        model.reset_classifier(len(class_names))
    head = model.get_classifier()
    if not isinstance(head, nn.Module):
        raise ValueError("it has several classifiers, of which each would need its own fit. Take another network.")
    _draw_weights(dict(head.named_parameters()))
    settings = resolve_model_data_config(model)
    size = image_size or tuple(settings["input_size"][-2:])
    statistics = [list(settings[name]) for name in ("mean", "std")]
    return Backbone(model, True, class_names, size, *statistics, pillow_filter(settings["interpolation"]))


def _load_transformers(name: str, class_names: list[str], image_size: tuple[int, int] | None, source: dict[str, Any]):
    names = {"id2label": dict(enumerate(class_names)), "label2id": {text: i for i, text in enumerate(class_names)}}
    with library_errors((*LOADING_ERRORS, *BUILDING_ERRORS)), _without_report():
        saved = AutoConfig.from_pretrained(name, **source)
        config = _classifier_config(saved)
        for key, value in {**names, "problem_type": "single_label_classification"}.items():
            setattr(config, key, value)
        if hasattr(config, "label_names"):  # timm's own list, and its number of classes
            config.label_names, config.num_labels = list(class_names), len(class_names)
            config.id2label, config.label2id = names.values()
        options = {**source, "dtype": torch.float32, "output_loading_info": True}
        if config is saved:
            load = AutoModelForImageClassification.from_pretrained
            model, info = load(name, config=config, ignore_mismatched_sizes=True, **options)
        else:
            tower, info = AutoModel.from_pretrained(name, **options)
            model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
            model.vision_model.load_state_dict(tower.state_dict())
    vars(model.config).pop("pretrained_cfg", None)  # of timm, whose preprocessing would be taken for that of the model
    heads = find_head_tensors(model)
    lacking = {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])} - set(heads)
    if lacking:
        raise ValueError(f"weights other than those of a classifier are missing from it: {sorted(lacking)[:5]}.")
    parameters = dict(model.named_parameters())
    _draw_weights({key: parameters[key] for key in heads if key in parameters})
    check_weights(model)
    processor = load_image_processor(name, source)
    settings = checked_settings(processor)
    size = choose_image_size(processor, image_size, settings.image_size, native_image_size(model))
    model, _ = fit_classifier(model, size)
    statistics = (settings.image_mean, settings.image_std, settings.resample)
    return Backbone(model, False, class_names, size, *statistics)


@contextmanager
def _without_report() -> Iterator[None]:
    """Without the table of missing weights of transformers: those of the head are expected, and others are refused here."""
    logger = logging.get_logger("transformers.modeling_utils")
    passes = lambda record: "LOAD REPORT" not in record.getMessage()  # noqa: E731  it is removed by its name
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def _classifier_config(config: Any) -> Any:
    """A configuration of which transformers has a classifier.

    Raises:
        ValueError: If there is none for this type of model.
    """
    model_types = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    model_type = config.model_type
    family = model_type.removesuffix(VISION_TOWER)
    if family != model_type and family in model_types:
        return AutoConfig.for_model(family, vision_config=config.to_dict())
    has_own_code = "AutoModelForImageClassification" in (getattr(config, "auto_map", None) or {})
    if model_type in model_types or has_own_code or type(config) in AutoModelForImageClassification._model_mapping:
        return config
    advice = "; timm has DINOv3, for example timm/vit_small_patch16_dinov3.lvd1689m" if "dinov3" in model_type else ""
    raise ValueError(f"transformers has no image classifier of type {model_type!r}{advice}.")


@torch.no_grad()
def _draw_weights(parameters: dict[str, nn.Parameter]) -> None:
    """Draws the weights of a head, the same ones each time; some libraries leave them at zero, with which no layer could be told apart."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters.values():
        if parameter.ndim < 2:
            parameter.zero_()
        else:
            deviation = parameter[0].numel() ** -0.5
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def find_heads(model: nn.Module, image_size: tuple[int, int]) -> list[str]:
    """Names of the linear layers, or convolutions of 1 x 1 pixel, that make the logits: one; or of LV-ViT, whose patch tokens are
    classified on their own, that of patch tokens, which annotates, and that of the class token.

    Raises:
        ValueError: If the logits are made in another way.
    """
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module.bias is not None and getattr(module, "kernel_size", (1, 1)) == (1, 1)
    ]
    try:
        images = probe_images(image_size).to(next(model.parameters()).device)
        result = model(images, **forward_options(model, image_size))
    finally:
        for handle in handles:
            handle.remove()
    wanted = [output_logits(result)]
    if getattr(getattr(model, "config", None), "patch_logits_weight", 0):
        wanted = [result.patch_logits, result.cls_logits]
    names = [next((name for name, output in outputs.items() if _agree(output, target)), None) for target in wanted]
    if None in names:
        raise ValueError(
            f"{type(model).__name__} does not make its logits by one linear layer with bias behind the pooling, so none can be fitted. "
            "Take another backbone."
        )
    return names


def _agree(output: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether the mean of a layer's output over its cells is the logits, which may themselves have cells, `(B, N, C)`."""
    if output.shape != logits.shape:
        output = mean_of_cells(output, channels_first=output.ndim == 4)
    return output.shape == logits.shape and torch.allclose(output, logits, rtol=1e-4, atol=1e-5)


def mean_of_cells(values: torch.Tensor, channels_first: bool) -> torch.Tensor:
    """`(B, channels, rows, columns)` or `(B, ..., channels)` to `(B, channels)`."""
    if channels_first:
        return values.mean(dim=(2, 3))
    return values.flatten(1, -2).mean(dim=1) if values.ndim > 2 else values


@torch.no_grad()
def set_head(model: nn.Module, name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Gives a head its weights `(C, D)` and biases `(C,)`."""
    head = model.get_submodule(name)
    head.weight.copy_(weight.view_as(head.weight))
    head.bias.copy_(bias)
