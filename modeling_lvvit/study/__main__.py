"""Trains with and without token labels over several seeds at equal budget, and says what the labels are worth.

    lvvit study --quick                                   embedded data, a few minutes on two CPU cores
    lvvit study                                           embedded data, about 21 minutes on two CPU cores
    lvvit study --dataset_name DATA --token_labels LABELS --variant lvvit_t_224 --num_train_epochs 30
    lvvit study cifar10 --dataset_name FOLDER --arms token_labels plain_labels "half=--dense_weight 0.5"

Recipes of `lvvit train` come first; its options may stand between those of the study. They hold for all runs. Written to --output_dir: a
folder for each run, study.md (the table), study.json, and curves.png. Started again, it goes on where it was stopped.
"""

import itertools
import math
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.hf_argparser import HfArg

from ..cli import digit_scenes
from ..cli.model_arguments import ModelArguments
from ..cli.parser import EMBEDDED_RECIPE, TRAIN_TL
from ..console import end_interrupted, program, progress_bar
from ..data.files.folder_lock import FolderLock
from ..launching import name_options, num_cpu_cores
from ..options import Program
from .arms import ARMS, Arm, check_options, parse_arm
from .report import ArmResults, save_report, seed_table, verdict
from .runs import Run, RunError, Runner


STUDY_RECIPE, QUICK_RECIPE = "study", "quick_study"
QUICK_RUN_SECONDS, SCENES_SECONDS = 45, 60  # of one CPU core for a quick run; of two for the scenes


@dataclass
class StudyArguments:
    """Options of the program; those of the training are not among them."""

    quick: bool = HfArg(
        default=False,
        help="A small study on the embedded data, a few minutes on two CPU cores: tokens against plain labels.",
    )
    arms: list[str] | None = HfArg(
        default=None,
        help=f"Of {', '.join(ARMS)}, or 'NAME=--option value'; the first is what the others are compared with; default: these, in a "
        "quick study the first two.",
    )
    seeds: list[int] | None = HfArg(
        default=None, help="Of the runs of each arm; default: 0 to 4, in a quick study 0 to 3."
    )
    output_dir: str | None = HfArg(default=None, help="Default: outputs/study, of a quick study outputs/quick_study.")
    metric: str = HfArg(default="eval_accuracy", help="What is compared.")
    jobs: int | None = HfArg(default=None, help="Runs at a time; default: one for each CPU core, with a GPU 1.")
    launcher: str | None = HfArg(default=None, help="Command before the training program; default: this Python.")

    def __post_init__(self):
        self.arms = self.arms or list(ARMS)[: 2 if self.quick else None]
        self.seeds = self.seeds or list(range(4 if self.quick else 5))
        self.output_dir = self.output_dir or ("outputs/quick_study" if self.quick else "outputs/study")

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.output_dir)


@dataclass(frozen=True)
class StudyProgram(Program):
    """A program that passes on options of the training, and recipes."""

    def split(self, words: list[str]) -> tuple[StudyArguments, tuple[str, ...]]:
        """Its own options, and the words for the training; an `OptionError` if neither takes an option."""
        args, rest = self.parser().parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        options = itertools.dropwhile(lambda word: not word.startswith("-"), rest)
        _, unknown = TRAIN_TL.given_options(list(options))
        self.check_unknown(unknown, TRAIN_TL.types)
        return args, tuple(rest)

    def message(self, error: object) -> str:
        """As in `Program`, with the options of the training too."""
        return f"{self.name}: {name_options(error, *self.arguments, *TRAIN_TL.arguments)}"

    @property
    def usage(self) -> str:
        """How it is called."""
        return f"{self.name} [RECIPE ...] [--option value ...] [option of lvvit train ...]"


PROGRAM = StudyProgram("lvvit study", __doc__, (StudyArguments,))


