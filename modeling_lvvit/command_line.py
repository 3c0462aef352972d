"""Command line of the training programs: a recipe file first, then options that override it."""

import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil
import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from .token_labeling import TokenLabelTrainingArguments
from .token_labeling.data import DataArguments


RECIPES = Path(__file__).parent / "recipes"
EMBEDDED_RECIPE = "digit_scenes"


@dataclass
class ModelArguments:
    """Which model to train.

    Args:
        variant: A published size (`modeling_lvvit.variants.VARIANTS`), trained from random weights.
        model_name_or_path: Instead, a folder or Hub name to start from.
        model_revision, trust_remote_code: See `from_pretrained`.
        ignore_mismatched_sizes: Whether a pretrained model may get new heads for another class count.
        image_size: Side of the model input in pixels, or height and width; default: that of the model.
        config_overrides: Fields of `LVViTConfig` (a mapping; on the command line JSON).
        crop_fraction: Share of the resized image that the evaluation crop keeps; default: that of the variant, else 0.9.
        overwrite_output_dir: Whether `output_dir` may hold another run, which is then written over.
        save_picture: Whether to write a picture of predictions.
    """

    variant: str | None = field(default=None, metadata={"help": "Published size, e.g. lvvit_s_224."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name to start from."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code of a Hub repository to run."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Make new heads for other classes."})
    image_size: list[int] | None = field(default=None, metadata={"help": "Input side in pixels, or height and width."})
    config_overrides: dict | str | None = field(default=None, metadata={"help": "LVViTConfig fields as JSON."})
    crop_fraction: float | None = field(default=None, metadata={"help": "Share kept by the evaluation crop."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over another run."})
    save_picture: bool = field(default=True, metadata={"help": "Write a picture of predictions."})

    def __post_init__(self):
        if self.variant and self.model_name_or_path:
            raise ValueError("Give --variant (random weights) or --model_name_or_path (pretrained), not both.")
        if isinstance(self.config_overrides, str):
            self.config_overrides = yaml.safe_load(self.config_overrides)
        if self.config_overrides is not None and not isinstance(self.config_overrides, dict):
            raise ValueError(
                f"`config_overrides` must be a mapping of LVViTConfig fields, got {self.config_overrides!r}."
            )
        if isinstance(self.image_size, int):
            self.image_size = [self.image_size]
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise ValueError(f"`image_size` is one side or height and width, got {self.image_size}.")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ValueError(f"`crop_fraction` must lie in (0, 1], got {self.crop_fraction}.")

    @property
    def image_height_width(self) -> tuple[int, int] | None:
        """Input height and width in pixels, `None` for the model's own."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])


def find_recipe(name: str) -> Path:
    """Path of a recipe: a file, or the name of one that the package ships.

    Raises:
        FileNotFoundError: If there is neither; the message lists the shipped names.
    """
    shipped = RECIPES / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"There is no recipe file {name}, and the package ships only: {names}.")


def read_recipe(path: Path, known: set[str]) -> dict[str, Any]:
    """Options of a recipe file.

    Raises:
        ValueError: If the file is not a YAML mapping or has a key that is no option; the message names the nearest one.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {path} must be a mapping of options to values, got {type(recipe).__name__}.")
    unknown = [key for key in recipe if key not in known]
    if unknown:
        raise ValueError(
            f"Recipe {path} has unknown options: {'; '.join(_with_nearest(key, known) for key in unknown)}."
        )
    return recipe


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TokenLabelTrainingArguments]:
    """Parses `[RECIPE] [--option value ...]`; options override the recipe.

    Without a recipe and without `--dataset_name`, the embedded recipe is the base.

    Raises:
        ValueError: If an option or recipe key is unknown or has a bad value.
        FileNotFoundError: If the recipe does not exist.
    """
    types = (ModelArguments, DataArguments, TokenLabelTrainingArguments)
    parser = HfArgumentParser(types, prog="train_tl.py", usage="train_tl.py [RECIPE] [--option value ...]")
    known = {entry.name for kind in types for entry in fields(kind) if entry.init}
    recipe = None
    if arguments and not arguments[0].startswith("-"):
        recipe, *arguments = arguments
    elif not any(argument.split("=")[0] == "--dataset_name" for argument in arguments):
        recipe = EMBEDDED_RECIPE
    if recipe is not None:
        parser.set_defaults(**read_recipe(find_recipe(recipe), known))
    *parsed, rest = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        unknown = [_with_nearest(option.lstrip("-"), known) for option in rest if option.startswith("-")] or rest
        raise ValueError(f"Unknown options: {'; '.join(unknown)}.")
    return tuple(parsed)


def prepare_output_dir(model_args: ModelArguments, training_args: TokenLabelTrainingArguments) -> None:
    """Makes sure that no other run is written over, and finds the checkpoint that `last` stands for.

    Raises:
        ValueError: If `output_dir` holds another run, or there is no checkpoint to resume from.
    """
    output_dir = Path(training_args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file.")
    if training_args.resume_from_checkpoint == "last":
        training_args.resume_from_checkpoint = get_last_checkpoint(output_dir) if output_dir.is_dir() else None
        if training_args.resume_from_checkpoint is None:
            raise ValueError(f"There is no checkpoint in {output_dir} to resume from.")
    resume = training_args.resume_from_checkpoint
    if resume is not None and not Path(resume).is_dir():
        raise ValueError(f"There is no checkpoint folder {resume} to resume from.")
    if resume is None and output_dir.is_dir() and any(output_dir.iterdir()) and not model_args.overwrite_output_dir:
        raise ValueError(
            f"{output_dir} holds another run. Choose another --output_dir, continue it with --resume_from_checkpoint "
            "last, or write over it with --overwrite_output_dir."
        )


def missing_cpu_processes() -> int:
    """How many processes `accelerate launch --cpu --num_processes N` was asked for but did not start; 0 if all is well.

    For CPU training accelerate starts a single process, whatever N is (its issue 2741); it leaves the number only in its
    own command line.
    """
    is_lone_cpu_process = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "WORLD_SIZE" not in os.environ
    if not is_lone_cpu_process or "MASTER_ADDR" not in os.environ:
        return 0
    parent = psutil.Process(os.getppid()).cmdline()
    # started as `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`
    start = next((index for index, word in enumerate(parent) if word.endswith("launch")), None)
    if start is None:
        return 0
    options, _ = launch_command_parser().parse_known_args(parent[start + 1 :])
    return options.num_processes if (options.num_processes or 0) > 1 and (options.num_machines or 1) == 1 else 0


def is_main_process() -> bool:
    """Whether this process is the one of its machine that speaks to the user."""
    return int(os.environ.get("LOCAL_RANK", "0")) <= 0


def _with_nearest(key: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{key} (did you mean {nearest[0]}?)" if nearest else key
