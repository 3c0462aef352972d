"""What happens beside the steps of training: seeds of an epoch, and stopping when the machine is taken away."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback


# Processes agree on stopping by a collective operation, which waits for the device: not at every step.
STEPS_BETWEEN_AGREEMENTS = 8
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EpochSampler(Sampler[int]):
    """Rows in an order that hangs on seed and epoch alone, so that a resumed epoch goes on in the same order.

    Args:
        num_rows: Rows of the data set.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.seed, self.epoch = 0, 0

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Sets the order of the coming epoch."""
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.num_rows, generator=generator).tolist()


class EpochCallback(TrainerCallback):
    """Tells data set and sampler which epoch begins.

    Args:
        parts: Objects with `start_epoch(seed, epoch)`.
    """

    def __init__(self, *parts: Any):
        self.parts = parts

    def on_epoch_begin(self, args, state, control, **kwargs):
        for part in self.parts:
            part.start_epoch(args.data_seed, int(state.epoch or 0))


class StopOnSignal(TrainerCallback):
    """On SIGTERM (pre-emption) or Ctrl-C: finishes the step, saves a checkpoint and ends training.

    A second signal of the kind has its usual effect. With several processes all stop after the same step, within eight steps.

    Args:
        accelerator: For the agreement between processes.

    Attributes:
        received: Name of the signal that ended training, `None` if none did.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: str | None = None
        self._handlers: dict[int, Any] = {}
        self._is_stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.received, self._is_stopping = None, False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._handlers[number])

    def on_step_end(self, args, state, control, **kwargs):
        if self._should_stop(state.global_step):
            self._is_stopping = True
            self.received = self.received or "the signal of another process"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._is_stopping:  # the checkpoint is written; the epoch is not over
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if not self._is_stopping:  # it came after the last step: nothing was left undone
            self.received = None

    def _should_stop(self, step: int) -> bool:
        if self.accelerator.num_processes == 1:
            return self.received is not None
        if step % STEPS_BETWEEN_AGREEMENTS:
            return False
        if self.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()


def leave_signals_to_main_process(loader: DataLoader) -> None:
    """Lets the workers of a loader ignore stop signals, which schedulers send to all processes: they end with the main one."""
    loader = getattr(loader, "base_dataloader", loader)
    loader.worker_init_fn = _WorkerStart(loader.worker_init_fn)


class _WorkerStart:
    def __init__(self, then: Any):
        self.then = then

    def __call__(self, worker_id: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker_id)
