"""Which checkpoints are whole."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ...finite import NotFiniteError, check_weight_files


logger = logging.get_logger(__name__)


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
