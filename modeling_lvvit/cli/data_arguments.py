"""Options of the data of a training run."""

from dataclasses import dataclass
from typing import ClassVar

from transformers.hf_argparser import HfArg

from ..annotators.online import AnnotatorArguments
from ..data.classes.multi_label import COLUMNS_HELP, SEPARATOR_HELP, check_label_options
from ..data.classes.unlabeled import UNLABELED_HELP
from ..data.image_dataset import DECODE_HELP
from ..data.images import MAX_PIXELS_HELP
from ..labels.columns import IDS_COLUMN, SCORES_COLUMN
from ..token_labeling import AugmentationConfig


@dataclass
class DataArguments(AnnotatorArguments):
    """What to train and evaluate on, besides the fields of `AnnotatorArguments`; for the last five see `AugmentationConfig`."""

    option_groups: ClassVar[dict[str, str]] = {
        "dataset_name": "data",
        "unlabeled_dataset_name": "images without human labels",
        "token_labels": "dense labels",
        "annotator": "dense labels by an annotator in training",
        "streaming": "data",
        "crop_scale_min": "augmentation",
    }

    dataset_name: str | None = HfArg(
        default=None,
        help="Hub name, folder (images, or Parquet files) or Parquet file; default: digit scenes that are drawn here.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    train_split: str = HfArg(default="train", help="Training split.")
    eval_split: str | None = HfArg(
        default=None, help="Evaluation split; default: the first of validation, val, valid, dev, test."
    )
    eval_fraction: float = HfArg(default=0.1, help="Share of training rows, in (0, 1), where no such split is.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(
        default="label", help="Column of class ids or names, or of lists of them.", aliases=["--label_column"]
    )
    label_separator: str | None = HfArg(default=None, help=SEPARATOR_HELP)
    label_column_names: list[str] | None = HfArg(default=None, help=COLUMNS_HELP)
    mask_column_name: str | None = HfArg(
        default=None,
        help="Column of masks with ids of the label column, by which the maps of the model are measured at the end; default: mask, if there.",
        aliases=["--mask_column"],
    )
    unlabeled_dataset_name: str | None = HfArg(default=None, help=UNLABELED_HELP)
    max_labeled_samples: int | None = HfArg(
        default=None,
        help="Use the human labels of so many training images only, drawn over all classes. The others learn from dense labels, and "
        "where there are none they are left out.",
    )
    unlabeled_min_confidence: float = HfArg(
        default=0.0,
        help="Leave out images without a human label whose label map gives no class this probability, in [0, 1].",
    )
    unlabeled_per_class: int | None = HfArg(
        default=None,
        help="Of each class that the label maps name, train on so many images without a human label: the surest ones.",
    )
    token_labels: str | None = HfArg(
        default=None, help="Label set to join: Hub name or folder; default: two columns of the data, if there."
    )
    token_labels_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    key_column: str | None = HfArg(
        default=None, help="Column of keys of the label set; default: paths or row numbers."
    )
    key_pattern: str | None = HfArg(default=None, help="Expression that cuts the key out of both sides.")
    token_label_ids_column: str = HfArg(default=IDS_COLUMN, help="Dense-label ids.")
    token_label_scores_column: str = HfArg(default=SCORES_COLUMN, help="Dense-label scores.")
    use_token_labels: bool = HfArg(default=True, help="Train with dense labels where there are any.")
    require_token_labels: bool = HfArg(default=False, help="Stop where dense labels are missing.")
    streaming: bool = HfArg(
        default=False,
        help="Read training images one after another, without preparing all; needs --max_steps, a ClassLabel column and an evaluation split.",
    )
    shuffle_buffer: int = HfArg(default=1000, help="Images among which a stream draws the next one.")
    max_train_samples: int | None = HfArg(default=None, help="Images of a subset, drawn over all classes.")
    max_eval_samples: int | None = HfArg(default=None, help="Images of a subset, drawn over all classes.")
    check_data: bool = HfArg(default=True, help="Look at every row before training.")
    decode_data: bool | None = HfArg(default=None, help=DECODE_HELP)
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    crop_scale_min: float = HfArg(default=0.08, help="Smallest area share of a training crop.")
    horizontal_flip: float | None = HfArg(default=None, help="Probability of a mirror image; default: 0.5.")
    rand_augment: str = HfArg(default="rand-m9-mstd0.5-inc1", help="RandAugment in timm's notation, or none.")
    color_jitter: float = HfArg(default=0.0, help="Strength of color changes.")
    random_erasing: float = HfArg(default=0.25, help="Probability of an erased rectangle.")
    exact_resize: bool = HfArg(
        default=False,
        help="Resample training crops with Pillow from all pixels of their images: slower, and hardly different.",
    )

    def __post_init__(self):
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must lie in (0, 1), got {self.eval_fraction}.")
        check_label_options(self.label_column_name, self.label_separator, self.label_column_names)
        if self.horizontal_flip is None:
            self.horizontal_flip = AugmentationConfig.horizontal_flip
        self.augmentation()  # raises on bad strengths
        self.check_annotator()
        if not 0 <= self.unlabeled_min_confidence <= 1:
            raise ValueError(f"`unlabeled_min_confidence` must lie in [0, 1], got {self.unlabeled_min_confidence}.")
        for name in ("unlabeled_per_class", "max_labeled_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.selects_unlabeled and self.annotator is not None:
            raise ValueError(
                "`unlabeled_min_confidence` and `unlabeled_per_class` choose by stored label maps (`token_labels`)."
            )
        if self.streaming and (
            self.unlabeled_dataset_name is not None or self.max_labeled_samples is not None or self.selects_unlabeled
        ):
            raise ValueError(
                "Images without labels are not added to a stream, nor chosen in one: leave out `streaming`."
            )
        if self.annotator is not None and self.token_labels is not None:
            raise ValueError("Give --token_labels (stored) or --annotator (labels every crop), not both.")
        if self.annotator is not None:
            self.use_token_labels = False  # of the data's own columns

    @property
    def selects_unlabeled(self) -> bool:
        """Whether some images without a human label are left out."""
        return self.unlabeled_min_confidence > 0 or self.unlabeled_per_class is not None

    @property
    def dense_columns(self) -> tuple[str, str]:
        """Names of the columns of dense labels in the data itself."""
        return self.token_label_ids_column, self.token_label_scores_column

    def augmentation(self) -> AugmentationConfig:
        """Strengths of the training augmentation."""
        return AugmentationConfig(
            crop_scale=(self.crop_scale_min, 1.0),
            horizontal_flip=self.horizontal_flip,
            rand_augment=self.rand_augment,
            color_jitter=self.color_jitter,
            # an annotator looks at crops before they are erased, see `OnlineAnnotator`
            random_erasing=self.random_erasing if self.annotator is None else 0.0,
        )
