"""Options that say which model a training program trains."""

import difflib
import inspect
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from ..configuration_lvvit import LVViTConfig
from ..data.images import parse_image_size


# configuration fields that follow from the data or have an option of their own
RESERVED_CONFIG_FIELDS = {"id2label", "label2id", "num_labels", "num_channels", "image_size"}
RESERVED_CONFIG_FIELDS |= {"num_classes", "in_chans", "img_size"}  # as timm calls them


@dataclass
class ModelSourceArguments:
    """Where the model of a training run comes from, and where the run writes.

    Args:
        variant: A published size (`modeling_lvvit.variants.VARIANTS`), trained from random weights.
        model_name_or_path: Instead, a folder or Hub name to start from.
        model_revision, trust_remote_code: See `from_pretrained`.
        ignore_mismatched_sizes: Whether a pretrained model may get new heads for another class count.
        image_size: Side of the model input in pixels, or height and width; default: that of the model.
        config_overrides: Fields of the model's configuration (a mapping; on the command line JSON).
        overwrite_output_dir: Whether `output_dir` may hold another run, which is then written over.
        save_picture: Whether to write an image of predictions.
        license: License of the weights for the model card, as a name of the Hub (`mit`, `cc-by-4.0`); default: that of the card of the
            model to start from, `apache-2.0` for random weights.
    """

    variant: str | None = field(default=None, metadata={"help": "Published size, e.g. lvvit_s_224."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub name to start from."})
    model_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code of a Hub repository to run."})
    ignore_mismatched_sizes: bool = field(default=False, metadata={"help": "Make new heads for other classes."})
    image_size: list[int] | None = field(default=None, metadata={"help": "Input side in pixels, or height and width."})
    config_overrides: dict | str | None = field(default=None, metadata={"help": "Configuration fields as JSON."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over another run."})
    save_picture: bool = field(default=True, metadata={"help": "Write an image of predictions."})
    license: str | None = field(default=None, metadata={"help": "License of the weights, for the card: mit, ..."})

    def __post_init__(self):
        if self.variant and self.model_name_or_path:
            raise ValueError("Give --variant (random weights) or --model_name_or_path (pretrained), not both.")
        self._check_config_overrides()
        parse_image_size(self.image_size, "`image_size`")

    @property
    def makes_lvvit(self) -> bool:
        """Whether the model is a new LV-ViT."""
        return self.model_name_or_path is None

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
        if self.makes_lvvit:
            check_config_fields(LVViTConfig, self.config_overrides)
        if reserved := RESERVED_CONFIG_FIELDS & self.config_overrides.keys():
            raise ValueError(
                f"`config_overrides` may not set {', '.join(sorted(reserved))}: classes come from the data, images are "
                "RGB, and the input size is --image_size."
            )

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
    """Which classifier to train, besides the fields of `ModelSourceArguments`.

    Args:
        architecture: Instead of LV-ViT, any other image classifier from random weights: `timm/NAME`, or a model type of transformers
            (`vit`, `swin`, `resnet`, ...). `config_overrides` are for `timm/NAME` arguments of `timm.create_model`.
        crop_pct: Share of the resized image that the evaluation crop keeps; default: that of the variant, else 0.9.
        save_patch_head: Whether a model other than LV-ViT is saved with its patch head, which plain loading leaves out. Checkpoints
            always have it.
    """

    architecture: str | None = field(default=None, metadata={"help": "timm/NAME or a model type, random weights."})
    crop_pct: float | None = field(
        default=None, metadata={"help": "Share kept by the evaluation crop.", "aliases": ["--crop_fraction"]}
    )
    save_patch_head: bool = field(default=True, metadata={"help": "Save the patch head added to other models."})

    def __post_init__(self):
        if sum(bool(given) for given in (self.variant, self.architecture, self.model_name_or_path)) > 1:
            raise ValueError(
                "Give one of --variant (LV-ViT, random weights), --architecture (others, random weights) and --model_name_or_path "
                "(pretrained)."
            )
        super().__post_init__()
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must lie in (0, 1], got {self.crop_pct}.")

    @property
    def makes_lvvit(self) -> bool:
        """Whether the model is a new LV-ViT."""
        return super().makes_lvvit and self.architecture is None


def check_config_fields(config_class: type, overrides: dict[str, Any]) -> None:
    """Raises a `ValueError` with the nearest names if overrides name no fields of a configuration class."""
    # some classes are dataclasses, others have an `__init__`
    known = {entry.name for entry in fields(config_class)} | set(inspect.signature(config_class.__init__).parameters)
    known = {name for name in known - {"self", "args", "kwargs"} if not name.startswith("_")}
    known |= set(config_class.attribute_map)
    unknown = [with_nearest(key, known) for key in overrides if key not in known]
    if unknown:
        raise ValueError(f"`config_overrides` names no field of {config_class.__name__}: {'; '.join(unknown)}.")


def with_nearest(key: str, known: set[str]) -> str:
    """A name that is not known, with the known one that it may stand for."""
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{key} (did you mean {nearest[0]}?)" if nearest else key
