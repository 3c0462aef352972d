"""Training arguments of token labeling."""

import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from .batch_norm import BatchNormMode
from .collator import MIX_METHODS
from .label_crops import LabelCrop


# images of an optimiser step for which learning rates and decays of the published recipe hold
REFERENCE_IMAGES_PER_STEP = 1024


@dataclass
class TokenLabelTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the published recipe and the options of token labeling.

    Args:
        learning_rate (`float`, *optional*): Peak learning rate. When it is not given, it is
            `base_learning_rate * images per optimiser step / 1024`.
        base_learning_rate (`float`, defaults to 1.6e-3): Learning rate for 1024 images per optimiser step.
        lr_schedule (`str`, defaults to `"library"`): `"library"`, that of `lr_scheduler_type` and `warmup_steps`;
            `"published"`, the authors' (see `schedule.published_factor`), with the options that follow.
        warmup_epochs, cooldown_epochs (`float`, defaults to 5 and 10): Epochs of linear warm-up, and at the minimum at the end;
            both are part of `num_train_epochs`.
        base_warmup_learning_rate, base_min_learning_rate (`float`, defaults to 1e-6 and 1e-5): Learning rate at the start of
            warm-up and at the end, for 1024 images a step; scaled like the peak.
        cls_weight (`float`, defaults to 1.0): Weight of the class-token loss.
        dense_weight (`float`, defaults to 1.0): Weight of the patch-token loss (beta; the paper states 0.5, the
            published commands use 1.0). 0 trains with plain labels.
        cls_target (`str`, defaults to `"dense"`): Target of the class token: `"dense"`, the label map pooled over the
            crop; `"label"`, the human label; `"blend"`, their mean where both agree on the class, else 0.9 dense and
            0.1 human (the authors' `ground_truth` option).
        patch_target (`str`, defaults to `"dense"`): What the patch tokens learn: `"dense"`, the label map, each token its place;
            `"image"`, the human label by the mean of their scores, so that labels of places emerge by themselves. A model
            trained so is an annotator for others (Zhao et al. 2023, arXiv:2401.03844). Needs no dense labels.
        label_crop (`str`, defaults to `"correct"`): `"authors"` reproduces the exchange of rows and columns in the
            authors' crops, for comparison runs.
        label_temperature (`float`, defaults to 1.0): Divides the scores of label maps before softmax.
        uncovered_tokens (`str`, defaults to `"nearest"`): What a patch token learns whose place the label map does not
            cover (maps of the centre square of an image): `"nearest"`, the labels of the nearest cell; `"ignore"`,
            nothing. Then each micro-batch takes the mean over its own counted tokens.
        mix_probability (`float`, defaults to 1.0): Probability that the images of a batch are mixed.
        mix_methods (`list[str]`, defaults to `["token"]`): How: `"token"` (MixToken), `"cutmix"`, `"mixup"`; one of several is
            drawn for each batch.
        mix_alpha (`float`, defaults to 1.0): Parameter of the Beta distribution of the share of a box (MixToken, CutMix).
        mixup_alpha (`float`, defaults to 0.8): The same for Mixup.
        ema_decay (`float`, *optional*): Decay of the exponential moving average of the weights, which is then
            evaluated and saved. Off by default.
        base_ema_decay (`float`, *optional*): Instead, the decay for 1024 images a step (published recipe: 0.99992), adjusted to
            the batch size and, in a short run, to its number of steps (see `schedule.scaled_ema_decay`).
        evaluate_raw_weights (`bool`, defaults to `True`): Whether evaluation during training also reports the accuracy of the
            weights themselves, beside that of their average.
        batch_norm (`str`, defaults to `"local"`): Statistics of the batch norms in the stem: `"local"`, of the images of a
            device, as the authors; `"synchronized"`, of all devices; `"frozen"`, those of the checkpoint.
    """

    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate; default: scaled."})
    base_learning_rate: float = field(default=1.6e-3, metadata={"help": "Learning rate for 1024 images a step."})
    lr_schedule: Literal["library", "published"] = field(
        default="library", metadata={"help": "'published' is the authors' warm-up and cosine by epochs."}
    )
    warmup_epochs: float = field(default=5, metadata={"help": "Epochs of warm-up of the published schedule."})
    cooldown_epochs: float = field(default=10, metadata={"help": "Last epochs at the minimum, published schedule."})
    base_warmup_learning_rate: float = field(default=1e-6, metadata={"help": "Start of warm-up, 1024 images a step."})
    base_min_learning_rate: float = field(default=1e-5, metadata={"help": "Minimum for 1024 images a step."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices and convolutions."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 switches it off (recipe)."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Smoothing of human and dense targets."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  the library's own spelling, which its parser knows
        default="tensorboard", metadata={"help": "Where to log: tensorboard, wandb, ..., or none."}
    )
    # the filter reads every loss as soon as it is computed, so that the device waits for the processor; it also hides NaN
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of logs."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off with dense labels."})
    # every parameter takes part in every loss, so that there is nothing to search for
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Search for unused parameters."})
    cls_weight: float = field(default=1.0, metadata={"help": "Weight of the class-token loss."})
    dense_weight: float = field(default=1.0, metadata={"help": "Weight of the patch-token loss (beta)."})
    cls_target: Literal["dense", "label", "blend"] = field(
        default="dense", metadata={"help": "Target of the class token: pooled map, human label, or both."}
    )
    patch_target: Literal["dense", "image"] = field(
        default="dense", metadata={"help": "Target of patch tokens: label map, or image label by their mean."}
    )
    label_crop: LabelCrop = field(
        default="correct", metadata={"help": "'authors' reproduces their exchange of rows and columns."}
    )
    label_temperature: float = field(default=1.0, metadata={"help": "Divides map scores before softmax."})
    uncovered_tokens: Literal["nearest", "ignore"] = field(
        default="nearest", metadata={"help": "Tokens outside the label map: labels of the nearest cell, or no loss."}
    )
    mix_probability: float = field(default=1.0, metadata={"help": "Probability that a batch is mixed."})
    mix_methods: list[str] = field(
        default_factory=lambda: ["token"],
        metadata={"help": "token (MixToken), cutmix, mixup; one is drawn for a batch."},
    )
    mix_alpha: float = field(default=1.0, metadata={"help": "Beta parameter of the share of a mixed box."})
    mixup_alpha: float = field(default=0.8, metadata={"help": "Beta parameter of Mixup."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the weight average; off by default."})
    base_ema_decay: float | None = field(
        default=None,
        metadata={"help": "The same for 1024 images a step, adjusted to batch size and length of the run."},
    )
    evaluate_raw_weights: bool = field(
        default=True, metadata={"help": "Evaluate the weights themselves beside their average."}
    )
    batch_norm: BatchNormMode = field(
        default="local", metadata={"help": "Batch-norm statistics: of one device, synchronized, or frozen."}
    )

    def __post_init__(self):
        self._check_token_label_options()
        if not torch.accelerator.is_available():
            # said openly, the library allows bfloat16 on a CPU; and there is nothing to pin memory for
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.accelerator_config is None:  # pinned batches are copied while the device computes
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of images must not hang on what each process drew before
        self.is_learning_rate_scaled = self.learning_rate is None
        if self.is_learning_rate_scaled:
            self.learning_rate = self.base_learning_rate
        super().__post_init__()
        # accelerate's loading by one process (its default under FSDP) cannot pass on batch-norm statistics (its issue 3898)
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if self.fsdp_plugin_args is not None:
            self.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
        if self.is_learning_rate_scaled:
            self.learning_rate = self.base_learning_rate * self.images_per_step / REFERENCE_IMAGES_PER_STEP

    @property
    def has_ema(self) -> bool:
        """Whether the weights are averaged."""
        return self.ema_decay is not None or self.base_ema_decay is not None

    @property
    def images_per_step(self) -> int:
        """Images that enter one optimiser step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _check_token_label_options(self):
        lower = {"cls_weight": 0, "dense_weight": 0, "label_temperature": None, "mix_alpha": None, "mixup_alpha": None}
        lower |= {
            "warmup_epochs": 0,
            "cooldown_epochs": 0,
            "base_warmup_learning_rate": 0,
            "base_min_learning_rate": 0,
        }
        lower |= {"base_learning_rate": None, "num_train_epochs": None}
        lower |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        for name, smallest in lower.items():
            value = getattr(self, name)
            if not (value > 0 if smallest is None else value >= smallest):  # also refuses NaN
                wanted = "positive" if smallest is None else f"at least {smallest}"
                raise ValueError(f"`{name}` must be {wanted}, got {value}.")
        choices = {"cls_target": ("dense", "label", "blend"), "label_crop": ("correct", "authors")}
        choices |= {"uncovered_tokens": ("nearest", "ignore"), "lr_schedule": ("library", "published")}
        choices |= {"batch_norm": ("local", "synchronized", "frozen"), "patch_target": ("dense", "image")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1), got {self.label_smoothing_factor}.")
        if not 0 <= self.mix_probability <= 1:
            raise ValueError(f"`mix_probability` must lie in [0, 1], got {self.mix_probability}.")
        self._check_mixing_and_average()
        if self.learning_rate is not None and not self.learning_rate >= 0:
            raise ValueError(f"`learning_rate` must be at least 0, got {self.learning_rate}.")
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
