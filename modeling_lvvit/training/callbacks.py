"""What happens next to the steps of training: seeds of an epoch, and stopping when the machine is taken away."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from ..data.image_dataset import ImageDataset
from ..launching import stop_launcher


# Processes agree on stopping by a collective operation, which waits for the device: not at every step.
STEPS_BETWEEN_AGREEMENTS = 8
SECONDS_BETWEEN_INTERRUPTS = 1.0  # one Ctrl-C can arrive twice, from the terminal and from a launcher
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class EpochCallback(TrainerCallback):
    """Tells a dataset which epoch begins. The order of its rows comes from accelerate's `SeedableRandomSampler`, which is told by its loader."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.start_epoch(args.data_seed, int(state.epoch or 0))


class StopOnSignal(TrainerCallback):
    """On SIGTERM (preemption) or Ctrl-C: finishes the step, saves a checkpoint and ends training.

    Further SIGTERMs change nothing: launchers pass on what schedulers have already sent. A second Ctrl-C interrupts at once.
    With several processes all stop after the same step, within eight steps. A signal during an evaluation counts after it.

    Attributes:
        received: Name of the signal that ended training, `None` if none did.
        is_stopping: Whether training is being ended.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: str | None = None
        self.is_stopping = False
        self._handlers: dict[int, Any] = {}
        self._received_at = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.received, self.is_stopping = None, False
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        is_repeated = self.received is not None and time.monotonic() - self._received_at > SECONDS_BETWEEN_INTERRUPTS
        if number == signal.SIGINT and is_repeated:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        is_due = self.accelerator.num_processes == 1 or state.global_step % STEPS_BETWEEN_AGREEMENTS == 0
        if is_due and self._all_should_stop():
            self._stop(control)
            control.should_evaluate = False

    def on_evaluate(self, args, state, control, **kwargs):
        if self._handlers and not self.is_stopping and self._all_should_stop():
            self._stop(control)

    def _stop(self, control) -> None:
        self.is_stopping = True
        self.received = self.received or "the signal of another process"
        control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.is_stopping:  # the checkpoint is written; the epoch is not over
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.restore_handlers()
        if not self.is_stopping:  # it came after the last step: nothing was left undone
            self.received = None

    def restore_handlers(self) -> None:
        """Gives the signals their earlier meaning back; does nothing when that is done."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def _all_should_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.received is not None
        if self.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()


def end_after_signal(trainer: Trainer) -> NoReturn:
    """Ends the program of a trainer with `stop_on_signal` after a signal, with the status that shells give to one that the signal ended."""
    if trainer.is_world_process_zero():
        print(
            f"stopped by {trainer.stop_on_signal.received} after step {trainer.state.global_step:,} of "
            f"{trainer.state.max_steps:,}; the same command with --resume_from_checkpoint last goes on from there",
            file=sys.stderr,
        )
    is_interrupted = trainer.stop_on_signal.received == "SIGINT"
    if is_interrupted:
        stop_launcher()
    sys.exit(128 + (signal.SIGINT if is_interrupted else signal.SIGTERM))


def leave_signals_to_main_process(loader: DataLoader) -> DataLoader:
    """Lets the workers of a loader ignore stop signals, which schedulers send to all processes: they end with the main one."""
    inner = getattr(loader, "base_dataloader", loader)
    inner.worker_init_fn = partial(_ignore_signals, inner.worker_init_fn)
    return loader


def _ignore_signals(then: Callable[[int], Any] | None, worker_id: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker_id)
