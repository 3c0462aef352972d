"""Which checkpoints of a run can be continued, and where a run may write."""

import json
import os
import shutil
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..backbones.patch_head import PATCH_HEAD
from ..finite import NotFiniteError, check_weight_files, listed
from ..hub.hub_trainer import ARGUMENTS, TRAINING_DATA
from .base_arguments import BaseImageTrainingArguments
from .ema import EMA_FILE
from .fsdp import is_fsdp_requested


logger = logging.get_logger(__name__)
WEIGHTS = "model*.safetensors"
# of a configuration: what says nothing of the network, what the classes and the run decide, and regularization
FREE_FIELDS = {
    "transformers_version", "dtype", "architectures", "auto_map", "use_cache", "pretrained_cfg", "id2label", "label2id", "problem_type",
    "segmentation_inference", "semantic_loss_class_weights", "patch_logits_weight", "out_features", "out_indices",
}  # fmt: skip


def is_whole_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint was written to its end: `BaseImageTrainer` writes `trainer_state.json` last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if (weights := folder / SAFE_WEIGHTS_NAME).exists():
            with safe_open(weights, framework="pt"):  # compares the header with the size of the file
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # the schedule is written after the optimizer, and not with `save_only_model`
    needed = [SCHEDULER_NAME, *([] if weights.exists() else [SAFE_WEIGHTS_INDEX_NAME])]
    return all((folder / name).is_file() for name in needed)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run with finite weights; a warning names others that are newer."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not is_whole_checkpoint(folder):
            logger.warning("%s is incomplete and passed over.", folder)
            continue
        try:
            check_weight_files(folder)
            return folder
        except NotFiniteError as error:
            logger.warning("%s is passed over: %s", folder, error)
    return None


def prepare_output_dir(training_args: BaseImageTrainingArguments, start_from: str | None, overwrite: bool) -> None:
    """Makes sure that no other run is written over, and finds the checkpoint that `last` stands for.

    Args:
        training_args: The checkpoint that `last` stands for is written into them.
        start_from: Folder or Hub name of the model to start from, `None` for random weights.
        overwrite: Whether `output_dir` may hold another run.

    Raises:
        ValueError: If `output_dir` holds another run, cannot be written, or there is no complete checkpoint to resume from, or one
            with weights that are not finite, another form of sharding, or a weight average where this run has none or the other
            way round; or if the model to start from would be written over.
    """
    output_dir = Path(training_args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` {output_dir} is a file.")
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {output_dir} cannot be written: {existing} is read-only or no folder.")
    if start_from is not None and overwrite:
        start = Path(start_from).expanduser().resolve()
        if output_dir.resolve() in start.parents and start.is_dir():
            raise ValueError(
                f"`model_name_or_path` {start_from} lies in `output_dir` {output_dir}, whose checkpoints `overwrite_output_dir` "
                "deletes. Choose another `output_dir`."
            )
    resume = training_args.resume_from_checkpoint
    if resume == "last":
        resume = last_whole_checkpoint(output_dir)
        if resume is None:
            raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from.")
        training_args.resume_from_checkpoint = str(resume)
    elif resume is not None:
        if not is_whole_checkpoint(Path(resume)):
            wanted = f"{TRAINER_STATE_NAME}, {SCHEDULER_NAME} and {SAFE_WEIGHTS_NAME}"
            raise ValueError(
                f"`resume_from_checkpoint` {resume} is no complete checkpoint folder; it must hold {wanted}. last is the newest of a run."
            )
        check_weight_files(Path(resume))
    if resume is not None:
        _check_fsdp(Path(resume))
        _check_average(Path(resume), training_args)
    continues = resume is not None and Path(resume).resolve().parent == output_dir.resolve()
    holds_files = output_dir.is_dir() and any(output_dir.iterdir())
    if holds_files and not continues and not overwrite:
        raise ValueError(
            f"{output_dir} holds another run. Choose another `output_dir`, continue it with `resume_from_checkpoint` "
            "last, or write over it with `overwrite_output_dir`."
        )


def discard_overwritten_checkpoints(training_args: BaseImageTrainingArguments, overwrite: bool) -> None:
    """Deletes the checkpoints of the run that is written over; to be called once, by the main process, when all is ready to train."""
    if overwrite and training_args.resume_from_checkpoint is None:
        for folder in Path(training_args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)


def _check_fsdp(checkpoint: Path) -> None:
    """Raises a `ValueError` if the optimizer state of a checkpoint has another form than this run needs."""
    was_sharded, is_sharded = any(checkpoint.glob("pytorch_model_fsdp*")), is_fsdp_requested()
    if was_sharded != is_sharded:
        written, needed = ("with" if value else "without" for value in (was_sharded, is_sharded))
        raise ValueError(
            f"{checkpoint} was written {written} FSDP and cannot be continued {needed} it. Use the same accelerate "
            "configuration, or start a new run from its weights with `model_name_or_path`."
        )


def _check_average(checkpoint: Path, args: BaseImageTrainingArguments) -> None:
    """Raises a `ValueError` if a checkpoint has a weight average and the run has none, or the other way round."""
    has_average = (checkpoint / EMA_FILE).is_file()
    if has_average == args.has_ema:
        return
    instead = f"or start a new run from its weights with `model_name_or_path` {checkpoint} and another `output_dir`"
    if not has_average:
        raise ValueError(
            f"{checkpoint} has no weight average to go on with. Leave out `ema_decay` and `base_ema_decay`, {instead}."
        )
    settings = _read_json(checkpoint / ARGUMENTS)
    given = [
        f"`{name}` {settings[name]}" for name in ("ema_decay", "base_ema_decay") if settings.get(name) is not None
    ]
    raise ValueError(
        f"{checkpoint} has a weight average, which this run would drop. Add {' '.join(given) or '`ema_decay`'} to go on with it, {instead}."
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def data_record(name: str, split: str) -> dict[str, str]:
    """What `arguments.json` of a run says of the images that it was trained on: Hub name or last part of a path, and split."""
    path = Path(name).expanduser()
    return {"dataset_name": path.absolute().name if path.exists() else name, "train_split": split}


def read_data_record(model: str) -> dict[str, str] | None:
    """The `data_record` of a model in a folder; `None` where there is none."""
    try:
        return _read_json(Path(model).expanduser() / ARGUMENTS).get(TRAINING_DATA)
    except (OSError, ValueError):
        return None


def resume_workers(checkpoint: Path, args: BaseImageTrainingArguments) -> None:
    """Has a run whose samples depend on the number of its workers, as those of a stream do, go on with the number that `checkpoint` was
    written with. One that was given holds; if it is another, a warning says what that means."""
    number = _read_json(checkpoint / ARGUMENTS).get("dataloader_num_workers")
    if number is None or number == args.dataloader_num_workers:
        return
    if not args.are_workers_given:
        args.use_workers(number)
        return
    logger.warning(
        "`dataloader_num_workers` is %d, and was %d when %s was written: the rest of the stream is divided in another way, so that some "
        "images come again early and others late. Leave it out to go on with %d.",
        args.dataloader_num_workers, number, checkpoint, number,
    )  # fmt: skip


def check_resumable(checkpoint: Path, model: nn.Module) -> None:
    """Raises a `ValueError` if a checkpoint, as far as it says, is one of other classes or another model. Headers of files are read."""
    instead = f"To train another model from its weights, start a new run with `model_name_or_path` {checkpoint}."
    config = getattr(model, "config", None)
    stored = _read_json(checkpoint / CONFIG_NAME)
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
