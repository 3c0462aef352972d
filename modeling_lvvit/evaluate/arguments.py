"""Options of an evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers.hf_argparser import HfArg

from ..data.classes.multi_label import COLUMNS_HELP, SEPARATOR_HELP, check_label_options
from ..data.images import MAX_PIXELS_HELP, parse_image_size
from ..data.loaders import NUM_WORKERS_HELP
from .classifier import InputOptions
from .two_classes import Wish


@dataclass
class EvaluationArguments:
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {
        "models": "models",
        "datasets": "test sets",
        "image_size": "models",
        "batch_size": "computation",
    }

    models: list[str] | None = HfArg(
        default=None,
        help="Classifiers: Hub names or folders of transformers, timm/NAME, folders that timm saved.",
        aliases=["--model", "--model_name_or_path"],
    )
    model_revision: str | None = HfArg(default=None, help="Revision of the models on the Hub.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")
    random_weights: bool = HfArg(default=False, help="Build architectures without weights, to try things out.")
    datasets: list[str] | None = HfArg(
        default=None,
        help="Test sets: Hub names, image folders, folders of Parquet files, or such files.",
        aliases=["--dataset", "--dataset_name"],
    )
    eval_split: str | None = HfArg(
        default=None, help="Split of all of them; default: found by name.", aliases=["--split"]
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(
        default="label", help="Column of class ids or names, or of lists of them.", aliases=["--label_column"]
    )
    label_separator: str | None = HfArg(default=None, help=SEPARATOR_HELP)
    label_column_names: list[str] | None = HfArg(default=None, help=COLUMNS_HELP)
    class_map: str | None = HfArg(
        default=None,
        help="Which class of a model is which of the data: identity, or a file; default: by name, synonym or WordNet id.",
    )
    real_labels: str | None = HfArg(
        default=None,
        help="Re-assessed labels of the first test set: imagenet, those of its validation set, or a JSON file or its URL.",
    )
    corruptions: str | None = HfArg(default=None, help="Folder of ImageNet-C.")
    positive_class: str | None = HfArg(
        default=None, help="Name of the positive one of two classes; default: the second."
    )
    min_recall: float | None = HfArg(
        default=None,
        help="Of two classes: choose the highest threshold with at least this recall of the positive one; default: Youden's J.",
    )
    min_precision: float | None = HfArg(
        default=None,
        help="Of two classes: choose the lowest threshold with at least this precision of the positive one.",
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Images of a subset of each test set, drawn over all classes.", aliases=["--max_samples"]
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    image_size: list[int] | None = HfArg(
        default=None, help="Side of the input in pixels, or height and width; default: that of each model."
    )
    crop_pct: float | None = HfArg(
        default=None,
        help="Share of the resized image that the center crop keeps; default: that of each model.",
        aliases=["--crop_fraction"],
    )
    batch_size: int = HfArg(default=32, help="Images that a device takes at a time.")
    dataloader_num_workers: int | None = HfArg(default=None, help=NUM_WORKERS_HELP, aliases=["--num_workers"])
    bf16: bool = HfArg(default=False, help="Compute in bfloat16.")
    output_file: str | None = HfArg(
        default=None,
        help="JSON file for all results and settings; the table is always printed.",
        aliases=["--output"],
    )

    def __post_init__(self):
        self.datasets = self.datasets or []
        if not self.datasets and self.corruptions is None:
            raise ValueError("Give test sets (`datasets`) or a folder of corruptions (`corruptions`).")
        if self.real_labels is not None and not self.datasets:
            raise ValueError("`real_labels` belong to a test set: give `datasets`.")
        self.input_options()  # raises on bad sizes
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if self.output_file is not None and Path(self.output_file).is_dir():
            raise ValueError(f"`output_file` {self.output_file} is a folder; give the name of a JSON file.")

        check_label_options(self.label_column_name, self.label_separator, self.label_column_names)
        Wish(self.min_recall, self.min_precision)

    @property
    def wishes_two_classes(self) -> bool:
        """Whether an option is for two classes alone."""
        return any(value is not None for value in (self.positive_class, self.min_recall, self.min_precision))

    def input_options(self) -> InputOptions:
        """Changes of the models' preprocessing."""
        return InputOptions(parse_image_size(self.image_size, "`image_size`"), self.crop_pct)
