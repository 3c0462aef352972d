"""Which checkpoints of a run can be continued, and where a run may write."""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .base_arguments import BaseImageTrainingArguments
from .ema import EMA_FILE
from .fsdp import is_fsdp_requested


logger = logging.get_logger(__name__)


def is_whole_checkpoint(folder: Path, needs_average: bool) -> bool:
    """Whether a checkpoint was written to its end: `BaseImageTrainer` writes `trainer_state.json` last."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if (weights := folder / SAFE_WEIGHTS_NAME).exists():
            with safe_open(weights, framework="pt"):  # compares the header with the size of the file
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # the schedule is written after the optimizer, and not with `save_only_model`
    needed = [SCHEDULER_NAME, *([EMA_FILE] if needs_average else [])]
    needed += [] if weights.exists() else [SAFE_WEIGHTS_INDEX_NAME]
    return all((folder / name).is_file() for name in needed)


def last_whole_checkpoint(output_dir: Path, needs_average: bool) -> Path | None:
    """The newest complete checkpoint of a run; incomplete ones are named in a warning."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for folder in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if is_whole_checkpoint(folder, needs_average):
            return folder
        logger.warning("%s is incomplete and passed over.", folder)
    return None


def prepare_output_dir(training_args: BaseImageTrainingArguments, start_from: str | None, overwrite: bool) -> None:
    """Makes sure that no other run is written over, and finds the checkpoint that `last` stands for.

    Args:
        training_args: The checkpoint that `last` stands for is written into them.
        start_from: Folder or Hub name of the model to start from, `None` for random weights.
        overwrite: Whether `output_dir` may hold another run.

    Raises:
        ValueError: If `output_dir` holds another run, cannot be written, or there is no complete checkpoint to resume from; or if
            the model to start from would be written over.
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
    needs_average = training_args.has_ema
    resume = training_args.resume_from_checkpoint
    if resume == "last":
        resume = last_whole_checkpoint(output_dir, needs_average)
        if resume is None:
            raise ValueError(f"There is no complete checkpoint in {output_dir} to resume from.")
        training_args.resume_from_checkpoint = str(resume)
    elif resume is not None and not is_whole_checkpoint(Path(resume), needs_average):
        wanted = f"{TRAINER_STATE_NAME}, {SCHEDULER_NAME}, {SAFE_WEIGHTS_NAME}{f' and {EMA_FILE}' * needs_average}"
        raise ValueError(f"{resume} is no complete checkpoint folder; it must hold {wanted}.")
    if resume is not None:
        _check_fsdp(Path(training_args.resume_from_checkpoint))
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
