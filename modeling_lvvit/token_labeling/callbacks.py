"""Exponential moving average of the weights."""

import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)
EMA_FILE = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages weights and batch-norm statistics after every optimiser step.

    Each checkpoint keeps the average in `ema.safetensors` beside the raw weights, so that a resumed run goes on with
    both. At the end of training the average is copied into the model.

    Args:
        decay: Weight of the old average, in (0, 1).
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: AveragedModel | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True)
        self.average.requires_grad_(False)
        if state.global_step:
            self._restore(args, state.global_step)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.average.update_parameters(model)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            target = Path(args.output_dir) / f"checkpoint-{state.global_step}" / EMA_FILE
            partial = target.with_suffix(".partial")
            save_file(self._tensors(), partial)
            os.replace(partial, target)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        average, self.average = self.average, None
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint) / EMA_FILE
            if not best.is_file():
                logger.warning("The best checkpoint has no %s: its raw weights are kept.", EMA_FILE)
                return
            self._load(best, average)
        self._copy(average.module, model)

    @contextmanager
    def average_in(self, model: torch.nn.Module):
        """Puts the average into `model` for the duration of a `with` block; does nothing outside training."""
        if self.average is None:
            yield
            return
        raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self._copy(self.average.module, model)
        try:
            yield
        finally:
            model.load_state_dict(raw)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.contiguous() for name, tensor in self.average.module.state_dict().items()}
        return {**tensors, "n_averaged": self.average.n_averaged}

    def _restore(self, args, step: int):
        folders = [Path(args.output_dir) / f"checkpoint-{step}"]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        found = next((folder / EMA_FILE for folder in folders if (folder / EMA_FILE).is_file()), None)
        if found is None:
            logger.warning("The checkpoint has no %s: the weight average starts anew from its weights.", EMA_FILE)
            return
        self._load(found, self.average)

    @staticmethod
    def _load(path: Path, average: AveragedModel):
        tensors = load_file(path)
        average.n_averaged.copy_(tensors.pop("n_averaged"))
        average.module.load_state_dict(tensors)

    @staticmethod
    def _copy(source: torch.nn.Module, target: torch.nn.Module):
        target.load_state_dict(source.state_dict())
