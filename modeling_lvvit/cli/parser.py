"""Command line of the training programs: recipe files first, then options that override them."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..token_labeling import TokenLabelTrainingArguments
from .data_arguments import DataArguments
from .model_arguments import ModelArguments, with_nearest


RENAMED = {"crop_fraction": "crop_pct"}  # keys of older recipes
# pairs of options of which one replaces the other
ALTERNATIVES = (
    ("variant", "model_name_or_path"),
    ("variant", "architecture"),
    ("architecture", "model_name_or_path"),
    ("ema_decay", "base_ema_decay"),
)
# options of the embedded recipe that describe its model, which another choice of model replaces
MODEL_SHAPE_OPTIONS = ("config_overrides", "image_size", "crop_pct")


@dataclass(frozen=True)
class Program:
    """A training program with its options and recipes.

    Args:
        name: What its messages start with.
        usage: How it is started.
        arguments: Dataclasses of its options; the first one has `config_overrides`.
        recipes: Folder of the recipes that come with it.
        embedded_recipe: The one that is used without a recipe and without data; it makes its own data.
    """

    name: str
    usage: str
    arguments: tuple[type, ...]
    recipes: Path
    embedded_recipe: str

    def parser(self) -> HfArgumentParser:
        """A new parser of its options."""
        usage = f"{self.usage} [RECIPE ...] [--option value ...]"
        return HfArgumentParser(self.arguments, prog=self.name, usage=usage, allow_abbrev=False)


RECIPES = Path(__file__).parents[1] / "recipes"
EMBEDDED_RECIPE = "digit_scenes"
TRAIN_TL = Program(
    "train_tl.py",
    "train_tl.py",
    (ModelArguments, DataArguments, TokenLabelTrainingArguments),
    RECIPES,
    EMBEDDED_RECIPE,
)


def recipe_names(program: Program = TRAIN_TL) -> list[str]:
    """Names of the recipes that come with a program."""
    folder = program.recipes
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def find_recipe(name: str, program: Program = TRAIN_TL) -> Path:
    """Path of a recipe: a file, or the name of one that comes with the program.

    Raises:
        FileNotFoundError: If there is neither; the message lists the shipped names.
    """
    shipped = program.recipes / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    if shipped.is_file():
        return shipped
    names = ", ".join(recipe_names(program))
    raise FileNotFoundError(f"There is no recipe file {name}, and the package ships only: {names}.")


def read_recipe(path: Path, program: Program = TRAIN_TL, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Options of a recipe file, checked and converted as if they stood on the command line.

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
    recipe = {RENAMED.get(key, key): value for key, value in recipe.items()}
    bases = recipe.pop("base", None) or []
    options: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        options = _merged(options, read_recipe(find_recipe(str(base), program), program, (*above, path)))
    actions = {action.dest: action for action in program.parser()._actions}
    if unknown := [with_nearest(str(key), set(actions)) for key in recipe if key not in actions]:
        raise ValueError(f"Recipe {path} has unknown options: {'; '.join(unknown)}.")
    try:
        own = {key: _converted(actions[key], value) for key, value in recipe.items()}
    except ValueError as error:
        raise ValueError(f"Recipe {path}: {error}") from error
    return _merged(options, own)


def _merged(options: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Options of two recipes; the later ones hold, and configuration fields are merged one by one, unless they are of another
    architecture."""
    options = _of_architecture(options, later)
    both = (options.get("config_overrides"), later.get("config_overrides"))
    merged = {**_without_replaced(options, later), **later}
    if all(isinstance(fields, dict) for fields in both):
        merged["config_overrides"] = {**both[0], **both[1]}
    return merged


def _of_architecture(options: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Options without configuration fields, if later ones choose another architecture."""
    own = options.get("architecture")
    if later.get("architecture", own) == own and not (own and later.get("model_name_or_path")):
        return options
    return {name: value for name, value in options.items() if name != "config_overrides"}


def _converted(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the option's own conversion would give it."""
    takes_mapping = action.dest == "config_overrides" or action.dest.endswith(("_kwargs", "_config", "optim_args"))
    if (isinstance(value, dict) and takes_mapping) or (value is None and action.default is None):
        return value
    if isinstance(value, list) and action.dest == "report_to":
        return value
    if value is False and "no" in (action.choices or ()):  # what YAML makes of an unquoted no
        return "no"
    takes_list = action.nargs in ("+", "*")
    values = value if isinstance(value, list) and takes_list else [value]
    try:
        if any(isinstance(item, (dict, list)) or item is None for item in values):
            raise ValueError("not a plain value")
        converted = [action.type(str(item)) if action.type else str(item) for item in values]
        if action.choices is not None and any(item not in action.choices for item in converted):
            raise ValueError(f"not one of {list(action.choices)}")
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"option {action.dest} cannot be {value!r} ({error}).") from error
    return converted if takes_list else converted[0]


def _without_replaced(options: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Options without those whose alternative stands in `later`."""
    replaced = {other for pair in ALTERNATIVES for name, other in (pair, pair[::-1]) if later.get(name) is not None}
    return {name: value for name, value in options.items() if name not in replaced}


def given_options(arguments: list[str], program: Program = TRAIN_TL) -> dict[str, Any]:
    """Options that stand on the command line."""
    parser, unset = program.parser(), object()  # one of its own: several actions with other defaults share a name
    parser.set_defaults(**{action.dest: unset for action in parser._actions if action.dest != "help"})
    given, _ = parser.parse_known_args(arguments)
    return {name: value for name, value in vars(given).items() if value is not unset}


def parse(arguments: list[str], program: Program = TRAIN_TL) -> tuple[Any, ...]:
    """Parses `[RECIPE ...] [--option value ...]`; later recipes override earlier ones, options override recipes; fields of
    `config_overrides` are merged.

    Without a recipe and without `--dataset_name`, the embedded recipe is the base.

    Args:
        arguments: What stands behind the name of the program.
        program: The program.

    Returns:
        One object of each class of `program.arguments`.

    Raises:
        ValueError: If an option or recipe key is unknown or has a bad value.
        FileNotFoundError: If the recipe does not exist.
    """
    parser = program.parser()
    recipes = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    arguments = arguments[len(recipes) :]
    given = given_options(arguments, program)
    options: dict[str, Any] = {}
    for recipe in recipes:
        options = _merged(options, read_recipe(find_recipe(recipe, program), program))
    if not recipes and "dataset_name" not in given:
        options = read_recipe(find_recipe(program.embedded_recipe, program), program)
        if given.keys() & {"variant", "architecture", "model_name_or_path"}:
            options = {key: value for key, value in options.items() if key not in MODEL_SHAPE_OPTIONS}
    options = _of_architecture(options, given)
    parser.set_defaults(**_without_replaced(options, given))
    *parsed, rest = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        known = {action.dest for action in parser._actions}
        unknown = [with_nearest(option.lstrip("-"), known) for option in rest if option.startswith("-")] or rest
        raise ValueError(f"Unknown options: {'; '.join(unknown)}.")
    overrides = (options.get("config_overrides"), parsed[0].config_overrides)
    if "config_overrides" in given and all(isinstance(fields, dict) for fields in overrides):
        parsed[0].config_overrides = {**overrides[0], **overrides[1]}
    return tuple(parsed)
