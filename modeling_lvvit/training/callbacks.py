"""What happens next to the steps of training: seeds of an epoch, and stopping: early, and when the machine is taken away."""

import gc
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

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


def choose_early_stopping_schedule(args: TrainingArguments) -> dict[str, object]:
    """Fields that early stopping needs to have other values than the defaults that they have: the best checkpoint is loaded at the
    end, and every evaluation has a checkpoint, each epoch unless steps were given.

    Raises:
        ValueError: If strategies or steps that were given contradict that.
    """
    chosen: dict[str, object] = {} if args.load_best_model_at_end else {"load_best_model_at_end": True}
    evaluates, saves = (str(getattr(value, "value", value)) for value in (args.eval_strategy, args.save_strategy))
    if saves == "no":
        raise ValueError(
            "`early_stopping_patience` keeps the best checkpoint, and `save_strategy` no writes none: leave it out, or choose best."
        )
    are_save_steps_given = saves == "steps" and args.save_steps != TrainingArguments.save_steps
    if evaluates == "no":
        evaluates = "steps" if args.eval_steps is not None or are_save_steps_given else "epoch"
        chosen["eval_strategy"] = evaluates
    if saves == "best":
        return chosen
    if evaluates == "epoch" and saves == "steps":
        if are_save_steps_given:
            raise ValueError(
                f"With `early_stopping_patience` every evaluation needs a checkpoint: `save_steps` {args.save_steps:g} and `eval_strategy` "
                "epoch do not fit. Leave one of them out, or use `save_strategy` epoch or best."
            )
        chosen["save_strategy"] = "epoch"
    if evaluates == "steps":
        if saves == "epoch":
            raise ValueError(
                "With `early_stopping_patience` every evaluation needs a checkpoint: `save_strategy` epoch and evaluations between epochs "
                "do not fit. Use `eval_strategy` epoch, or `save_strategy` steps or best."
            )
        steps = args.save_steps if args.eval_steps is None else args.eval_steps
        if args.eval_steps is None:
            chosen["eval_steps"] = steps
        if args.save_steps != steps and are_save_steps_given:
            raise ValueError(
                f"With `early_stopping_patience` every evaluation needs a checkpoint: `save_steps` {args.save_steps:g} and `eval_steps` "
                f"{steps:g} differ. Leave one of them out, or use `save_strategy` best."
            )
        if args.save_steps != steps:
            chosen["save_steps"] = steps
    return chosen


class EarlyStopping(EarlyStoppingCallback):
    """`EarlyStoppingCallback` of transformers that goes on where a continued run was: the number of evaluations without a better
    value is kept in `trainer_state.json` of every checkpoint.

    Attributes:
        has_stopped: Whether it ended training.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0):
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.has_stopped = self._is_training = False

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._is_training = True
        stored = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        counter = stored["attributes"]["early_stopping_patience_counter"] if stored else 0
        self.early_stopping_patience_counter = counter
        state.stateful_callbacks[type(self).__name__] = self.state()  # also in a run that was started without it
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():  # the folder of the run was moved
            state.best_model_checkpoint = str(best)
        self._stop_if_due(control)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self._is_training:
            super().on_evaluate(args, state, control, metrics, **kwargs)
            self._stop_if_due(control)

    def on_train_end(self, args, state, control, **kwargs):
        self._is_training = False

    def _stop_if_due(self, control) -> None:
        self.has_stopped = self.early_stopping_patience_counter >= self.early_stopping_patience
        control.should_training_stop |= self.has_stopped


def describe_best(state: TrainerState, args: TrainingArguments, stopping: EarlyStopping | None) -> str | None:
    """How a run ended that keeps its best checkpoint, and which that is, in a line; `None` where it keeps none."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    name = args.metric_for_best_model.removeprefix("eval_")
    best = f"best: step {state.best_global_step:,} ({name} {state.best_metric:.4g}), whose weights are the result"
    if stopping is None:
        return best
    patience = stopping.early_stopping_patience
    if not stopping.has_stopped:
        return f"early stopping: not needed within {state.global_step:,} steps; {best}"
    evaluations = "the last evaluation was" if patience == 1 else f"the last {patience} evaluations were"
    threshold = f" by more than {args.early_stopping_threshold:g}" if args.early_stopping_threshold else ""
    return f"early stopping: ended after step {state.global_step:,} of {state.max_steps:,}, as {evaluations} not better{threshold}; {best}"


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
            if args.metric_for_best_model is None:  # else a continued run would lack this evaluation
                control.should_evaluate = False

    def on_evaluate(self, args, state, control, **kwargs):
        if self._handlers and not self.is_stopping and self._all_should_stop():
            self._stop(control)

    def _stop(self, control) -> None:
        self.is_stopping = True
        self.received = self.received or "the signal of another process"
        control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        is_over = float(state.epoch or 0.5).is_integer() and args.metric_for_best_model is not None
        if self.is_stopping and not is_over:  # the checkpoint is written; a continued run goes on in this epoch
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
    stop_launcher()
    gc.freeze()  # else Python looks through all objects once more, for up to seconds that a stopped process may not have
    sys.exit(128 + (signal.SIGINT if trainer.stop_on_signal.received == "SIGINT" else signal.SIGTERM))
