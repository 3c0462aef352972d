"""The figure of predictions in TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback


NUM_IMAGES = 4
TAG = "predictions"


def tensorboard_callback(trainer: Trainer) -> TensorBoardCallback | None:
    """The callback of a Trainer that logs to TensorBoard; `None` if none does."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, TensorBoardCallback)), None)


class PredictionFigure(TrainerCallback):
    """Shows the predictions for a few images at each evaluation of a training run in TensorBoard; does nothing without that.

    Args:
        draw: Writes the figure of so many images, the same ones each time, to a file. A model whose weights are sharded needs all
            processes; else only the main one draws.
    """

    def __init__(self, trainer: Trainer, draw: Callable[[Path, int], object]):
        self.trainer, self.draw = trainer, draw

    def on_evaluate(self, args, state, control, **kwargs):
        is_main, board = state.is_world_process_zero, tensorboard_callback(self.trainer)
        if board is None or not self.trainer.is_in_train or not (is_main or self.trainer.is_fsdp_enabled):
            return
        with TemporaryDirectory() as folder:
            path = Path(folder) / "predictions.png"
            self.draw(path, NUM_IMAGES)
            if is_main and board.tb_writer is not None and path.exists():  # a plain run has no predictions to show
                pixels = np.asarray(Image.open(path).convert("RGB"))
                board.tb_writer.add_image(TAG, pixels, state.global_step, dataformats="HWC")
