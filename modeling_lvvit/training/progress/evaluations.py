"""The evaluations of a training run as a table that grows."""

from collections.abc import Iterable
from typing import Any

from transformers import TrainerState, TrainingArguments


PREFIX = "eval_"
RAW = "raw_"  # of the weights themselves, next to their average
# end of a metric's name -> heading; those in percent are shares. A longer one comes before one that it ends in.
HEADINGS = {
    "top5_accuracy": "top-5 %",
    "pixel_accuracy": "pixel accuracy %",
    "mean_accuracy": "mean accuracy %",
    "mean_iou": "mean IoU %",
    "accuracy": "top-1 %",
    "loss": "loss",
}
CHOOSING = ("accuracy", "mean_iou", "loss")  # which one says what is best, where no option does
NO_METRICS = ("runtime", "_per_second", "_classes", "epoch")
MIN_WIDTH = 8


class EvaluationTable:
    """Collects the metrics of an evaluation, which come in several logs with a weight average, and writes them as a row."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        """Begins a table."""
        self.metrics: dict[str, Any] = {}
        self.headings: list[str] = []  # of the rows above

    def add(self, logs: dict[str, Any]) -> None:
        """Adds a log."""
        self.metrics |= logs

    def take(self) -> dict[str, Any]:
        """What was added, that of the raw weights last; begins again."""
        metrics, self.metrics = self.metrics, {}
        return dict(sorted(metrics.items(), key=lambda item: item[0].startswith(PREFIX + RAW)))

    @staticmethod
    def choosing_metric(args: TrainingArguments, state: TrainerState) -> str | None:
        """Which metric, with its prefix, says whether an evaluation is the best; `None` if none can tell."""
        chosen = [args.metric_for_best_model] if args.metric_for_best_model else CHOOSING
        names = (f"{PREFIX}{metric.removeprefix(PREFIX)}" for metric in chosen)
        return next((name for name in names if any(name in log for log in state.log_history)), None)

    @classmethod
    def is_best(cls, args: TrainingArguments, state: TrainerState) -> bool | None:
        """Whether the last evaluation is better than all before, also before the run was resumed; `None` if no metric can tell."""
        name = cls.choosing_metric(args, state)
        if name is None:
            return None
        *before, last = (log[name] for log in state.log_history if name in log)
        is_higher_better = not name.endswith("loss")
        return all(last > value if is_higher_better else last < value for value in before)

    def lines(self, state: TrainerState, metrics: dict[str, Any], best_by: str | None) -> list[str]:
        """The row of an evaluation, below a heading if that has changed; `best_by` is the metric by which it is the best so far."""
        cells = {"epoch": f"{state.epoch or 0:.4g}", "step": f"{state.global_step:,}"}
        for name, value in metrics.items():
            if not name.endswith(NO_METRICS):
                heading, is_share = metric_heading(name.removeprefix(PREFIX))
                cells[heading] = f"{100 * value:.2f}" if is_share else f"{value:.4g}"
        widths = [max(MIN_WIDTH, len(heading)) for heading in cells]
        lines, headings = [], list(cells)
        if headings != self.headings:
            lines, self.headings = [aligned(headings, widths)], headings
        mark = "" if best_by is None else f"  best by {metric_heading(best_by.removeprefix(PREFIX))[0]}"
        return [*lines, aligned(cells.values(), widths) + mark]


def metric_heading(name: str) -> tuple[str, bool]:
    """Heading of a metric, and whether it is a share that is shown in percent. What stands before the name, of raw weights or of one of
    several test sets, stays."""
    if name.startswith(RAW):
        name = name.replace(RAW, "raw_weights_", 1)
    for end, heading in HEADINGS.items():
        if name == end or name.endswith(f"_{end}"):
            before = name.removesuffix(end).replace("_", " ")
            return before + heading, heading.endswith("%")
    return name.replace("_", " "), False


def aligned(cells: Iterable[str], widths: Iterable[int]) -> str:
    """Cells in columns, to the right."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths))