def plan(args: StudyArguments, shared: tuple[str, ...]) -> tuple[list[Arm], list[Run]]:
    """Arms, and all runs, seed by seed; a `ValueError` if something is wrong with the options."""
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, got {args.jobs}.")
    check_options(shared)
    arms = [parse_arm(text) for text in args.arms]
    for name, values in (("`arms`", [arm.name for arm in arms]), ("`seeds`", args.seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{name} names something twice: {' '.join(map(str, values))}.")
    has_recipe = bool(shared) and not shared[0].startswith("-")
    given, _ = TRAIN_TL.given_options(list(shared))
    if not has_recipe and "dataset_name" not in given:
        if chosen := sorted(given.keys() & set(ModelArguments.alternatives)):
            raise ValueError(
                f"The embedded study has a model of its own: give `dataset_name` or a recipe with `{chosen[0]}`."
            )
        shared = (QUICK_RECIPE if args.quick else STUDY_RECIPE, *shared)
    elif args.quick:
        raise ValueError("A `quick` study has data of its own: leave out the recipe and `dataset_name`.")
    runs = [Run(arm, seed, args.folder / arm.name / f"seed_{seed}", shared) for seed in args.seeds for arm in arms]
    for run in runs[: len(arms)]:
        _ = run.settings  # raises if they are wrong
    for run in runs:
        run.read_record()
    return arms, runs


def _stop(number: int, frame: object) -> None:
    print(f"{PROGRAM.name}: stopped; the same command goes on from here.", file=sys.stderr, flush=True)
    sys.exit(128 + number)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, _stop)  # so that the runs are ended too
    try:
        with PROGRAM.refusals(RunError, StrictDataclassError):
            args, shared = PROGRAM.split(arguments)
            arms, runs = plan(args, shared)
            run_study(args, arms, runs)
    except KeyboardInterrupt:
        end_interrupted(f"{PROGRAM.name}: interrupted; the same command goes on from here.")
    print(f"saved to {args.folder}")


def run_study(args: StudyArguments, arms: list[Arm], runs: list[Run]) -> None:
    """Makes the runs that are missing, and the report."""
    has_gpu = torch.accelerator.is_available()
    missing = sum(not run.is_finished() for run in runs)
    jobs = args.jobs or (1 if has_gpu else max(1, min(num_cpu_cores(), missing)))
    threads = None if has_gpu else max(1, num_cpu_cores() // jobs)
    runner = Runner(jobs, threads, shlex.split(args.launcher) if args.launcher else (sys.executable,))
    results = {arm: ArmResults(arm) for arm in arms}
    print(f"{len(runs)} runs, {jobs} at a time, of lvvit train {shlex.join(runs[0].options)}", flush=True)
    if args.quick and not has_gpu:
        print(quick_duration(missing, jobs), flush=True)
    with FolderLock(args.folder), progress_bar(total=len(runs), desc="Study", unit="run") as bar:
        if runs[0].settings["dataset_name"] in ("None", EMBEDDED_RECIPE):
            digit_scenes.build_or_reuse()  # before the runs, of which each would draw the scenes
        for run in runner.run_all(runs):
            results[run.arm].add(run, args.metric)
            bar.set_postfix_str(f"{run.arm.name}, seed {run.seed}: {results[run.arm].finals[run.seed]:.3f}")
            bar.update()
    arms_results = list(results.values())
    table = save_report(args.folder, arms_results, args.metric, runs[0].options)
    print(f"{seed_table(arms_results, args.metric)}\n{verdict(arms_results, args.metric)}" if args.quick else table)


def quick_duration(num_runs: int, jobs: int) -> str:
    """About how long so many runs of the quick study take, and before them the scenes where they are not drawn yet."""
    seconds = QUICK_RUN_SECONDS * math.ceil(num_runs / jobs)
    if num_runs and not digit_scenes.cache_folder().is_dir():
        seconds += SCENES_SECONDS
    return f"about {seconds / 60:.0f} minutes on {jobs} CPU cores that have nothing else to do"


if __name__ == "__main__":
    main(sys.argv[1:])
