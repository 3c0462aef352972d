"""The progress of a training run: one bar on a terminal, and one line for each log elsewhere."""

from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import has_length

from ...console import is_terminal
from ..throughput import Throughput
from .estimate import RunClock, describe_estimate, describe_shorter_run, describe_waiting, duration
from .evaluations import PREFIX, RAW, EvaluationTable


BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
# name in the log -> how the bar shows it
FIGURES = {
    "loss": lambda value: f"loss {value:.4g}",
    "learning_rate": lambda value: f"lr {value:.3g}",
    "images_per_second": lambda value: f"{value:,.4g} images/s",
    "data_wait": lambda value: f"data wait {value:.0%}",
}
EVALUATION_UPDATES = 20
NO_FIGURES = ("total_flos", "epoch")


def use_run_progress(trainer: Trainer, throughput: Throughput) -> "RunProgress":
    """Replaces the callbacks with which the library shows progress, and returns the new one; that of notebooks stays."""
    progress = RunProgress(throughput)
    for callback in (ProgressCallback, PrinterCallback):
        if trainer.pop_callback(callback) is not None:
            trainer.add_callback(progress)
    return progress


class RunProgress(ProgressCallback):
    """One bar with loss, learning rate, speed, waiting for data and time left, and evaluations as rows of a table above it.

    Without a terminal, or with `disable_tqdm`, lines of `key value` pairs instead: one for each log, one for each evaluation. Only the
    main process writes. Both have a line that estimates duration and memory, after the first steps and, if there are evaluations, after
    the first of them, and once a line that says what to try where training waits for data.
    """

    def __init__(self, throughput: Throughput):
        super().__init__()
        self.clock, self.table = RunClock(throughput), EvaluationTable()
        self.is_training, self.latest, self.predicted = False, {}, 0
        self.is_estimated = self.is_evaluation_estimated = self.is_raw_explained = self.is_waiting_explained = False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if not state.is_world_process_zero:
            return
        steps = len(train_dataloader) / args.gradient_accumulation_steps if has_length(train_dataloader) else None
        self.clock.start(state, steps)
        self.table.start()
        self.is_training, self.latest, self.current_step = True, {}, state.global_step
        self.is_estimated, self.is_evaluation_estimated = False, args.eval_strategy == "no"
        self.is_waiting_explained = False
        if is_terminal() and not args.disable_tqdm:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=BAR_FORMAT
            )

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.clock.step(state)
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(self.postfix(args, state), refresh=False)
            super().on_step_end(args, state, control, **kwargs)
        if state.global_step < state.max_steps:
            self.write_estimate(args, state)

    def write_estimate(self, args, state) -> None:
        """Once after the first steps, and again when an evaluation was timed for the first time."""
        has_evaluation = bool(self.clock.evaluations) and not self.is_evaluation_estimated
        if self.clock.is_measured(state) and (not self.is_estimated or has_evaluation):
            is_first = not self.is_estimated
            self.is_estimated, self.is_evaluation_estimated = True, self.is_evaluation_estimated or has_evaluation
            self.write(describe_estimate(self.clock, args, state))
            if is_first and (shorter := describe_shorter_run(self.clock, args, state)) is not None:
                self.write(shorter)

    def postfix(self, args, state) -> str:
        """What stands behind the bar."""
        seconds = self.clock.seconds_left(args, state)
        parts = [] if seconds is None else [f"{duration(seconds)} left"]
        return ", ".join(parts + [show(self.latest[name]) for name, show in FIGURES.items() if name in self.latest])

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        if self.is_training and any(name.startswith("eval_") for name in logs):
            self.table.add(logs)  # written when the evaluation is over
            return
        if "loss" in logs:
            self.latest = logs
        if self.training_bar is None:
            left = self.clock.seconds_left(args, state) if "loss" in logs else None
            self.write(as_line(state, logs, {} if left is None else {"seconds_left": round(left)}))
        elif "loss" not in logs and "train_runtime" not in logs:  # of another callback
            self.write(as_line(state, logs))
        if "loss" in logs:
            self.explain_waiting(args, state)

    def explain_waiting(self, args, state) -> None:
        """Once in a run, at the first log before which training waited much for data."""
        share = self.clock.waited_share(state)
        if share is None or self.is_waiting_explained:
            return
        line = describe_waiting(args, share)
        if line is not None:
            self.is_waiting_explained = True
            self.write(line)

    def on_evaluate(self, args, state, control, **kwargs):
        self.close_prediction_bar()
        if not state.is_world_process_zero or not self.is_training:
            return
        self.clock.is_evaluated = True
        metrics, is_best = self.table.take(), self.table.is_best(args, state)
        by = self.table.choosing_metric(args, state)
        if self.training_bar is None:
            if not self.is_raw_explained and any(name.startswith(PREFIX + RAW) for name in metrics):
                self.is_raw_explained = True
                self.write(
                    f"{PREFIX}{RAW}*: of the raw weights; the other evaluation figures are of their moving average"
                )
            best = {} if by is None else {"best": "yes" if is_best else "no", "best_by": by.removeprefix(PREFIX)}
            self.write(as_line(state, metrics, best))
        else:
            for line in self.table.lines(state, metrics, by if is_best else None):
                self.write(line)
            self.training_bar.set_postfix_str(self.postfix(args, state))  # in place of how far the evaluation was

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        batches = len(eval_dataloader)
        if self.training_bar is not None:
            self.predicted = self.predicted % batches + 1  # average and raw weights are evaluated one after the other
            if self.predicted % max(1, batches // EVALUATION_UPDATES) == 0:
                self.training_bar.set_postfix_str(f"evaluating, batch {self.predicted:,} of {batches:,}")
        elif not self.is_training and is_terminal() and not args.disable_tqdm:
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=batches, desc="evaluating", leave=False, dynamic_ncols=True)
            self.prediction_bar.update()

    def on_predict(self, args, state, control, **kwargs):
        self.close_prediction_bar()

    def close_prediction_bar(self) -> None:
        """The evaluation is over."""
        self.predicted = 0
        if self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Training is over, or was interrupted: what is written next stands below the bar."""
        self.is_training = False
        if self.training_bar is not None:
            self.training_bar.close()
        self.training_bar = None

    def write(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)


def as_line(state: TrainerState, logs: dict[str, Any], further: dict[str, Any] | None = None) -> str:
    """A log as pairs of a key and a value, all separated by spaces, beginning with the step."""
    figures = {"step": state.global_step, "steps": state.max_steps, "epoch": round(state.epoch or 0, 4)}
    figures |= {name: value for name, value in logs.items() if name not in NO_FIGURES} | (further or {})
    words = (
        f"{value:.5g}" if isinstance(value, float) else str(value).replace(" ", "_") for value in figures.values()
    )
    return " ".join(f"{name} {word}" for name, word in zip(figures, words))
