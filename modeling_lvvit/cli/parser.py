"""Command line of the training programs: recipe files first, then options that override them."""

import argparse
import itertools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ..options import OptionParser, Program, with_nearest
from ..token_labeling import TokenLabelTrainingArguments
from .data_arguments import DataArguments
from .model_arguments import ModelArguments, read_config_overrides


RECIPES = Path(__file__).parents[1] / "recipes"
LAUNCHER = (
    "Options of `accelerate launch` (--num_processes, --mixed_precision, --config_file, ...) are passed on to it."
)
TRAIN_DESCRIPTION = f"""Trains an image classifier with token labels (or plain ones) and saves it for `AutoModel`.

    lvvit train                                   embedded data, a few minutes on two CPU cores
    lvvit train RECIPE --output_dir runs/a        a recipe, by name or file; any option overrides its value
    lvvit train --dataset_name path/to/images --preset own_images --output_dir runs/b
    lvvit train --dataset_name path/to/images --architecture timm/resnet50 --annotator MODEL --output_dir runs/c

{LAUNCHER}"""
COMMON_OPTIONS = [
    "preset",
    "variant",
    "model_name_or_path",
    "image_size",
    "overwrite_output_dir",
    "dataset_name",
    "train_split",
    "eval_split",
    "image_column_name",
    "max_train_samples",
    "max_eval_samples",
    "output_dir",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "warmup_steps",
    "bf16",
    "dataloader_num_workers",
    "eval_strategy",
    "save_strategy",
    "seed",
    "resume_from_checkpoint",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
]
TRAIN_SHOWN = (
    *COMMON_OPTIONS,
    "architecture",
    "label_column_name",
    "token_labels",
    "annotator",
    "dense_weight",
    "mix_methods",
    "ema_decay",
)
PRESET = "own_images"  # what small datasets are advised to use
FINE_TUNING = "_fine_tuning"  # ending of the recipe that holds in place of another where a trained model is given
EMBEDDED_RECIPE = "digit_scenes"  # of every program; used without a recipe and without data, it makes its own data


