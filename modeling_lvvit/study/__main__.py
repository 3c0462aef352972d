"""Trains with and without token labels over several seeds at equal budget, and says what the labels are worth.

    python -m modeling_lvvit.study                                             embedded data, about 21 minutes on two CPU cores
    python -m modeling_lvvit.study --dataset_name DATA --token_labels LABELS --variant lvvit_t_224 --num_train_epochs 30
    python -m modeling_lvvit.study cifar10 --dataset_name FOLDER --arms token_labels plain_labels "half=--dense_weight 0.5"

Recipes of train_tl.py come first; its options may stand between those of the study. They hold for all runs. Written to --output_dir: a
folder for each run, study.md (the table), study.json, and curves.png. Started again, it goes on where it was stopped.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub.errors import StrictDataclassError

from ..cli.model_arguments import ModelArguments
from ..cli.parser import TRAIN_TL
from ..console import end_interrupted, program, progress_bar
from ..launching import name_options, num_cpu_cores
from .arms import ARMS, Arm, check_options, parse_arm
from .report import ArmResults, save_report
from .runs import PROGRAM, Run, RunError, Runner


MODULE = "modeling_lvvit.study"
EMBEDDED_RECIPE, LOCK = "study", ".lock"


def parser() -> argparse.ArgumentParser:
    """Options of the program."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        usage=f"python -m {MODULE} [RECIPE ...] [--option value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ", ".join(ARMS)
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(ARMS),
        metavar="ARM",
        help=f"of {names}, or 'NAME=--option value'; the first is what the others are compared with; default: these",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 to 4")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"), help="default: %(default)s")
    parser.add_argument("--metric", default="eval_accuracy", help="what is compared; default: %(default)s")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: one for each CPU core, with a GPU 1")
    parser.add_argument("--launcher", help="stands before train_tl.py; default: this Python")
    return parser


def plan(args: argparse.Namespace, shared: tuple[str, ...]) -> tuple[list[Arm], list[Run]]:
    """Arms, and all runs, seed by seed; a `ValueError` if something is wrong with the options."""
    if not PROGRAM.is_file():
        raise ValueError(f"The study starts {PROGRAM.name}, which is not at {PROGRAM}: run it from a checkout.")
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
        shared = (EMBEDDED_RECIPE, *shared)
    runs = [Run(arm, seed, args.output_dir / arm.name / f"seed_{seed}", shared) for seed in args.seeds for arm in arms]
    for run in runs[: len(arms)]:
        _ = run.settings  # raises if they are wrong
    for run in runs:
        run.read_record()
    return arms, runs


def _stop(number: int, frame: object) -> None:
    sys.exit(f"{MODULE}: stopped; the same command goes on from here.")


@program(MODULE)
def main(arguments: list[str]) -> None:
    args, shared = parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, _stop)  # so that the runs are ended too
    has_gpu = torch.accelerator.is_available()
    try:
        arms, runs = plan(args, tuple(shared))
        missing = sum(not run.is_finished() for run in runs)
        jobs = args.jobs or (1 if has_gpu else max(1, min(num_cpu_cores(), missing)))
        threads = None if has_gpu else max(1, num_cpu_cores() // jobs)
        runner = Runner(jobs, threads, shlex.split(args.launcher) if args.launcher else (sys.executable,))
        results = {arm: ArmResults(arm) for arm in arms}
        print(f"{len(runs)} runs, {jobs} at a time, of train_tl.py {shlex.join(runs[0].options)}", flush=True)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(args.output_dir / LOCK, timeout=0),
            progress_bar(total=len(runs), desc="Study", unit="run") as bar,
        ):
            for run in runner.run_all(runs):
                results[run.arm].add(run, args.metric)
                bar.set_postfix_str(f"{run.arm.name}, seed {run.seed}: {results[run.arm].finals[run.seed]:.3f}")
                bar.update()
        print(save_report(args.output_dir, list(results.values()), args.metric, runs[0].options))
    except Timeout:
        sys.exit(f"{MODULE}: another study writes to {args.output_dir}.")
    except (ValueError, OSError, RunError, StrictDataclassError) as error:
        sys.exit(f"{MODULE}: {name_options(error, *vars(args), *TRAIN_TL.arguments)}")
    except KeyboardInterrupt:
        end_interrupted(f"{MODULE}: interrupted; the same command goes on from here.")
    print(f"saved to {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
