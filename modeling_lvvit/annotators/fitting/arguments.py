"""Options of fitting an annotator."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from ...data.images import MAX_PIXELS_HELP, parse_image_size
from ...per_class.weights import HELP as CLASS_WEIGHTS_HELP
from ...per_class.weights import check_class_weights
from ..arguments import DEFAULT_COLUMN


@dataclass
class FitAnnotatorArguments:
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {
        "dataset_name": "images",
        "backbone": "backbone",
        "class_weights": "head",
        "output_dir": "output",
    }
    streaming: ClassVar[bool] = False  # cross-validation needs all images
    unlabeled_dataset_name: ClassVar[None] = None  # only images with a label are fitted on
    key_column: ClassVar[None] = None

    dataset_name: str | None = HfArg(
        default=None, help="Images: Hub name, image folder, Parquet file or folder of them.", aliases=["--dataset"]
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    train_split: str = HfArg(default="train", help="Split to fit on.", aliases=["--split"])
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(
        default=DEFAULT_COLUMN,
        help="Column of classes; rows without one are left out.",
        aliases=["--label_column"],
    )
    max_train_samples: int | None = HfArg(
        default=None, help="Images of a subset, drawn over all classes as in training.", aliases=["--max_samples"]
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    num_workers: int | None = HfArg(
        default=None,
        help="Processes that read and resize images; default: one for each core, at most 16; 0: the one that computes.",
    )
    backbone: str | None = HfArg(
        default=None,
        help="Pretrained network: Hub name or folder of transformers, timm/NAME, or a folder that timm saved.",
    )
    annotator_revision: str | None = HfArg(default=None, help="Revision of the backbone on the Hub.")
    annotator_trust_remote_code: bool = HfArg(
        default=False, help="Allow code of its Hub repository.", aliases=["--trust_remote_code"]
    )
    annotator_image_size: list[int] | None = HfArg(
        default=None,
        help="Its input, and that of the annotator: side, or height and width; default: its own.",
        aliases=["--image_size"],
    )
    fit: Literal["squash", "pad", "center_crop"] = HfArg(
        default="squash", help="How images get its shape; as in lvvit annotate."
    )
    batch_size: int = HfArg(default=32, help="Images a forward pass.")
    bf16: bool = HfArg(default=False, help="Run the backbone in bfloat16.")
    class_weights: list[str] | None = HfArg(default=None, help=CLASS_WEIGHTS_HELP.format(""))
    regularization: float | None = HfArg(
        default=None,
        help="C of the logistic regression: small values hold the weights small; default: by cross-validation.",
    )
    folds: int = HfArg(
        default=0,
        help="Heads that have each not seen one of so many parts of the images: lvvit annotate then labels every image that the "
        "annotator was fitted on by the head that has not seen it; 0: one head.",
    )
    finetune_epochs: float = HfArg(
        default=0.0, help="Epochs in which the last stage of the backbone is trained with the head, afterwards."
    )
    seed: int = HfArg(default=42, help="Draws the folds, and the crops of finetuning.")
    output_dir: str | None = HfArg(
        default=None, help="Folder of the annotator; features that an earlier run left there are used again."
    )

    def __post_init__(self):
        for name in ("batch_size", "max_train_samples", "num_workers"):
            value, least = getattr(self, name), 0 if name == "num_workers" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"--folds must be 0 (off) or at least 2, got {self.folds}.")
        if self.regularization is not None and not self.regularization > 0:
            raise ValueError(f"--regularization must be above 0, got {self.regularization}.")
        if self.finetune_epochs < 0:
            raise ValueError(f"--finetune_epochs must be at least 0, got {self.finetune_epochs}.")
        if self.folds and self.finetune_epochs:
            raise ValueError(
                "--folds and --finetune_epochs exclude each other: a finetuned backbone has seen the images of all folds. "
                "Leave out one of them."
            )
        check_class_weights(self.class_weights)
        parse_image_size(self.annotator_image_size, "`annotator_image_size`")
