"""Image classifiers of timm and transformers, loaded with their class names."""

import hashlib
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..data.sampling import temporary_seed
from ..finite import check_weights


TIMM_PREFIX = "timm/"
# what the libraries raise where a model is loaded (no such files, damaged ones, those of another model) ...
LOADING_ERRORS = (
    OSError, RuntimeError, KeyError, ValueError, SafetensorError, pickle.UnpicklingError, StrictDataclassError
)  # fmt: skip
# ... built from settings that do not fit each other, or need packages that are not there ...
BUILDING_ERRORS = (
    ValueError, TypeError, AssertionError, RuntimeError, ZeroDivisionError, IndexError, KeyError, ImportError, StrictDataclassError
)  # fmt: skip
# ... and run on images of a size, or features of a shape, that it does not take
FORWARD_ERRORS = (RuntimeError, ValueError, IndexError, AssertionError)


@contextmanager
def library_errors(errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns what a library raises within into a `ValueError` of one line. Only the call of the library belongs there."""
    try:
        yield
    except errors as error:
        raise ValueError(first_line(error)) from error


def first_line(error: Exception) -> str:
    """What an error of a library says first; it goes on with advice of its own. A configuration that is not valid says why at the end."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip() if isinstance(error, StrictDataclassError) else lines[0]


def fingerprint(model: nn.Module) -> str:
    """Hash of all weights: two annotators that share it give the same labels."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def create_transformers_model(
    name: str, source: dict[str, Any], random_weights: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """An image classifier of transformers, and the names of weights that it was saved with but does not have.

    Args:
        name: Hub name or folder.
        source: `revision` and `trust_remote_code`.
        random_weights: Whether to build the architecture only, with weights of seed 0.

    Raises:
        ValueError: If it cannot be loaded, or weights are missing, NaN or infinite.
    """
    with library_errors(LOADING_ERRORS), temporary_seed(0 if random_weights else None):
        if random_weights:
            config, trust = AutoConfig.from_pretrained(name, **source), source["trust_remote_code"]
            return AutoModelForImageClassification.from_config(
                config, trust_remote_code=trust, dtype=torch.float32
            ), []
        model, info = AutoModelForImageClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **source
        )
    if info["missing_keys"]:
        raise ValueError(f"it is no trained image classifier, its weights lack {sorted(info['missing_keys'])}.")
    check_weights(model)
    return model, list(info["unexpected_keys"])


def transformers_class_names(model: PreTrainedModel) -> list[str]:
    """Class names of a classifier of transformers, by id."""
    names = model.config.id2label or {}
    return [str(names.get(index, f"LABEL_{index}")) for index in range(model.config.num_labels)]


def create_timm_model(
    name: str, image_size: tuple[int, int] | None, source: dict[str, Any], random_weights: bool = False
) -> nn.Module:
    """A classifier of timm.

    Args:
        name: `timm/NAME`, or a folder that timm saved.
        image_size: Height and width in pixels that it is made for, where it has a fixed size; default: its own.
        source, random_weights: See `create_transformers_model`.

    Raises:
        ValueError: If it cannot be loaded, or has weights that are NaN or infinite.
    """
    if name.startswith(TIMM_PREFIX):
        revision = f"@{source['revision']}" if source["revision"] else ""
        location = name.removeprefix(TIMM_PREFIX) if random_weights else f"hf-hub:{name}{revision}"
    else:
        location = f"local-dir:{Path(name).expanduser()}"
    create = {"model_name": location, "pretrained": not random_weights}
    with library_errors((*LOADING_ERRORS, *BUILDING_ERRORS)), temporary_seed(0 if random_weights else None):
        model = None
        if image_size is not None:
            with suppress(TypeError):  # a network without a fixed input size
                model = timm.create_model(**create, img_size=image_size)
        model = timm.create_model(**create) if model is None else model
    check_weights(model)
    return model


def load_image_processor(name: str, source: dict[str, Any]) -> Any:
    """The image processor of a model of transformers.

    Raises:
        ValueError: If it cannot be loaded, or would not give finite pixels.
    """
    with library_errors(LOADING_ERRORS):
        processor = AutoImageProcessor.from_pretrained(name, **source)
    statistics = getattr(processor, "data_config", None) or {
        "mean": getattr(processor, "image_mean", None),
        "std": getattr(processor, "image_std", None),
    }
    values = (statistics.get(part) for part in ("mean", "std"))
    mean, std = (
        np.ravel([] if value is None else value).tolist() for value in values
    )  # one number for all channels is legal
    if not all(map(math.isfinite, (*mean, *std))) or 0 in std:
        raise ValueError(
            f"the image processor of {name} normalizes with mean {mean} and std {std}, which gives no finite pixels."
        )
    return processor


def timm_class_names(model: nn.Module) -> list[str]:
    """Class names of a classifier of timm, by id."""
    names = model.pretrained_cfg.get("label_names")
    if names:
        return list(names)
    # the published checkpoints without names are those of ImageNet
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_names() if subset else [f"LABEL_{index}" for index in range(model.num_classes)]


def is_timm_folder(path: Path) -> bool:
    """Whether a folder holds a model that timm saved.

    Raises:
        ValueError: If its configuration cannot be read.
    """
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not valid JSON: {error}") from error
    return "architecture" in content and "model_type" not in content