@dataclass(frozen=True)
class TrainingProgram(Program):
    """A program whose options may stand in recipes, files that come first; the first dataclass of its options describes the model. Those
    that exclude each other are in `alternatives` of a dataclass.

    Args:
        recipes: Folder of the recipes that come with it, the embedded one among them.
    """

    recipes: Path = RECIPES

    @property
    def usage(self) -> str:
        """How it is called."""
        return f"{self.name} [RECIPE ...] [--option value ...]"

    def given_options(self, words: list[str], parser: OptionParser | None = None) -> tuple[dict[str, Any], list[str]]:
        """The options on a command line, converted, without any defaults; and the words that are no options."""
        unset = object()  # argparse fills in its defaults only where a namespace lacks a name
        namespace = argparse.Namespace(**dict.fromkeys(self.types, unset))
        parsed, rest = (parser or self.parser()).parse_known_args(words, namespace)
        return {name: value for name, value in vars(parsed).items() if value is not unset}, rest

    def merge(self, options: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
        """Options of two recipes. The later ones hold, and one of several alternatives replaces the others. Fields of
        `config_overrides` are merged one by one, unless they belong to different architectures. `switches_off` of a dataclass names
        options that end others of earlier recipes."""
        chosen = {name for name, value in later.items() if value is not None}
        groups = [set(part.alternatives) for part in self.arguments if hasattr(part, "alternatives")]
        replaced = {name for group in groups if chosen & group for name in group}
        ended = {name: other for part in self.arguments for name, other in getattr(part, "switches_off", {}).items()}
        replaced |= {other for name, other in ended.items() if name in later}
        merged = {name: value for name, value in options.items() if name not in replaced} | later
        overrides = (options.get("config_overrides"), later.get("config_overrides"))
        if merged.get("architecture") != options.get("architecture"):
            merged["config_overrides"] = overrides[1]
        elif all(isinstance(values, dict) for values in overrides):
            merged["config_overrides"] = overrides[0] | overrides[1]
        return merged


TRAIN_TL = TrainingProgram(
    "lvvit train", TRAIN_DESCRIPTION, (ModelArguments, DataArguments, TokenLabelTrainingArguments), shown=TRAIN_SHOWN
)


def recipe_names(program: TrainingProgram = TRAIN_TL) -> list[str]:
    """Names of the recipes that come with a program."""
    folder = program.recipes
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_recipe(name: str, program: TrainingProgram = TRAIN_TL) -> Path:
    """Path of a recipe: a file, or the name of one that comes with the program; a `FileNotFoundError` lists these."""
    for path in (Path(name), program.recipes / f"{name}.yaml"):
        if path.is_file():
            return path
    names = recipe_names(program)
    raise FileNotFoundError(
        f"There is no recipe file {with_nearest(name, set(names))}, and the package ships only: {', '.join(names)}."
    )


def read_recipe(path: Path, program: TrainingProgram = TRAIN_TL, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a recipe file, checked and converted as on the command line.

    The key `base` names another recipe, or several, whose options hold where this one has none; of several the later ones first.

    Raises:
        ValueError: If the file is not a YAML mapping, has a key that is no option (the message names the nearest one) or
            a value that the option cannot take, or is its own base.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {path} must be a mapping of options to values, got {type(recipe).__name__}.")
    if path in above:
        raise ValueError(f"Recipe {path} is its own base.")
    parser = program.parser()
    recipe = {parser.renamed.get(key, key): value for key, value in recipe.items()}
    bases = recipe.pop("base", None) or []
    options: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        options = program.merge(options, read_recipe(find_recipe(str(base), program), program, (*above, path)))
    if "preset" in recipe:
        raise ValueError(f"Recipe {path}: write `base` for `preset`, which is an option of the command line.")
    if unknown := [with_nearest(str(key), set(program.types)) for key in recipe if key not in program.types]:
        raise ValueError(f"Recipe {path} has unknown options: {'; '.join(unknown)}.")
    try:
        return program.merge(options, {key: _convert(key, recipe[key], program, parser) for key in recipe})
    except ValueError as error:
        raise ValueError(f"Recipe {path}: {error}") from error


def fitting_recipe(name: str, model_name_or_path: str | None, program: TrainingProgram = TRAIN_TL) -> Path:
    """Path of a recipe; if a trained model is given, that of the recipe for fine-tuning where there is one of this name."""
    fine_tuning = program.recipes / f"{name}{FINE_TUNING}.yaml"
    return fine_tuning if model_name_or_path and fine_tuning.is_file() else find_recipe(name, program)


def read_preset(model_args: Any, program: TrainingProgram = TRAIN_TL) -> dict[str, Any]:
    """Options of the recipe of `--preset`; none without one."""
    if model_args.preset is None:
        return {}
    return read_recipe(fitting_recipe(model_args.preset, model_args.model_name_or_path, program), program)


def describe_preset(model_args: Any, *others: Any, program: TrainingProgram = TRAIN_TL) -> str | None:
    """What `--preset` set, and which of its options were given otherwise; `None` without one."""
    if model_args.preset is None:
        return None
    path = fitting_recipe(model_args.preset, model_args.model_name_or_path, program)
    values = {name: value for part in (model_args, *others) for name, value in vars(part).items()}
    recipe = read_preset(model_args, program)
    held = [f"{name} {value}" for name, value in recipe.items() if values[name] == value]
    # those that another option has ended were not given
    ended = {other for part in program.arguments for other in getattr(part, "switches_off", {}).values()}
    changed = [
        f"{name} {values[name]}" for name, value in recipe.items() if values[name] != value and name not in ended
    ]
    text = f"preset {path.stem}: {', '.join(held)}"
    return f"{text}; given otherwise: {', '.join(changed)}" if changed else text


def _convert(name: str, value: Any, program: TrainingProgram, parser: OptionParser) -> Any:
    """A YAML value as the command line would give it; each item of a list as a word of its own."""
    hint = program.types[name]
    choices = [get_origin(part) or part for part in get_args(hint)]  # of a union
    if (value is None and type(None) in choices) or (
        isinstance(value, (dict, list)) and {str, type(value)} <= set(choices)  # what a word says in YAML
    ):
        return value

    def read(item: Any) -> Any:
        if item is None or isinstance(item, (dict, list)):
            raise ValueError("not a plain value")
        word = "no" if item is False else str(item)  # YAML reads an unquoted no as False
        return program.given_options([f"--{name}={word}"], parser)[0][name]

    try:
        if isinstance(value, list) and list in (get_origin(hint), *choices):
            return [converted for item in value for converted in read(item)]
        return read(value)
    except ValueError as error:
        reason = str(error).removeprefix(f"--{name}: ")
        raise ValueError(f"option {name} cannot be {value!r} ({reason}).") from error


def parse(arguments: list[str], program: TrainingProgram = TRAIN_TL) -> tuple[Any, ...]:
    """Parses `[RECIPE ...] [--option value ...]`; later recipes override earlier ones, and options override recipes: see
    `TrainingProgram.merge`. `--preset` is the first recipe.

    Without a recipe and without `--dataset_name`, the embedded recipe is the base; if options choose a model, without its own.

    Returns:
        One object of each class of `program.arguments`.

    Raises:
        ValueError: If an option or recipe key is unknown or has a bad value.
        FileNotFoundError: If the recipe does not exist.
    """
    recipes = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    given, rest = program.given_options(arguments[len(recipes) :])
    program.check_unknown(rest)
    if "config_overrides" in given:
        given["config_overrides"] = read_config_overrides(given["config_overrides"])
    if given.get("preset"):
        recipes.insert(0, given["preset"])
    elif PRESET in recipes:
        given["preset"] = PRESET
    options: dict[str, Any] = {}
    for recipe in recipes:
        path = fitting_recipe(recipe, given.get("model_name_or_path"), program)
        options = program.merge(options, read_recipe(path, program))
    if not recipes and "dataset_name" not in given:
        options = read_recipe(find_recipe(EMBEDDED_RECIPE, program), program)
        model = program.arguments[0]
        if given.keys() & set(model.alternatives):
            shape = {entry.name for entry in fields(model)}
            options = {name: value for name, value in options.items() if name not in shape}
    return program.parser().parse_dict(program.merge(options, given))
