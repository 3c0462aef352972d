"""Options of the data of a training run."""

from dataclasses import dataclass, field

from ..annotators.online import AnnotatorArguments
from ..labels.columns import IDS_COLUMN, SCORES_COLUMN
from ..token_labeling.transforms import AugmentationConfig


@dataclass
class DataArguments(AnnotatorArguments):
    """What to train and evaluate on, besides the fields of `AnnotatorArguments`.

    Args:
        dataset_name: Hub name, a folder (image folder, or Parquet files), or one Parquet file. Without it the embedded
            digit scenes are used.
        dataset_config_name, dataset_revision: Configuration and revision on the Hub.
        train_split, eval_split: Split names; without `eval_split` the first of validation, val, valid, dev, test, else
            a share of the training data.
        eval_fraction: That share, in (0, 1).
        image_column, label_column: Column names.
        token_labels: Label set to join to the training images: Hub name or folder. Without it dense labels are taken
            from two columns of the data itself, where it has them.
        token_labels_revision: Revision on the Hub.
        key_column: Column of the images that holds the keys of the label set; default: see `image_keys`.
        key_pattern: Regular expression that cuts the key out of both; see `LabelSet.join`.
        token_label_ids_column, token_label_scores_column: Dense-label columns.
        use_token_labels: Whether to train with dense labels where the data has them.
        require_token_labels: Whether to stop where they are missing, instead of training with plain labels.
        streaming: Whether to read training images one after another, from the Hub or from files, without preparing all of
            them first. Needs `--max_steps`, a `ClassLabel` column and an evaluation split, which is prepared as usual.
        shuffle_buffer: Images among which a stream draws the next one.
        max_train_samples, max_eval_samples: Keep the first rows only; for trying things out.
        check_data: Whether to look at every row before training.
        crop_scale_min, horizontal_flip, rand_augment, color_jitter, random_erasing: See `AugmentationConfig`.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name, folder or Parquet file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    train_split: str = field(default="train", metadata={"help": "Training split."})
    eval_split: str | None = field(default=None, metadata={"help": "Evaluation split; default: found by name."})
    eval_fraction: float = field(default=0.1, metadata={"help": "Share of training rows where no such split is."})
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of class ids or names."})
    token_labels: str | None = field(default=None, metadata={"help": "Label set to join: Hub name or folder."})
    token_labels_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    key_column: str | None = field(default=None, metadata={"help": "Column of keys; default: paths or row numbers."})
    key_pattern: str | None = field(default=None, metadata={"help": "Expression that cuts the key out of both sides."})
    token_label_ids_column: str = field(default=IDS_COLUMN, metadata={"help": "Dense-label ids."})
    token_label_scores_column: str = field(default=SCORES_COLUMN, metadata={"help": "Dense-label scores."})
    use_token_labels: bool = field(default=True, metadata={"help": "Train with dense labels where there are any."})
    require_token_labels: bool = field(default=False, metadata={"help": "Stop where dense labels are missing."})
    streaming: bool = field(default=False, metadata={"help": "Read training images one after another."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Images among which a stream draws the next one."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Keep the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Keep the first rows only."})
    check_data: bool = field(default=True, metadata={"help": "Look at every row before training."})
    crop_scale_min: float = field(default=0.08, metadata={"help": "Smallest area share of a training crop."})
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a mirror image."})
    rand_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "RandAugment in timm's notation, or none."}
    )
    color_jitter: float = field(default=0.0, metadata={"help": "Strength of color changes."})
    random_erasing: float = field(default=0.25, metadata={"help": "Probability of an erased rectangle."})

    def __post_init__(self):
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must lie in (0, 1), got {self.eval_fraction}.")
        self.augmentation()  # raises on bad strengths
        self.check_annotator()
        if self.annotator is not None and self.token_labels is not None:
            raise ValueError("Give --token_labels (stored) or --annotator (labels every crop), not both.")
        if self.annotator is not None:
            self.use_token_labels = False  # of the data's own columns

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
