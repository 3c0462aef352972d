"""Whether a run can go on from a checkpoint: same model, classes, average, sharding, workers."""

import json
from itertools import zip_longest
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, logging

from ...backbones.patch_head import PATCH_HEAD
from ...finite import listed
from ...hub.hub_trainer import ARGUMENTS
from ..base_arguments import BaseImageTrainingArguments
from ..ema import EMA_FILE
from ..fsdp import is_fsdp_requested
from ..run_layout import read_layout
from .record import read_json


logger = logging.get_logger(__name__)
WEIGHTS = "model*.safetensors"
# of a configuration: what says nothing of the network, what the classes and the run decide, and regularization
FREE_FIELDS = {
    "transformers_version", "dtype", "architectures", "auto_map", "use_cache", "pretrained_cfg", "id2label", "label2id", "problem_type",
    "segmentation_inference", "semantic_loss_class_weights", "patch_logits_weight", "out_features", "out_indices",
}  # fmt: skip


def check_fsdp(checkpoint: Path) -> None:
    """Raises a `ValueError` if the optimizer state of a checkpoint has another form than this run needs."""
    was_sharded, is_sharded = any(checkpoint.glob("pytorch_model_fsdp*")), is_fsdp_requested()
    if was_sharded != is_sharded:
        written, needed = ("with" if value else "without" for value in (was_sharded, is_sharded))
        raise ValueError(
            f"{checkpoint} was written {written} FSDP and cannot be continued {needed} it. Use the same accelerate "
            "configuration, or start a new run from its weights with `model_name_or_path`."
        )


def check_average(checkpoint: Path, args: BaseImageTrainingArguments) -> None:
    """Raises a `ValueError` if a checkpoint has a weight average and the run has none, or the other way round."""
    has_average = (checkpoint / EMA_FILE).is_file()
    if has_average == args.has_ema:
        return
    instead = f"or start a new run from its weights with `model_name_or_path` {checkpoint} and another `output_dir`"
    if not has_average:
        raise ValueError(
            f"{checkpoint} has no weight average to go on with. Leave out `ema_decay` and `base_ema_decay`, {instead}."
        )
    settings = read_json(checkpoint / ARGUMENTS)
    given = [
        f"`{name}` {settings[name]}" for name in ("ema_decay", "base_ema_decay") if settings.get(name) is not None
    ]
    raise ValueError(
        f"{checkpoint} has a weight average, which this run would drop. Add {' '.join(given) or '`ema_decay`'} to go on with it, {instead}."
    )


def keep_step(args: BaseImageTrainingArguments, checkpoint: Path) -> None:
    """Has the steps of a run keep the images of those of a checkpoint, on other numbers of processes too, by accumulation. A `ValueError` if
    the images of a step cannot be divided."""
    layout = read_layout(checkpoint)
    if layout is not None:
        args.keep_images_per_step(layout.images_per_step, str(checkpoint))


def check_resumable(checkpoint: Path, model: nn.Module) -> None:
    """Raises a `ValueError` if a checkpoint, as far as it says, is one of other classes or another model. Headers of files are read."""
    instead = f"To train another model from its weights, start a new run with `model_name_or_path` {checkpoint}."
    config = getattr(model, "config", None)
    stored = read_json(checkpoint / CONFIG_NAME)
    if isinstance(config, PreTrainedConfig) and stored:
        if stored.get("model_type") != config.model_type:
            raise ValueError(
                f"{checkpoint} is a {stored.get('model_type')!r} model, this run trains a {config.model_type!r} model. Resume with the "
                f"options it was started with. {instead}"
            )
        _check_config(checkpoint, type(config).from_pretrained(checkpoint), config, instead)
    saved = {}
    for path in checkpoint.glob(WEIGHTS):
        with safe_open(path, framework="pt") as file:
            saved |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  it is no mapping
    if not saved:  # in a form of its own
        return
    weights = model.state_dict()
    if not getattr(model, "saves_patch_head", True):  # it is not trained
        weights = {name: tensor for name, tensor in weights.items() if PATCH_HEAD not in name}
    written = {tensor.data_ptr() for name, tensor in weights.items() if name in saved}  # of tied weights one is saved
    here = {
        name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if name in saved or tensor.data_ptr() not in written
    }
    differing = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{checkpoint} holds other weights than the model of this run: {listed(differing)} (the first one has the shape "
            f"{saved.get(name, 'of none')} there and {here.get(name, 'of none')} here). Resume with the options of the model it was "
            f"started with. {instead}"
        )


def _check_config(checkpoint: Path, stored: PreTrainedConfig, config: PreTrainedConfig, instead: str) -> None:
    """Raises a `ValueError` if classes or fields of two configurations of one type differ."""
    old, new = ([names[index] for index in sorted(names)] for names in (stored.id2label, config.id2label))
    if old != new:
        index, names = next((index, pair) for index, pair in enumerate(zip_longest(old, new)) if pair[0] != pair[1])
        there, here = ("no class" if name is None else repr(name) for name in names)
        raise ValueError(
            f"{checkpoint} was trained on {len(old)} classes, this run has {len(new)}: class {index} is {there} there and {here} here. "
            f"Resume with the data it was trained on. {instead}"
        )
    old, new = (json.loads(part.to_json_string(use_diff=False)) for part in (stored, config))
    differing = [
        f"{name} {old[name]} (here {new[name]})"
        for name in sorted(old.keys() & new.keys() - FREE_FIELDS)
        if old[name] != new[name] and not name.startswith("_") and "drop" not in name
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} was trained with {listed(differing)}. Resume with the options it was started with. {instead}"
        )
