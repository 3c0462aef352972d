"""Options that say which model a training program trains."""

import inspect
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import yaml
from transformers.hf_argparser import HfArg

from ..configuration_lvvit import LVViTConfig
from ..data.images import parse_image_size
from ..options import with_nearest
from ..variants import AUTO, check_variant


# configuration fields that follow from the data or have an option of their own
RESERVED_CONFIG_FIELDS = {"id2label", "label2id", "num_labels", "num_channels", "image_size"}
RESERVED_CONFIG_FIELDS |= {"num_classes", "in_chans", "img_size"}  # as timm calls them


@dataclass
class ModelSourceArguments:
    """Where the model of a training run comes from, and where the run writes. Its options are described in their `help`."""

    alternatives: ClassVar[tuple[str, ...]] = ("variant", "model_name_or_path")  # at most one of them is given
    option_groups: ClassVar[dict[str, str]] = {
        "preset": "model",
        "overwrite_output_dir": "output",
        "architecture": "model",
        "save_patch_head": "output",
    }

    preset: str | None = HfArg(
        default=None,
        help="A recipe by its name or file, as if it stood first; own_images: defaults for 500 to 50,000 images of your own.",
    )
    variant: str | None = HfArg(
        default=None,
        help="Published size, trained from random weights, e.g. lvvit_s_224; for a classifier also auto, which chooses size and input by "
        "the data and the device, and says why.",
    )
    model_name_or_path: str | None = HfArg(default=None, help="Instead, a model to start from: folder or Hub name.")
    model_revision: str | None = HfArg(default=None, help="Its revision on the Hub.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of its Hub repository to run.")
    ignore_mismatched_sizes: bool = HfArg(
        default=False,
        help="Give a pretrained model heads for another number of classes; those of equal names keep their rows.",
    )
    image_size: list[int] | None = HfArg(
        default=None, help="Side of the input in pixels, or height and width; default: that of the model."
    )
    config_overrides: dict | str | None = HfArg(
        default=None, help="Fields of the configuration of the model: a mapping, here as JSON or YAML."
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Write over another run that `output_dir` holds.")
    save_picture: bool = HfArg(default=True, help="Write a figure of predictions.")
    license: str | None = HfArg(
        default=None,
        help="License of the weights for the card, as a name of the Hub (mit, cc-by-4.0); default: that of the model to start "
        "from, none for random weights.",
    )

    def __post_init__(self):
        given = [f"`{name}`" for name in self.alternatives if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"Give one of {' and '.join(given)}; only `model_name_or_path` starts from trained weights."
            )
        self.config_overrides = read_config_overrides(self.config_overrides)
        if self.makes_lvvit:
            check_config_fields(LVViTConfig, self.config_overrides or {})
        if reserved := RESERVED_CONFIG_FIELDS & (self.config_overrides or {}).keys():
            raise ValueError(
                f"`config_overrides` may not set {', '.join(sorted(reserved))}: classes come from the data, images are "
                "RGB, and the input size is `image_size`."
            )
        parse_image_size(self.image_size, "`image_size`")

    @property
    def makes_lvvit(self) -> bool:
        """Whether the model is a new LV-ViT."""
        return self.model_name_or_path is None

    @property
    def image_height_width(self) -> tuple[int, int] | None:
        """Input height and width in pixels, `None` for the model's own."""
        return parse_image_size(self.image_size, "`image_size`")

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained`."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}


@dataclass
class ModelArguments(ModelSourceArguments):
    """Which classifier to train, besides the fields of `ModelSourceArguments`."""

    alternatives: ClassVar[tuple[str, ...]] = ("variant", "architecture", "model_name_or_path")

    architecture: str | None = HfArg(
        default=None,
        help="Instead of LV-ViT, another image classifier with random weights: timm/NAME, or a model type of transformers (vit, "
        "swin, resnet, ...). For timm/NAME, config_overrides are arguments of `timm.create_model`.",
    )
    crop_pct: float | None = HfArg(
        default=None,
        help="Share of the resized image that the evaluation crop keeps; default: that of the variant, else 0.9.",
        aliases=["--crop_fraction"],
    )
    save_patch_head: bool = HfArg(
        default=True,
        help="Save a model other than LV-ViT with its patch head, which plain loading leaves out. Checkpoints have it wherever it is trained, "
        "as it is not with plain labels.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.variant is not None:
            check_variant(self.variant, AUTO)
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must lie in (0, 1], got {self.crop_pct}.")

    @property
    def makes_lvvit(self) -> bool:
        """Whether the model is a new LV-ViT."""
        return super().makes_lvvit and self.architecture is None


def read_config_overrides(overrides: Any) -> dict[str, Any] | None:
    """Fields of a configuration as a mapping, from JSON or YAML where they are a text; a `ValueError` if they are neither."""
    if isinstance(overrides, str):
        try:
            overrides = yaml.safe_load(overrides)
        except yaml.YAMLError as error:
            raise ValueError(f"`config_overrides` is neither JSON nor YAML: {overrides!r}.") from error
    if not isinstance(overrides, dict | None):
        raise ValueError(f"`config_overrides` must be a mapping of fields, got {overrides!r}.")
    return overrides


def check_config_fields(config_class: type, overrides: dict[str, Any]) -> None:
    """Raises a `ValueError` with the nearest names if overrides name no fields of a configuration class."""
    # some classes are dataclasses, others have an `__init__`
    names = {entry.name for entry in fields(config_class)} | set(inspect.signature(config_class.__init__).parameters)
    names = {name for name in names - {"self", "args", "kwargs"} if not name.startswith("_")}
    names |= set(config_class.attribute_map)
    unknown = [with_nearest(key, names) for key in overrides if key not in names]
    if unknown:
        raise ValueError(f"`config_overrides` names no field of {config_class.__name__}: {'; '.join(unknown)}.")
