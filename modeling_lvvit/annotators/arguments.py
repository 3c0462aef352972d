"""Options of annotation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from ..data.classes.unlabeled import UNLABELED_HELP
from ..data.images import MAX_PIXELS_HELP, parse_image_size
from ..hub.repository import HubUploadArguments
from .text.prompts import PROMPTS_HELP, TEXT_PREFIX, check_text_options


DEFAULT_COLUMN = "label"
TOP_K, FEW_CLASSES = (
    5,
    16,
)  # classes kept for each cell; of so few all (0.7 points of a student on CIFAR-10, see README)


@dataclass
class AnnotateArguments(HubUploadArguments):
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {
        "dataset_name": "images",
        "annotator": "annotator",
        "output_dir": "label set",
        "hub_model_id": "upload",
    }

    dataset_name: str | None = HfArg(
        default=None, help="Images: Hub name, image folder, Parquet file or folder of them.", aliases=["--dataset"]
    )
    unlabeled_dataset_name: str | None = HfArg(default=None, help=UNLABELED_HELP)
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    train_split: str = HfArg(default="train", help="Split to annotate.", aliases=["--split"])
    streaming: bool = HfArg(default=False, help="Read images one after another without preparing all.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(
        default=DEFAULT_COLUMN,
        help="Column whose classes the labels shall have, if there is one.",
        aliases=["--label_column"],
    )
    key_column: str | None = HfArg(default=None, help="Column that tells images apart; default: paths.")
    number_rows: bool = HfArg(default=False, help="Tell images apart by their row number.")
    max_train_samples: int | None = HfArg(
        default=None,
        help="Images of a subset, drawn over all classes as in training; in a stream the first ones.",
        aliases=["--max_samples"],
    )
    on_error: Literal["stop", "empty"] = HfArg(default="stop", help="Damaged image: stop, or an empty label.")
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    num_workers: int | None = HfArg(
        default=None,
        help="Processes that read and resize images; default: one for each core, at most 16; 0: the one that annotates.",
    )
    annotator: str | None = HfArg(
        default=None,
        help="Classifier: Hub name or folder of transformers, or timm/NAME; or image-text model: text:NAME (CLIP, SigLIP, CLIPSeg).",
    )
    prompts: str | None = HfArg(default=None, help=PROMPTS_HELP)
    annotator_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    annotator_trust_remote_code: bool = HfArg(
        default=False, help="Allow code of its Hub repository.", aliases=["--trust_remote_code"]
    )
    annotator_image_size: list[int] | None = HfArg(
        default=None, help="Its input: side, or height and width.", aliases=["--image_size"]
    )
    annotator_class_map: str | None = HfArg(
        default=None, help="File that pairs classes (JSON, CSV), or: identity.", aliases=["--class_map"]
    )
    annotator_ignore_extra_classes: bool = HfArg(
        default=False, help="Drop classes the data lacks.", aliases=["--ignore_extra_classes"]
    )
    random_weights: bool = HfArg(default=False, help="Architecture without weights; to try things out.")
    fit: Literal["squash", "pad", "center_crop"] = HfArg(
        default="squash", help="How images get its shape (see README)."
    )
    five_crop: bool = HfArg(
        default=False,
        help="Average the map of the whole image with those of five windows of it: better labels of crops for six times the work.",
    )
    batch_size: int = HfArg(default=32, help="Images a forward pass.")
    bf16: bool = HfArg(default=False, help="Run the annotator in bfloat16.")
    output_dir: str | None = HfArg(default=None, help="Folder of the label set; an unfinished one is continued.")
    top_k: int | None = HfArg(
        default=None, help=f"Classes kept for each cell; default: {TOP_K}, of at most {FEW_CLASSES} all."
    )
    scores: Literal["logits", "relative"] | None = HfArg(
        default=None,
        help="Logits as they are, or relative to the classes left out; default: logits, of text:MODEL relative.",
    )
    score_type: Literal["float16", "int8"] = HfArg(
        default="float16", help="float16 is lossless; int8 rounds scores to 0.375."
    )
    rows_per_shard: int | None = HfArg(default=None, help="Rows of a Parquet file.")

    def __post_init__(self):
        for name in ("top_k", "batch_size", "max_train_samples", "num_workers", "rows_per_shard"):
            value, least = getattr(self, name), 0 if name == "num_workers" else 1
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}.")
        if self.streaming and self.unlabeled_dataset_name is not None:
            raise ValueError(
                "Images without labels are not added to a stream: leave out `streaming`, or annotate them by themselves."
            )
        is_text = self.annotator is not None and self.annotator.startswith(TEXT_PREFIX)
        self.scores = self.scores or ("relative" if is_text else "logits")
        parse_image_size(self.annotator_image_size, "`annotator_image_size`")
        options = (self.annotator_class_map, self.annotator_ignore_extra_classes)
        check_text_options(self.annotator, self.prompts, *options)
        self.check_upload()
