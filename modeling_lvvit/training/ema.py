"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging

from .schedule import scaled_ema_decay


logger = logging.get_logger(__name__)
EMA_FILE = "ema.safetensors"
COUNT = "n_averaged"


class EMACallback(TrainerCallback):
    """Averages weights and batch-norm statistics after every optimizer step; the first step starts the average.

    Each checkpoint keeps the average in `ema.safetensors` next to the raw weights (`save`), so that a resumed run goes on
    with both. At the end of training the average is copied into the model. Sharded weights stay sharded.

    Args:
        decay: Weight of the old average, in (0, 1).
        is_base: Whether that is the decay for 1024 images a step, to be scaled (`schedule.scaled_ema_decay`).
    """

    def __init__(self, decay: float, is_base: bool = False):
        self.decay, self.is_base = decay, is_base
        self.average: dict[str, torch.Tensor] | None = None
        self.checkpoint: str | None = None  # where a resumed run goes on from
        self.count = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._model = getattr(model, "_orig_mod", model)  # under FSDP a compiled model comes wrapped
        self._live = self._tensors_of_model()
        self.average, self.count = {name: tensor.clone() for name, tensor in self._live.items()}, 0
        self.effective_decay = self.decay
        if self.is_base:
            self.effective_decay = scaled_ema_decay(self.decay, args.images_per_step, state.max_steps)
        if state.is_world_process_zero and self.effective_decay != self.decay:
            tqdm.write(  # above the bar
                f"weight average: decay {self.effective_decay:.6g} for {state.max_steps:,} steps of {args.images_per_step:,} "
                f"images (base {self.decay:g} for 1,024 images a step)"
            )
        if state.global_step:
            path = Path(self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}") / EMA_FILE
            if path.is_file():
                self._load(path)
            else:
                logger.warning("The checkpoint has no %s: the weight average starts again from its weights.", EMA_FILE)

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        floats = [name for name, tensor in self._live.items() if self.count and tensor.is_floating_point()]
        if floats:
            old, new = ([_shard(tensors[name]) for name in floats] for tensors in (self.average, self._live))
            torch._foreach_lerp_(old, new, 1 - self.effective_decay)
        for name in self._live.keys() - set(floats):
            self.average[name].copy_(self._live[name])
        self.count += 1

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint) / EMA_FILE
            if best.is_file():
                self._load(best)
            else:
                logger.warning("The best checkpoint has no %s: its raw weights are kept.", EMA_FILE)
                self.average = None
        if self.average is not None:
            _copy(self.average, self._tensors_of_model())
        self.average = self._live = self._model = None

    def save(self, folder: str | Path, is_writer: bool) -> None:
        """Writes the average, in one process; every process must call it, because sharded weights are collected."""
        tensors = {name: _whole(tensor).cpu().contiguous() for name, tensor in self.average.items()}
        if is_writer:
            save_file({**tensors, COUNT: torch.tensor(self.count)}, Path(folder) / EMA_FILE)

    @contextmanager
    def average_in_model(self) -> Iterator[None]:
        """Puts the average into the model for the duration of a `with` block; does nothing outside training."""
        if self.average is None:
            yield
            return
        raw = {name: tensor.clone() for name, tensor in self._tensors_of_model().items()}
        _copy(self.average, self._live)
        try:
            yield
        finally:
            _copy(raw, self._tensors_of_model())

    def _tensors_of_model(self) -> dict[str, torch.Tensor]:
        """Weights and buffers, not copied. Asking again makes FSDP drop the whole copies that it kept of an evaluation."""
        return {name: tensor.detach() for name, tensor in self._model.state_dict().items()}

    def _load(self, path: Path) -> None:
        tensors = load_file(path)
        self.count = int(tensors.pop(COUNT))
        if tensors.keys() != self.average.keys():
            raise ValueError(
                f"{path} holds other weights than the model: {sorted(tensors.keys() ^ self.average.keys())}."
            )
        _copy(tensors, self.average)


def _shard(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        value = source[name]
        if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
            value = value.to(tensor.device)
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)
