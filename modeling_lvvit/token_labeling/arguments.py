"""Training arguments of token labeling."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from transformers.hf_argparser import HfArg
from transformers.trainer_utils import SchedulerType

from ..data.sampling import BALANCED
from ..labels.label_crops import LabelCrop
from ..per_class.weights import HELP as CLASS_WEIGHTS_HELP
from ..per_class.weights import check_class_weights
from ..training.base_arguments import BaseImageTrainingArguments
from ..training.schedule import REFERENCE_IMAGES_PER_STEP
from .augmentation import MIX_METHODS


@dataclass
class TokenLabelTrainingArguments(BaseImageTrainingArguments):
    """`BaseImageTrainingArguments` with the defaults of the published recipe and the options of token labeling, which are described in
    their `help`. The paper states a `dense_weight` (beta) of 0.5, the published commands use 1.0."""

    reference_images_per_step: ClassVar[int] = REFERENCE_IMAGES_PER_STEP
    option_groups: ClassVar[dict[str, str]] = {
        "output_dir": "training",
        "min_steps": "training",
        "lr_schedule": "learning-rate schedule",
        "cls_weight": "token labeling",
        "ema_decay": "weight average",
    }
    alternatives: ClassVar[tuple[str, ...]] = ("ema_decay", "base_ema_decay")  # at most one of them is given
    switches_off: ClassVar[dict[str, str]] = {
        "num_train_epochs": "min_steps"
    }  # options -> those of earlier recipes that they end

    base_learning_rate: float = HfArg(default=1.6e-3, help="Learning rate for 1024 images a step.")
    min_steps: int = HfArg(
        default=0,
        help="Where num_train_epochs make fewer optimizer steps than this, as with few images, train for more epochs.",
    )
    lr_schedule: Literal["library", "published"] = HfArg(
        default="library",
        help="library: that of lr_scheduler_type and warmup_steps; published: the authors' warm-up and cosine by epochs, with the "
        "options that follow (schedule.published_factor).",
    )
    warmup_epochs: float = HfArg(
        default=5, help="Epochs of linear warm-up, part of num_train_epochs; published schedule."
    )
    cooldown_epochs: float = HfArg(
        default=10, help="Last epochs, at the minimum, part of num_train_epochs; published schedule."
    )
    base_warmup_learning_rate: float = HfArg(
        default=1e-6, help="Start of warm-up for 1024 images a step, scaled like the peak."
    )
    base_min_learning_rate: float = HfArg(default=1e-5, help="Minimum for 1024 images a step, scaled like the peak.")
    weight_decay: float = HfArg(default=0.05, help="AdamW weight decay of matrices and convolutions.")
    lr_scheduler_type: SchedulerType | str = HfArg(default="cosine", help="Learning-rate schedule.")
    label_smoothing_factor: float = HfArg(default=0.1, help="Smoothing of human and dense targets.")
    cls_weight: float = HfArg(default=1.0, help="Weight of the class-token loss.")
    dense_weight: float = HfArg(default=1.0, help="Weight of the patch-token loss (beta); 0 trains with plain labels.")
    cls_target: Literal["dense", "label", "blend"] = HfArg(
        default="dense",
        help="Target of the class token: dense, the label map pooled over the crop; label, the human label; blend, their mean "
        "where both agree on the class, else 0.9 dense and 0.1 human (the authors' ground_truth option).",
    )
    patch_target: Literal["dense", "image"] = HfArg(
        default="dense",
        help="Target of the patch tokens: dense, the label map, each token its place; image, the human label by the mean of their "
        "scores, so that labels of places emerge and the model can annotate for others (arXiv:2401.03844), without dense labels.",
    )
    cell_target: Literal["map", "label", "blend", "ignore"] = HfArg(
        default="map",
        help="Target of patch tokens whose label map is in doubt (cell_doubt): map, the map all the same; label, the human label; blend, "
        "the mean of both; ignore, nothing. Without a human label, label and blend keep the map.",
    )
    cell_doubt: Literal["contradiction", "confidence", "either"] = HfArg(
        default="contradiction",
        help="Which tokens are in doubt: those whose most probable class is not the human label; those for whose class the map has a "
        "probability below cell_confidence; or either.",
    )
    cell_confidence: float = HfArg(
        default=0.5, help="Lowest probability of a token's class, in [0, 1]; see cell_doubt."
    )
    class_weights: list[str] | None = HfArg(
        default=None, help=CLASS_WEIGHTS_HELP.format("scaled to a mean of 1 over the training images; ")
    )
    train_sampling_strategy: str = HfArg(
        default="random",
        help="Order of training images: random; sequential; or balanced, drawn with replacement, of every class as often; and those of "
        "the library for sequences.",
        metadata={"choices": ["random", "sequential", BALANCED, "group_by_length", "batch_rebalance"]},
    )
    label_crop: LabelCrop = HfArg(
        default="correct",
        help="authors reproduces the exchange of rows and columns in the authors' crops, for comparisons.",
    )
    label_temperature: float = HfArg(default=1.0, help="Divides scores of label maps before softmax.")
    uncovered_tokens: Literal["nearest", "ignore"] = HfArg(
        default="nearest",
        help="What a patch token learns whose place the label map does not cover (maps of the center square of an image): nearest, "
        "the labels of the nearest cell; ignore, nothing: each micro-batch takes the mean over its own counted tokens.",
    )
    mix_probability: float = HfArg(default=1.0, help="Probability that the images of a batch are mixed.")
    mix_methods: list[str] = HfArg(
        default_factory=lambda: ["token"],
        help="token (MixToken), cutmix, mixup; of several, one is drawn for each batch.",
    )
    mix_alpha: float = HfArg(default=1.0, help="Beta parameter of the share of a mixed box (MixToken, CutMix).")
    mixup_alpha: float = HfArg(default=0.8, help="Beta parameter of Mixup.")
    ema_decay: float | None = HfArg(
        default=None,
        help="Decay of the moving average of the weights, which is then evaluated and saved; default: off.",
    )
    base_ema_decay: float | None = HfArg(
        default=None,
        help="Instead, the decay for 1024 images a step (published: 0.99992), adjusted to the batch size and, in a short run, to "
        "its number of steps (schedule.scaled_ema_decay).",
    )
    evaluate_raw_weights: bool = HfArg(
        default=True,
        help="Also report the accuracy of the weights themselves, next to that of their average, in training.",
    )

    @property
    def has_ema(self) -> bool:
        """Whether the weights are averaged."""
        return self.ema_decay is not None or self.base_ema_decay is not None

    def lengthen(self, num_images: int) -> bool:
        """Raises `num_train_epochs` to what `min_steps` need with so many training images, in whole epochs, unless `max_steps` say how many.
        Returns whether they were too few."""
        needed = math.ceil(self.min_steps / self._steps_per_epoch(num_images))
        if self.max_steps > 0 or needed <= self.num_train_epochs:
            return False
        self.num_train_epochs = float(needed)
        return True

    def optimizer_steps(self, num_images: int) -> int:
        """How many optimizer steps a run with so many training images makes."""
        return (
            self.max_steps
            if self.max_steps > 0
            else math.ceil(self.num_train_epochs * self._steps_per_epoch(num_images))
        )

    def _steps_per_epoch(self, num_images: int) -> int:
        batches = num_images / (self.train_batch_size * self.world_size)
        batches = max(1, math.floor(batches)) if self.dataloader_drop_last else math.ceil(batches)
        return math.ceil(batches / self.gradient_accumulation_steps)

    def check_options(self) -> None:
        """As in `BaseImageTrainingArguments`."""
        super().check_options()
        learning_rates = ("base_warmup_learning_rate", "base_min_learning_rate")
        self.check_numbers(
            0, "cls_weight", "dense_weight", "warmup_epochs", "cooldown_epochs", "min_steps", *learning_rates
        )
        self.check_numbers(positive=("label_temperature", "mix_alpha", "mixup_alpha"))
        for name in (
            "cls_target",
            "cell_target",
            "cell_doubt",
            "label_crop",
            "uncovered_tokens",
            "lr_schedule",
            "patch_target",
        ):
            self.check_choice(name, *get_args(type(self).__dataclass_fields__[name].type))
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1), got {self.label_smoothing_factor}.")
        if not 0 <= self.cell_confidence <= 1:
            raise ValueError(f"`cell_confidence` must lie in [0, 1], got {self.cell_confidence}.")
        if not 0 <= self.mix_probability <= 1:
            raise ValueError(f"`mix_probability` must lie in [0, 1], got {self.mix_probability}.")
        self._check_mixing_and_average()
        self.class_weights = [self.class_weights] if isinstance(self.class_weights, str) else self.class_weights
        check_class_weights(self.class_weights)
        self.check_choice(
            "train_sampling_strategy", *type(self).__dataclass_fields__["train_sampling_strategy"].metadata["choices"]
        )
        if self.lr_schedule == "published" and self.num_train_epochs <= self.warmup_epochs + self.cooldown_epochs:
            raise ValueError(
                f"`num_train_epochs` ({self.num_train_epochs}) must be more than `warmup_epochs` ({self.warmup_epochs}) and "
                f"`cooldown_epochs` ({self.cooldown_epochs}) together; shorten these for a short run."
            )

    def _check_mixing_and_average(self):
        if isinstance(self.mix_methods, str):
            self.mix_methods = [self.mix_methods]
        if not self.mix_methods or set(self.mix_methods) - set(MIX_METHODS):
            raise ValueError(f"`mix_methods` must be some of {', '.join(MIX_METHODS)}, got {self.mix_methods}.")
        for name in ("ema_decay", "base_ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"`{name}` must lie in (0, 1), got {value}.")
        if self.ema_decay is not None and self.base_ema_decay is not None:
            raise ValueError("Give `ema_decay` (as it is) or `base_ema_decay` (to be scaled), not both.")
