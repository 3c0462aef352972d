"""Where a run may write, and which checkpoint it goes on from."""

import os
import shutil
from pathlib import Path

from ...data.files.folder_lock import is_lock
from ...finite import check_weight_files
from ..base_arguments import BaseImageTrainingArguments
from .resumable import check_average, check_fsdp, keep_step
from .whole import DamagedCheckpointError, check_whole, last_whole_checkpoint


def check_can_be_written(output_dir: Path) -> None:
    """Raises a `ValueError` if `output_dir` is a file, or cannot be made or written."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` {output_dir} is a file.")
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {output_dir} cannot be written: {existing} is read-only or no folder.")


def prepare_output_dir(training_args: BaseImageTrainingArguments, start_from: str | None, overwrite: bool) -> None:
    """Makes sure that no other run is written over, and finds the checkpoint that `last` stands for.

    Args:
        training_args: The checkpoint that `last` stands for is written into them.
        start_from: Folder or Hub name of the model to start from, `None` for random weights.
        overwrite: Whether `output_dir` may hold another run.

    Raises:
        ValueError: If `output_dir` holds another run, cannot be written, or there is no whole checkpoint to resume from, or one
            with weights that are not finite, another form of sharding, or a weight average where this run has none or the other
            way round; or if the model to start from would be written over.
    """
    output_dir = Path(training_args.output_dir)
    check_can_be_written(output_dir)
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
            raise ValueError(f"There is no whole checkpoint in {output_dir} to resume from.")
        training_args.resume_from_checkpoint = str(resume)
    elif resume is not None:
        try:
            check_whole(Path(resume))
        except DamagedCheckpointError as error:
            raise ValueError(
                f"`resume_from_checkpoint`: {error} Choose another one; last is the newest whole one of a run."
            ) from error
        check_weight_files(Path(resume))
    if resume is not None:
        check_fsdp(Path(resume))
        check_average(Path(resume), training_args)
        keep_step(training_args, Path(resume))
    continues = resume is not None and Path(resume).resolve().parent == output_dir.resolve()
    holds_files = output_dir.is_dir() and not all(map(is_lock, output_dir.iterdir()))
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
