"""Measures models, training steps and loaders side by side.

    lvvit benchmark                                          # about 100 s: T and the data path
    lvvit benchmark inference original/lvvit_s_224 lvvit_s_224+deployed --batch_sizes 16 1
    lvvit benchmark training original/lvvit_t_224 lvvit_t_224 lvvit_t_224+bfloat16
    lvvit benchmark run lvvit_t_224 lvvit_t_224+plain        # steps that wait for their data
    lvvit benchmark data token_labels plain_labels timm torchvision --threads 1
    lvvit benchmark formats MODEL --exported DIR --dataset_name DATA  # a trained model in PyTorch and ONNX: speed, bytes, equal answers
    lvvit benchmark gpu --output_file gpu.json               # all about a GPU, within eight minutes
    lvvit benchmark --table                                  # the paper's comparison; --rounds 0: without speed

Models are written NAME@SIZE+OPTION+OPTION. Each of a comparison has a process of its own; they are warmed up and then taken in turn, round
after round. Figures are medians; `ratio` is images a second against the first of the list, the median over the rounds; the peak of
memory is that of the process (or device) above what it had before the model was built.
"""

import json
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from transformers.hf_argparser import HfArg

from ..console import program, progress_bar
from ..data.files.atomic_files import write_json
from ..options import Program
from .comparison import compare_loaders, compare_models, table
from .data_loading import LOADERS
from .formats import BATCH_SIZES as FORMATS_BATCH_SIZES
from .formats import IMAGES, ROUNDS, compare_formats, find_formats, formats_table
from .gpu import BATCH_SIZES, FAMILY, GPUBenchmark
from .image_supply import load_gpu_decoders
from .measure import device_name
from .models import OPTIONS, BenchmarkModel, Setting
from .published.comparison import compare_published, published_table
from .published.results import published_rows
from .record import Record


QUICK = (
    ("inference", ["original/lvvit_t_224", "lvvit_t_224+fused", "lvvit_t_224+fused+bfloat16"]),
    ("training", ["original/lvvit_t_224", "lvvit_t_224+kept_memory", "lvvit_t_224+bfloat16+kept_memory"]),
    ("data", list(LOADERS)),
)
MODES = ("inference", "training", "run", "data", "formats", "gpu")


EPILOG = "options of a model:\n" + "\n".join(
    f"  {name:20}{text}; {'all' if len(sources) > 1 else 'ours'}, {', '.join(sorted(modes))}"
    for name, (sources, modes, text) in OPTIONS.items()
)


@dataclass
class BenchmarkArguments:
    """Options of the program."""

    mode: Literal[MODES] | None = HfArg(default=None, help="What to measure; default: a quick look at all.")
    models: list[str] | None = HfArg(
        default=None,
        help=f"Models; in mode data some of {', '.join(LOADERS)}; in mode formats one folder; in mode gpu ours, the first of which is "
        "compared with others.",
    )
    table: list[str] | None = HfArg(default=None, help="The published comparison, or some networks of it.")
    options: list[str] = HfArg(default_factory=lambda: ["kept_memory"], help="Of every model of the table.")
    batch_sizes: list[int] | None = HfArg(
        default=None,
        help="Default: 16; with table one, 4; in mode formats {} and {}; in mode gpu of inference and training, {} and {}.".format(
            *FORMATS_BATCH_SIZES, *BATCH_SIZES
        ),
    )
    num_classes: int | None = HfArg(default=None, help="Outputs of all models; default: their own.")
    device: str | None = HfArg(
        default=None, help="Default: cuda where there is one, else cpu; formats run on the CPU."
    )
    rounds: int | None = HfArg(
        default=None, help=f"Times that each is taken; default: 7, of formats {ROUNDS}, else 3."
    )
    threads: int | None = HfArg(default=None, help="Of PyTorch on the CPU; default: its own choice.")
    dataset_name: str | None = HfArg(
        default=None,
        help="Image folder or Parquet for data and run, default: synthetic photographs; for formats, which need one.",
        aliases=["--images"],
    )
    exported: str | None = HfArg(
        default=None, help="Folder of lvvit export whose ONNX files take part in mode formats."
    )
    max_eval_samples: int | None = HfArg(
        default=None,
        help=f"Images that formats predict at most; default: {IMAGES}.",
        aliases=["--max_samples"],
    )
    minutes: float = HfArg(default=8.0, help="Of mode gpu, which leaves out what takes longer.")
    ceiling: bool = HfArg(default=False, help="Share of the fastest matrix product of the device.")
    output_file: str | None = HfArg(default=None, help="JSON file for all figures.", aliases=["--json"])

    def __post_init__(self):
        self.models = self.models or []
        has_gpu = torch.cuda.is_available() and self.mode != "formats"
        self.device = self.device or ("cuda" if has_gpu else "cpu")


PROGRAM = Program(
    "lvvit benchmark", f"{__doc__}\n{EPILOG}", (BenchmarkArguments,), ("mode", "models*"), may_be_empty=("table",)
)


