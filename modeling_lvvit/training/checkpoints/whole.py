"""Which checkpoints are whole: a list of digests, written last, names all their files."""

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ...data.files.digests import DIGESTS, damaged_files, file_digests, read_digests, write_digests
from ...finite import NotFiniteError, check_weight_files, listed


logger = logging.get_logger(__name__)


class DamagedCheckpointError(ValueError):
    """A checkpoint lacks files, or they are not what was written."""


def seal_checkpoint(folder: Path) -> None:
    """Writes the digests of all files of a checkpoint, once these are on the disk: older checkpoints may be deleted then."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS]
    for path in paths:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    write_digests(folder, file_digests(folder, [path.relative_to(folder).as_posix() for path in paths]))


def check_whole(folder: Path) -> None:
    """Raises a `DamagedCheckpointError` that says what is missing or damaged. All files are read. Of checkpoints of before there were
    digests, the forms of the files are looked at."""
    problems = damaged_files(folder)
    if not (folder / DIGESTS).is_file():
        problems = _problems_without_digests(folder)
    elif not problems and TRAINER_STATE_NAME not in read_digests(folder):  # last of an older list; more may be lost
        problems = [f"{DIGESTS} is cut"]
    if problems:
        raise DamagedCheckpointError(f"{folder} is no whole checkpoint: {listed(problems)}.")


def _problems_without_digests(folder: Path) -> list[str]:
    # the schedule is written after the optimizer, and not with `save_only_model`
    needed = [TRAINER_STATE_NAME, SCHEDULER_NAME]
    needed += [] if (folder / SAFE_WEIGHTS_NAME).exists() else [SAFE_WEIGHTS_INDEX_NAME]
    if missing := [f"{name} is missing" for name in needed if not (folder / name).is_file()]:
        return missing
    problems = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):  # compares the header with the size of the file
                    pass
            elif path.suffix in (".pt", ".pth") and zipfile.ZipFile(path).testzip() is not None:
                raise zipfile.BadZipFile("a checksum differs")
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            problems.append(f"{path.name} is damaged ({error})")
    return problems


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run with finite weights; a warning names those that are newer and what is wrong with them. One without
    digests is newer than one that has them only if its save broke off: its files may not have reached the disk."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    numbered.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for place, folder in enumerate(numbered):
        try:
            check_whole(folder)
            if not (folder / DIGESTS).is_file() and any((path / DIGESTS).is_file() for path in numbered[place:]):
                raise DamagedCheckpointError(f"{folder} is no whole checkpoint: {DIGESTS} is missing.")
            check_weight_files(folder)
            return folder
        except (DamagedCheckpointError, NotFiniteError) as error:
            logger.warning("Passed over: %s", error)
    return None
