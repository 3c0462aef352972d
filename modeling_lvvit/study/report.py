"""The report of a study: the table, the record and the figure of the curves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..cli.model_card import library_versions
from ..data.files.atomic_files import write_atomically, write_json, write_text
from .arms import Arm
from .confidence_intervals import Estimate, estimate, paired_difference
from .runs import Run


TABLE, RECORD, FIGURE = "study.md", "study.json", "curves.png"
TITLES = {"eval_accuracy": "top-1", "eval_top5_accuracy": "top-5"}


@dataclass(frozen=True)
class Scale:
    """How values of a metric are written: times `factor`, with so many `decimals`."""

    factor: float
    decimals: int
    unit: str = ""

    def text(self, value: float, sign: str = "") -> str:
        """The value as it stands in tables."""
        return f"{self.factor * value:{sign}.{self.decimals}f}"


PER_CENT, PLAIN = Scale(100, 1, " (%)"), Scale(1, 4)


def metric_scale(metric: str) -> Scale:
    """Accuracies are shares, and so are the metrics of images with several classes; others may not be."""
    return PER_CENT if metric.endswith(("accuracy", "average_precision", "_f1", "exact_match")) else PLAIN


@dataclass
class ArmResults:
    """What the runs of an arm reached, by seed.

    Args:
        finals: Value of the metric at the end.
        curves: Epochs and values of the metric at every evaluation, the last one included.
        seconds: Duration of its processes, loading and evaluation included.
    """

    arm: Arm
    finals: dict[int, float] = field(default_factory=dict)
    curves: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    def add(self, run: Run, metric: str) -> None:
        """Reads a finished run; a `ValueError` if it has no such metric."""
        state = json.loads((run.folder / "trainer_state.json").read_text(encoding="utf-8"))
        entries = [entry for entry in state["log_history"] if metric in entry]
        if not entries:
            names = sorted({key for entry in state["log_history"] for key in entry if key.startswith("eval_")})
            raise ValueError(f"{run.folder} has no metric {metric}; it has {', '.join(names)}.")
        by_step = {entry["step"]: entry for entry in entries}  # the end may have been evaluated twice
        self.finals[run.seed] = entries[-1][metric]
        self.curves[run.seed] = tuple([entry[name] for entry in by_step.values()] for name in ("epoch", metric))
        self.steps[run.seed] = state["global_step"]
        self.seconds[run.seed] = run.read_record()["seconds"]

    def values(self) -> list[float]:
        """Finals in the order of the seeds."""
        return [self.finals[seed] for seed in sorted(self.finals)]


def study_table(results: Sequence[ArmResults], metric: str) -> str:
    """Markdown: a row for each arm, accuracies in per cent; `a ± b` are mean and half the 95 % interval of Student's t; differences are
    those of the first arm and this one between runs of the same seed."""
    first, scale = results[0], metric_scale(metric)
    title = TITLES.get(metric, metric)
    word = "gain" if scale == PER_CENT else "difference"
    lines = [
        f"| arm | seeds | {title} | lowest to highest | {word} of {first.arm.title} | steps | minutes a run |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results:
        values = row.values()
        gain = "" if row is first else _text(paired_difference(first.values(), values), scale, signed=True)
        steps = sorted(set(row.steps.values()))
        lines.append(
            f"| {row.arm.title} | {len(values)} | {_text(estimate(values), scale)} | {scale.text(min(values))} to {scale.text(max(values))} "
            f"| {gain} | {', '.join(map(str, steps))} | {np.mean(list(row.seconds.values())) / 60:.1f} |"
        )
    if len({steps for row in results for steps in row.steps.values()}) != 1:
        lines += ["", "**The budgets differ**: see the steps."]
    return "\n".join(lines)


def seed_table(results: Sequence[ArmResults], metric: str) -> str:
    """Markdown: each arm with its values by seed, and for each but the first how far that one is ahead."""
    first, scale = results[0], metric_scale(metric)
    seeds = sorted(first.finals)
    lines = [
        f"| {TITLES.get(metric, metric)}{scale.unit} | {' | '.join(f'seed {seed}' for seed in seeds)} | mean, 95 % interval |",
        f"| --- |{' ---: |' * (len(seeds) + 1)}",
    ]
    for row in results:
        values = " | ".join(scale.text(row.finals[seed]) for seed in seeds)
        lines.append(f"| {row.arm.title} | {values} | {_text(estimate(row.values()), scale)} |")
    for row in results[1:]:
        values = " | ".join(scale.text(first.finals[seed] - row.finals[seed], "+") for seed in seeds)
        gain = _text(paired_difference(first.values(), row.values()), scale, signed=True)
        lines.append(f"| {first.arm.title} minus {row.arm.title} | {values} | {gain} |")
    return "\n".join(lines)


def verdict(results: Sequence[ArmResults], metric: str) -> str:
    """What the first arm is worth against the second, in a sentence."""
    first, second = results[:2]
    scale, gain = metric_scale(metric), paired_difference(first.values(), second.values())
    title, points = TITLES.get(metric, metric), " points" if scale == PER_CENT else ""
    text = f"With {first.arm.title} {title} is {scale.text(abs(gain.mean))}{points} {'higher' if gain.mean >= 0 else 'lower'} "
    text += f"than with {second.arm.title}"
    if math.isnan(gain.half_width):
        return f"{text}; one seed cannot say whether that is chance."
    low, high = gain.mean - gain.half_width, gain.mean + gain.half_width
    is_clear = low > 0 or high < 0
    return (
        f"{text} (95 % interval of {len(first.finals)} pairs of runs: {scale.text(low, '+')} to {scale.text(high, '+')}): "
        + ("more than chance." if is_clear else "that may be chance, the interval includes 0.")
    )


def _text(value: Estimate, scale: Scale, signed: bool = False) -> str:
    mean = scale.text(value.mean, "+" if signed else "")
    return mean if math.isnan(value.half_width) else f"{mean} ± {scale.text(value.half_width)}"


def save_report(folder: Path, results: Sequence[ArmResults], metric: str, options: Sequence[str]) -> str:
    """Writes table, record and figure, and returns the table; with several arms their values by seed and what the first is worth follow."""
    table = study_table(results, metric)
    text = [table, seed_table(results, metric), *([verdict(results, metric)] if len(results) > 1 else [])]
    write_text(folder / TABLE, "\n\n".join(text) + "\n")
    first = results[0]
    arms = [
        {
            "name": row.arm.name,
            "options": row.arm.options,
            "values": {seed: value if math.isfinite(value) else None for seed, value in row.finals.items()},
            "steps": row.steps,
            "seconds": row.seconds,
            "estimate": _plain(estimate(row.values())),
            "gain_of_first": _plain(paired_difference(first.values(), row.values())),
        }
        for row in results
    ]
    record = {"metric": metric, "options": list(options), "arms": arms, "versions": library_versions()}
    write_json(folder / RECORD, record)
    scale = metric_scale(metric)
    save_curves(folder / FIGURE, results, TITLES.get(metric, metric) + scale.unit, scale.factor)
    return table


def _plain(value: Estimate) -> Mapping[str, Any]:
    return {name: number if math.isfinite(number) else None for name, number in asdict(value).items()}


def draw_curves(axis: Axes, results: Sequence[ArmResults], factor: float) -> None:
    """The metric times `factor` over the epochs: a thin line for each run and a thick one for their mean, or points where runs were
    evaluated once."""
    for position, row in enumerate(results):
        color = arm_color(position)
        for epochs, values in row.curves.values():
            axis.plot(epochs, factor * np.array(values), color=color, alpha=0.4, linewidth=0.8, marker=".")
        if len({tuple(epochs) for epochs, _ in row.curves.values()}) == 1:
            mean = factor * np.mean([values for _, values in row.curves.values()], axis=0)
            axis.plot(epochs, mean, color=color, linewidth=2, marker="o", markersize=5)
        axis.plot([], [], color=color, linewidth=2, marker="o", label=row.arm.title)
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def arm_color(position: int) -> tuple[float, ...]:
    """Color of an arm in the figure."""
    return matplotlib.colormaps["tab10"](position % 10)


def save_curves(path: Path, results: Sequence[ArmResults], title: str, factor: float) -> None:
    """Left the curves of `draw_curves`; right the ends with mean and interval."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    curves, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    draw_curves(curves, results, factor)
    curves.set_ylabel(title)
    for position, row in enumerate(results):
        color, values, middle = arm_color(position), factor * np.array(row.values()), estimate(row.values())
        ends.scatter(np.full(len(values), position), values, color=color, alpha=0.5, s=16)
        half = 0.0 if math.isnan(middle.half_width) else factor * middle.half_width
        ends.errorbar([position + 0.2], [factor * middle.mean], yerr=[[half], [half]], color=color, fmt="D", capsize=4)
    ends.set_xticks(range(len(results)), [row.arm.title.replace(", ", ",\n") for row in results], fontsize=8)
    ends.set_xlim(-0.5, len(results) - 0.5)
    ends.set_title("at the end: runs, mean, 95 % interval", fontsize=9)
    ends.grid(axis="y", alpha=0.3)
    write_atomically(path, FigureCanvasAgg(figure).print_png)