def check(args: BenchmarkArguments) -> None:
    """Raises a `ValueError` before anything is measured."""
    for name, least in (
        ("rounds", 0 if args.table is not None else 1),
        ("threads", 1),
        ("num_classes", 1),
        ("max_eval_samples", 1),
    ):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if min(args.batch_sizes or [1]) < 1:
        raise ValueError(f"--batch_sizes must be at least 1, got {args.batch_sizes}.")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: {error}") from error
    if device.type != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"--device {args.device}: PyTorch sees no accelerator here.")
    if args.mode != "formats" and (args.exported or args.max_eval_samples):
        raise ValueError("`exported` and `max_eval_samples` are for mode formats.")
    if args.table is not None:
        if args.mode is not None:
            raise ValueError(f"--table measures models of its own: leave out {args.mode}.")
        if len(args.batch_sizes or [1]) > 1:
            raise ValueError(f"--table takes one batch size, got {args.batch_sizes}.")
        published_rows(args.table)
        if args.ceiling or args.dataset_name:
            raise ValueError("`ceiling` and `dataset_name` do nothing with `table`.")
        BenchmarkModel.parse("+".join(["timm/resnet50", *args.options])).check_mode("inference")
    elif args.mode == "gpu":
        check_gpu(args)
    elif args.mode == "formats":
        check_formats(args)
    elif args.mode == "data":
        unknown = [name for name in args.models if name not in LOADERS]
        if unknown:
            raise ValueError(f"Unknown loader {unknown[0]!r}; expected some of {', '.join(LOADERS)}.")
    elif args.mode is not None:
        for text in args.models:
            BenchmarkModel.parse(text).check_mode(args.mode)


def check_gpu(args: BenchmarkArguments) -> None:
    """As `check`, of mode gpu."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {args.minutes:g}.")
    if len(args.batch_sizes or []) > 2:
        raise ValueError(f"gpu takes one batch size, or those of inference and training, got {args.batch_sizes}.")
    for text in args.models:
        model = BenchmarkModel.parse(text)
        if model.source != "ours" or model.options:
            raise ValueError(f"gpu takes models of ours without options, got {text!r}.")


def check_formats(args: BenchmarkArguments) -> None:
    """As `check`, of mode formats."""
    if len(args.models) != 1 or not (Path(args.models[0]) / "config.json").is_file():
        raise ValueError(f"formats takes one folder with a saved model, got {' '.join(args.models) or 'none'}.")
    if args.dataset_name is None:
        raise ValueError("formats predicts real images: give a data source (`dataset_name`).")
    if args.device != "cpu" or args.num_classes or args.ceiling:
        raise ValueError("formats runs a model as it is on the CPU: leave out `device`, `num_classes` and `ceiling`.")
    find_formats(args.models[0], args.exported)


def environment(args: BenchmarkArguments) -> dict[str, object]:
    """Hardware and versions, for the record."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": device_name(torch.device(args.device)),
    }


def run(args: BenchmarkArguments) -> list[dict[str, object]]:
    """Measures what was asked for and prints a table for each comparison."""
    if args.table is not None:
        return run_table(args)
    if args.mode == "gpu":
        return run_gpu(args)
    if args.mode == "formats":
        return run_formats(args)
    plan = [(args.mode, args.models)] if args.mode else QUICK
    rounds = args.rounds or (7 if args.mode else 3)
    rows = []
    for mode, models in plan:
        for batch_size in args.batch_sizes or [16]:
            setting = Setting(torch.device(args.device), batch_size, args.num_classes)
            if mode == "data":
                measured = compare_loaders(models or list(LOADERS), setting, rounds, args.dataset_name)
            else:
                models = models or ["original/lvvit_s_224", "lvvit_s_224", "timm/deit_small_patch16_224"]
                measured = compare_models(mode, models, setting, rounds, args.dataset_name, with_ceiling=args.ceiling)
            print(f"\n{mode}, batch size {batch_size}, {args.device}\n{table(measured)}", flush=True)
            rows += measured
    return rows


def run_formats(args: BenchmarkArguments) -> list[dict[str, object]]:
    """Compares the formats of a trained model."""
    sizes = tuple(args.batch_sizes or FORMATS_BATCH_SIZES)
    formats = find_formats(args.models[0], args.exported)
    rows = compare_formats(formats, args.dataset_name, args.max_eval_samples or IMAGES, sizes, args.rounds or ROUNDS)
    print(f"\nformats, {rows[0]['images']} images of {args.dataset_name}\n{formats_table(rows)}", flush=True)
    return rows


def run_gpu(args: BenchmarkArguments) -> list[dict[str, object]]:
    """Measures a GPU within `minutes`."""
    sizes = args.batch_sizes or BATCH_SIZES
    record = Record(args.minutes, environment(args), args.output_file and Path(args.output_file))
    options = (args.rounds or 7, args.dataset_name, args.num_classes)
    if args.device.startswith("cuda"):
        load_gpu_decoders()
    GPUBenchmark(
        record, torch.device(args.device), tuple(args.models) or FAMILY, (sizes[0], sizes[-1]), *options
    ).run()
    return record.rows


def run_table(args: BenchmarkArguments) -> list[dict[str, object]]:
    """Prints the published comparison as Markdown, with what was counted and timed here."""
    rows = published_rows(args.table)
    setting = Setting(torch.device(args.device), (args.batch_sizes or [4])[0], args.num_classes)
    rounds = 3 if args.rounds is None else args.rounds
    compared = compare_published(
        rows, setting, rounds, frozenset(args.options), args.output_file and Path(args.output_file)
    )
    measured = list(progress_bar(compared, total=len(rows), unit="model"))
    heading = "As published; and as counted here, FLOPs as multiply-adds of convolutions and matrix products."
    if rounds:
        machine = ", ".join(f"{name} {value}" for name, value in environment(args).items())
        heading += (
            f" Speed: {setting.batch_size} images at a time, median of {rounds} rounds, {' '.join(args.options)}, each in turn with "
            f"LV-ViT-S at 224 pixels: {machine}."
        )
    print(f"\n{published_table(measured, heading)}", flush=True)
    return measured


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    with PROGRAM.refusals(ImportError):
        (args,) = PROGRAM.parse(arguments)
        check(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        print(json.dumps(environment(args)))
        rows = run(args)
    if args.output_file and args.table is None and args.mode != "gpu":  # these write theirs row by row
        write_json(Path(args.output_file), {"environment": environment(args), "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
