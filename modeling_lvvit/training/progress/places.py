"""Where the results of a run lie."""

import shlex
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...hub.file_checks import CARD
from .figure import tensorboard_callback


# files of the model, and of its options and history
NO_METRICS = (
    "config.json",
    "preprocessor_config.json",
    "arguments.json",
    "trainer_state.json",
    "processor_config.json",
)


def modification_times(folder: Path) -> dict[Path, int]:
    """When each of the files of a folder was written, in nanoseconds: what has another time later was written again, whatever the clock did."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*") if path.is_file()}


def describe_outputs(trainer: Trainer, earlier: dict[Path, int]) -> list[str]:
    """A line for each kind of result: where it lies and, for checkpoints and curves, what to do with it.

    Args:
        earlier: The `modification_times` when the run began: files that still have them are of another run.
    """
    folder = Path(trainer.args.output_dir)

    def written(pattern: str) -> list[Path]:
        return sorted(path for path in folder.glob(pattern) if path.stat().st_mtime_ns != earlier.get(path))

    checkpoints = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    board, curves = tensorboard_callback(trainer), None
    if board is not None and board.logging_dir is not None:
        inside = Path(board.logging_dir).parent  # of this and earlier runs in the same folder
        curves = shlex.join(["tensorboard", "--logdir", str(inside if inside.parent == folder else board.logging_dir)])
    places = {
        "model": folder if written("*.safetensors") else None,
        "checkpoints": ", ".join(map(str, checkpoints)),
        "metrics": ", ".join(str(path) for path in written("*.json") if path.name not in NO_METRICS),
        "figures": ", ".join(map(str, written("*.png"))),
        "model card": ", ".join(map(str, written(CARD))),
        "curves": curves,
    }
    return [f"{name + ':':<13}{place}" for name, place in places.items() if place]
