"""Stops a run whose loss or weights are no longer finite, in all processes after the same step, before anything of it is saved."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from ..finite import NotFiniteError, finite_flags, listed
from .base_arguments import BaseImageTrainingArguments
from .checkpoints.whole import last_whole_checkpoint


# steps that the gradient scaler of float16 may leave out one after the other where a loss is not finite; where only gradients
# overflow, which a smaller scale mends, the loss stays finite
MAX_SKIPPED_STEPS = 8


class DivergenceError(NotFiniteError):
    """Training diverged; raised in all processes after the same step."""


class DivergenceCheck(TrainerCallback):
    """Finds losses, weights and averages that are NaN or infinite.

    Losses are looked at when they are logged, which waits for the device anyway, weights before the first step, before each
    evaluation and before they are saved. A step that the gradient scaler of float16 leaves out is no failure.
    """

    def __init__(self, accelerator: Accelerator, args: BaseImageTrainingArguments):
        self.accelerator, self.args = accelerator, args
        self.skipped_steps = 0  # one after the other, up to now

    def on_step_end(self, args, state, control, **kwargs):
        is_skipped = self.accelerator.optimizer_step_was_skipped
        self.skipped_steps = self.skipped_steps + 1 if is_skipped else 0

    def check_loss(self, loss: float, weights: Iterable[tuple[str, torch.Tensor]], state: TrainerState) -> None:
        """Raises a `DivergenceError` if a mean loss since the last log, the same in all processes, says that training diverged.

        Args:
            loss: One that is not finite is a failure; with a gradient scaler only if that has left out the last steps, or weights are
                not finite.
            weights: See `check_weights`.
        """
        is_finite = math.isfinite(loss)
        if is_finite and not self.args.logging_nan_inf_filter:  # which hides such losses
            return
        bad = self._bad_tensors(weights)
        is_tolerated = self.accelerator.scaler is not None and self.skipped_steps < MAX_SKIPPED_STEPS
        if bad or not (is_finite or is_tolerated):
            self._fail("weights are not finite" if is_finite else f"the loss is {loss}", bad, state)

    def check_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], state: TrainerState, of_all_processes: bool = True
    ) -> None:
        """Raises a `DivergenceError` if tensors are not finite.

        Args:
            weights: By name; those of this process, or its shards of them.
            of_all_processes: Whether those of the other processes count too; all must call it then.
        """
        if bad := self._bad_tensors(weights, of_all_processes):
            self._fail("weights are not finite", bad, state)

    def _bad_tensors(self, tensors: Iterable[tuple[str, torch.Tensor]], of_all_processes: bool = True) -> list[str]:
        local = ((name, tensor.to_local() if isinstance(tensor, DTensor) else tensor) for name, tensor in tensors)
        names, flags = finite_flags(local)
        counts = (~flags).to(self.accelerator.device, torch.int32)
        if of_all_processes and distributed.is_available() and distributed.is_initialized():
            counts = self.accelerator.reduce(counts, reduction="sum")
        return [name for name, count in zip(names, counts.tolist()) if count]

    def _fail(self, what: str, bad: list[str], state: TrainerState) -> None:
        args = self.args
        where = f" (NaN or infinite: {listed(bad)})" if bad else ""
        if not state.global_step:
            raise DivergenceError(f"Before the first step {what}{where}: start from other weights.")
        advice = f"Try a smaller `learning_rate` (it is {args.learning_rate:g}), a longer warm-up"
        advice += "" if args.max_grad_norm else " or gradient clipping (`max_grad_norm` 1)"
        advice += ", or bf16 instead of `fp16`" if args.fp16 else ""
        checkpoint = last_whole_checkpoint(Path(args.output_dir))
        start = "There is no checkpoint yet: begin again."
        if checkpoint is not None:
            start = (
                f"The last checkpoint with finite weights is {checkpoint}: begin again, or start a new run from it with "
                "`model_name_or_path` and another `output_dir` (continued, it would keep its learning rate)."
            )
        raise DivergenceError(
            f"Training diverged: {what} at step {state.global_step:,}{where}. Nothing of it was saved. {advice}. {start}"
        )
