"""Command line of the training programs: recipe files first, then options that override them."""

import argparse
import difflib
import itertools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .configuration_lvvit import LVViTConfig
from .token_labeling import TokenLabelTrainingArguments
from .token_labeling.data_arguments import DataArguments


RECIPES = Path(__file__).parent / "recipes"
EMBEDDED_RECIPE = "digit_scenes"
# pairs of options of which one replaces the other
ALTERNATIVES = (
    ("variant", "model_name_or_path"),
    ("variant", "architecture"),
    ("architecture", "model_name_or_path"),
    ("ema_decay", "base_ema_decay"),
)
# options of the embedded recipe that describe its model, which another choice of model replaces
MODEL_SHAPE_OPTIONS = ("config_overrides", "image_size", "crop_fraction")
# configuration fields that follow from the data or have an option of their own
RESERVED_CONFIG_FIELDS = {"id2label", "label2id", "num_labels", "num_channels", "image_size"}
RESERVED_CONFIG_FIELDS |= {"num_classes", "in_chans", "img_size"}  # as timm calls them


@dataclass
class ModelArguments:
    """Which model to train.

    Args:
        variant: A published size (`modeling_lvvit.variants.VARIANTS`), trained from random weights.
        architecture: Instead, any other image classifier from random weights: `timm/NAME`, or a model type of transformers (`vit`,
            `swin`, `resnet`, ...).
        model_name_or_path: Instead, a folder or Hub name to start from, of LV-ViT or of any other image classifier.
        model_revision, trust_remote_code: See `from_pretrained`.
        ignore_mismatched_sizes: Whether a pretrained model may get new heads for another class count.
        image_size: Side of the model input in pixels, or height and width; default: that of the model.
        config_overrides: Fields of the model's configuration, for `timm/NAME` arguments of `timm.create_model` (a mapping; on the
            command line JSON).
        crop_fraction: Share of the resized image that the evaluation crop keeps; default: that of the variant, else 0.9.
        overwrite_output_dir: Whether `output_dir` may hold another run, which is then written over.
        save_picture: Whether to write a picture of predictions.
        save_patch_head: Whether a model other than LV-ViT is saved with its patch head, which plain loading leaves out. Checkpoints
            always have it.
    """

    variant: str | None = field(default=None, metadata={"help": "Published size, e.g. lvvit_s_224."})
    architecture: str | None = field(default=None, metadata={"help": "timm/NAME or a model type, random weights."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name to start from."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code of a Hub repository to run."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Make new heads for other classes."})
    image_size: list[int] | None = field(default=None, metadata={"help": "Input side in pixels, or height and width."})
    config_overrides: dict | str | None = field(default=None, metadata={"help": "Configuration fields as JSON."})
    crop_fraction: float | None = field(default=None, metadata={"help": "Share kept by the evaluation crop."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over another run."})
    save_picture: bool = field(default=True, metadata={"help": "Write a picture of predictions."})
    save_patch_head: bool = field(default=True, metadata={"help": "Save the patch head added to other models."})

    def __post_init__(self):
        if sum(bool(given) for given in (self.variant, self.architecture, self.model_name_or_path)) > 1:
            raise ValueError(
                "Give one of --variant (LV-ViT, random weights), --architecture (others, random weights) and --model_name_or_path "
                "(pretrained)."
            )
        self._check_config_overrides()
        if self.image_size is not None and (len(self.image_size) not in (1, 2) or min(self.image_size) < 1):
            raise ValueError(f"`image_size` is one side or height and width, got {self.image_size}.")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ValueError(f"`crop_fraction` must lie in (0, 1], got {self.crop_fraction}.")

    def _check_config_overrides(self):
        if isinstance(self.config_overrides, str):
            try:
                self.config_overrides = yaml.safe_load(self.config_overrides)
            except yaml.YAMLError as error:
                raise ValueError(f"`config_overrides` is neither JSON nor YAML: {self.config_overrides!r}.") from error
        if self.config_overrides is None:
            return
        if not isinstance(self.config_overrides, dict):
            raise ValueError(f"`config_overrides` must be a mapping of fields, got {self.config_overrides!r}.")
        if self.architecture is None and self.model_name_or_path is None:
            check_config_fields(LVViTConfig, self.config_overrides)
        if reserved := RESERVED_CONFIG_FIELDS & self.config_overrides.keys():
            raise ValueError(
                f"`config_overrides` may not set {', '.join(sorted(reserved))}: classes come from the data, pictures are "
                "RGB, and the input size is --image_size."
            )

    @property
    def image_height_width(self) -> tuple[int, int] | None:
        """Input height and width in pixels, `None` for the model's own."""
        return None if self.image_size is None else (self.image_size[0], self.image_size[-1])


def check_config_fields(config_class: type, overrides: dict[str, Any]) -> None:
    """Raises a `ValueError` with the nearest names if overrides name no fields of a configuration class."""
    known = {entry.name for entry in fields(config_class) if not entry.name.startswith("_")}
    known |= set(config_class.attribute_map)
    unknown = [_with_nearest(key, known) for key in overrides if key not in known]
    if unknown:
        raise ValueError(f"`config_overrides` names no field of {config_class.__name__}: {'; '.join(unknown)}.")


def recipe_names() -> list[str]:
    """Names of the recipes that the package ships."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


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
    names = ", ".join(recipe_names())
    raise FileNotFoundError(f"There is no recipe file {name}, and the package ships only: {names}.")


def read_recipe(path: Path, parser: argparse.ArgumentParser, above: tuple[Path, ...] = ()) -> dict[str, Any]:
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
    bases = recipe.pop("base", None) or []
    options: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        options = _merged(options, read_recipe(find_recipe(str(base)), parser, (*above, path)))
    actions = {action.dest: action for action in parser._actions}
    if unknown := [_with_nearest(str(key), set(actions)) for key in recipe if key not in actions]:
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


def _parser() -> HfArgumentParser:
    types = (ModelArguments, DataArguments, TokenLabelTrainingArguments)
    usage = "train_tl.py [RECIPE ...] [--option value ...]"
    return HfArgumentParser(types, prog="train_tl.py", usage=usage, allow_abbrev=False)


def _given_options(arguments: list[str]) -> dict[str, Any]:
    """Options that stand on the command line."""
    parser, unset = _parser(), object()  # one of its own: several actions with other defaults share a name
    parser.set_defaults(**{action.dest: unset for action in parser._actions if action.dest != "help"})
    given, _ = parser.parse_known_args(arguments)
    return {name: value for name, value in vars(given).items() if value is not unset}


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TokenLabelTrainingArguments]:
    """Parses `[RECIPE ...] [--option value ...]`; later recipes override earlier ones, options override recipes; fields of
    `config_overrides` are merged.

    Without a recipe and without `--dataset_name`, the embedded recipe is the base.

    Raises:
        ValueError: If an option or recipe key is unknown or has a bad value.
        FileNotFoundError: If the recipe does not exist.
    """
    parser = _parser()
    recipes = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    arguments = arguments[len(recipes) :]
    given = _given_options(arguments)
    options: dict[str, Any] = {}
    for recipe in recipes:
        options = _merged(options, read_recipe(find_recipe(recipe), parser))
    if not recipes and "dataset_name" not in given:
        options = read_recipe(find_recipe(EMBEDDED_RECIPE), parser)
        if given.keys() & {"variant", "architecture", "model_name_or_path"}:
            options = {key: value for key, value in options.items() if key not in MODEL_SHAPE_OPTIONS}
    options = _of_architecture(options, given)
    parser.set_defaults(**_without_replaced(options, given))
    *parsed, rest = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        known = {action.dest for action in parser._actions}
        unknown = [_with_nearest(option.lstrip("-"), known) for option in rest if option.startswith("-")] or rest
        raise ValueError(f"Unknown options: {'; '.join(unknown)}.")
    overrides = (options.get("config_overrides"), parsed[0].config_overrides)
    if "config_overrides" in given and all(isinstance(fields, dict) for fields in overrides):
        parsed[0].config_overrides = {**overrides[0], **overrides[1]}
    return tuple(parsed)


def _with_nearest(key: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{key} (did you mean {nearest[0]}?)" if nearest else key
