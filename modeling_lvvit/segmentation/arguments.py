"""Options of the segmentation program: model, data, inference and training."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from transformers.hf_argparser import HfArg

from ..cli.model_arguments import ModelSourceArguments
from ..data.image_dataset import DECODE_HELP
from ..data.images import MAX_PIXELS_HELP, parse_image_size
from ..data.masks import IGNORED
from ..per_class.weights import BALANCED, MEDIAN_FREQUENCY, check_class_weights
from ..per_class.weights import HELP as CLASS_WEIGHTS_HELP
from ..training.base_arguments import BaseImageTrainingArguments
from ..training.metrics import check_best_metric
from .inference import SCALES, InferenceSettings, default_stride
from .transforms import SegmentationAugmentation


# images of an optimizer step for which the learning rate of the published recipe holds
REFERENCE_IMAGES_PER_STEP = 16
SCORES = ("mean_iou", "pixel_accuracy", "mean_accuracy")  # what an evaluation gives


@dataclass
class SegmentationModelArguments(ModelSourceArguments):
    """Which model to train, besides the fields of `ModelSourceArguments`: a new LV-ViT, a classifier, which becomes the backbone, or a
    segmentation model to go on with. `image_size` is the size of the training crops and of the windows of evaluation."""

    segmentation_head: Literal["upernet", "fcn"] | None = HfArg(
        default=None, help="upernet or fcn; default: that of the model, for a new one upernet."
    )
    evaluate_only: bool = HfArg(default=False, help="Evaluate the model without training it.")

    def __post_init__(self):
        if self.segmentation_head not in (None, "upernet", "fcn"):
            raise ValueError(f"`segmentation_head` must be upernet or fcn, got {self.segmentation_head!r}.")
        super().__post_init__()
        if self.evaluate_only and self.model_name_or_path is None:
            raise ValueError("`evaluate_only` needs a trained model: `model_name_or_path`.")


@dataclass
class SegmentationDataArguments:
    """What to train and evaluate on, and how masks stand for classes. Its options are described in their `help`."""

    dataset_name: str | None = HfArg(
        default=None,
        help="Hub name, a folder (an image folder with metadata, or Parquet files) or one Parquet file; default: the embedded digit "
        "scenes.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    train_split: str = HfArg(default="train", help="Training split.")
    eval_split: str | None = HfArg(
        default=None,
        help="Evaluation split; default: the first of validation, val, valid, dev, test, else a share of the training data.",
    )
    test_split: str | None = HfArg(default=None, help="Split that is evaluated once, at the end.")
    eval_fraction: float = HfArg(
        default=0.1, help="Share of the training data held out without an evaluation split, in (0, 1)."
    )
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    mask_column_name: str | None = HfArg(
        default=None,
        help="Column of masks; default: annotation, mask, ..., whichever is there.",
        aliases=["--mask_column"],
    )
    class_names: list[str] | None = HfArg(
        default=None,
        help="Names of the classes in the order of their ids, or one JSON or text file with them; default: id2label.json next to the "
        "data, then numbers.",
    )
    ignore_index: int | None = HfArg(
        default=None, help="Mask value of pixels that do not count; default: that of the evaluated model, else 255."
    )
    reduce_labels: bool = HfArg(default=False, help="0 in masks is no class, 1 the first one (ADE20K).")
    mask_values: list[int] | None = HfArg(
        default=None, help="Mask value of each class; default: those of the evaluated model, else the class ids."
    )
    max_train_samples: int | None = HfArg(default=None, help="Images of a random subset, to try out.")
    max_eval_samples: int | None = HfArg(default=None, help="Images of a random subset, to try out.")
    check_data: bool = HfArg(default=True, help="Look at every row before training.")
    decode_data: bool | None = HfArg(default=None, help=DECODE_HELP)
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    class_weights: list[str] | None = HfArg(
        default=None,
        help=CLASS_WEIGHTS_HELP.format("or median_frequency, of the pixels of the masks that have the class; "),
    )
    scale_min: float = HfArg(default=0.5, help="Smallest factor of the size of training images.")
    scale_max: float = HfArg(default=2.0, help="Largest factor of the size of training images.")
    max_class_share: float = HfArg(default=0.75, help="Crops filled more by a class are drawn again.")
    horizontal_flip: float | None = HfArg(default=None, help="Probability of a mirror image; default: 0.5.")
    photometric: float = HfArg(default=0.5, help="Probability of each color change.")
    short_side: int | None = HfArg(
        default=None,
        help="Shorter side in pixels of images in evaluation, to which training scales refer too; default: their own size.",
    )
    long_side: int | None = HfArg(default=None, help="Largest longer side in pixels, with short_side.")
    window: list[int] | None = HfArg(
        default=None,
        help="Windows of evaluation in pixels, a side or height and width; default: the size of the training crops. Windows as large "
        "as the images see them whole. With evaluate_only sides, windows and scales default to those of the model's training.",
    )
    stride: list[int] | None = HfArg(
        default=None,
        help="Distance of windows in pixels, a number or that of rows and columns; default: two thirds of a window.",
    )
    multi_scale: bool = HfArg(
        default=False,
        help="In the evaluation at the end also average over sizes of the image and, unless horizontal_flip is 0, mirror images.",
    )
    scales: list[float] | None = HfArg(
        default=None, help=f"Those sizes, as factors; default: {' '.join(map(str, SCALES))}."
    )

    def __post_init__(self):
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must lie in (0, 1), got {self.eval_fraction}.")
        self.augmentation()  # raises on bad strengths
        check_class_weights(self.class_weights)
        for name in ("short_side", "long_side"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is a length in pixels, got {getattr(self, name)}.")
        if self.long_side is not None and (self.short_side is None or self.long_side < self.short_side):
            raise ValueError(f"`long_side` ({self.long_side}) needs a `short_side` that is not larger.")
        for name in ("window", "stride"):
            parse_image_size(getattr(self, name), f"`{name}`", "length or two in pixels")
        if self.scales is not None and not (self.scales and all(0 < scale < math.inf for scale in self.scales)):
            raise ValueError(f"`scales` must be positive factors, got {self.scales}.")

    def augmentation(self) -> SegmentationAugmentation:
        """Strengths of the training augmentation."""
        flip = SegmentationAugmentation.horizontal_flip if self.horizontal_flip is None else self.horizontal_flip
        return SegmentationAugmentation((self.scale_min, self.scale_max), self.max_class_share, flip, self.photometric)

    @property
    def counts_class_weights(self) -> bool:
        """Whether `class_weights` are to be counted in the training masks."""
        return self.class_weights in ([BALANCED], [MEDIAN_FREQUENCY])

    @property
    def ignored_value(self) -> int:
        """`ignore_index`, or its default."""
        return IGNORED if self.ignore_index is None else self.ignore_index

    def inference(self, crop_size: tuple[int, int]) -> tuple[InferenceSettings, InferenceSettings]:
        """How images are segmented at a single scale and, with `multi_scale`, at several; `crop_size` is in pixels."""
        window = parse_image_size(self.window, "`window`") or tuple(crop_size)
        stride = parse_image_size(self.stride, "`stride`") or default_stride(window)
        if any(step > side for step, side in zip(stride, window)):
            raise ValueError(f"`stride` {stride} is larger than the windows, {window}: pixels would be left out.")
        single = InferenceSettings(window, stride, self.short_side, self.long_side)
        flip = self.augmentation().horizontal_flip > 0
        return single, replace(single, scales=tuple(map(float, self.scales or SCALES)), flip=flip)


@dataclass
class SegmentationTrainingArguments(BaseImageTrainingArguments):
    """`BaseImageTrainingArguments` with the defaults of the published segmentation recipe."""

    reference_images_per_step: ClassVar[int] = REFERENCE_IMAGES_PER_STEP

    base_learning_rate: float = HfArg(default=6e-5, help="Learning rate for 16 images a step.")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay of matrices and convolutions.")
    warmup_steps: float = HfArg(
        default=0.01,
        help="Optimizer steps of warm-up, or below 1 their share of the run (published: 1500 of 160,000).",
    )
    lr_schedule: Literal["library", "published"] = HfArg(
        default="published",
        help="published: linear warm-up and polynomial decay to 0 (schedule.polynomial_factor); library: lr_scheduler_type.",
    )
    lr_power: float = HfArg(default=1.0, help="Power of the polynomial decay.")
    # the last batch of an epoch may have a single image, of which batch norms cannot take statistics
    dataloader_drop_last: bool = HfArg(default=True, help="Leave out the last, smaller batch.")

    def check_options(self) -> None:
        """As in `BaseImageTrainingArguments`."""
        super().check_options()
        self.check_numbers(0, "warmup_steps", positive=("lr_power",))
        self.check_choice("lr_schedule", "library", "published")
        if self.lr_schedule == "published" and self.lr_scheduler_type != "linear":
            raise ValueError(f"`lr_scheduler_type` ({self.lr_scheduler_type}) needs `lr_schedule` library.")
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` has no meaning here: the loss is that of the model.")
        needs_metric = self.load_best_model_at_end or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if needs_metric and self.metric_for_best_model is None:
            # the default of the library is the loss, which an evaluation does not give
            self.metric_for_best_model = SCORES[0]
        check_best_metric(self, SCORES)


def check_options(
    model_args: SegmentationModelArguments,
    data_args: SegmentationDataArguments,
    training_args: SegmentationTrainingArguments,
) -> None:
    """Raises a `ValueError` if options do not fit each other."""
    if data_args.counts_class_weights and not data_args.check_data:
        raise ValueError(
            f"`class_weights` {data_args.class_weights[0]} counts pixels in the check of the data: leave `check_data` on."
        )
    if model_args.evaluate_only and training_args.push_to_hub:
        raise ValueError("`evaluate_only` makes nothing to publish: leave out `push_to_hub`.")
    if model_args.evaluate_only and training_args.resume_from_checkpoint is not None:
        raise ValueError(
            "`evaluate_only` trains nothing: leave out `resume_from_checkpoint` and name the checkpoint as `model_name_or_path`."
        )
