"""Training arguments of token labeling."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments


@dataclass
class TokenLabelTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of the published recipe and the options of token labeling.

    Args:
        learning_rate (`float`, *optional*): Peak learning rate. When it is not given, it is
            `base_learning_rate * images per optimiser step / 1024`.
        base_learning_rate (`float`, defaults to 1.6e-3): Learning rate for 1024 images per optimiser step.
        cls_weight (`float`, defaults to 1.0): Weight of the class-token loss.
        dense_weight (`float`, defaults to 1.0): Weight of the patch-token loss (beta; the paper states 0.5, the
            published commands use 1.0). 0 trains with plain labels.
        cls_target (`str`, defaults to `"dense"`): Target of the class token: `"dense"`, the label map pooled over the
            crop; `"label"`, the human label; `"blend"`, their mean where both agree on the class, else 0.9 dense and
            0.1 human (the authors' `ground_truth` option).
        label_crop (`str`, defaults to `"correct"`): `"authors"` reproduces the exchange of rows and columns in the
            authors' crops, for comparison runs.
        label_temperature (`float`, defaults to 1.0): Divides the scores of label maps before softmax.
        uncovered_tokens (`str`, defaults to `"nearest"`): What a patch token learns whose place the label map does not
            cover (maps of the centre square of an image): `"nearest"`, the labels of the nearest cell; `"ignore"`,
            nothing.
        mix_probability (`float`, defaults to 1.0): Probability that the tokens of a batch are mixed.
        mix_alpha (`float`, defaults to 1.0): Parameter of the Beta distribution of the mixing share.
        ema_decay (`float`, *optional*): Decay of the exponential moving average of the weights, which is then
            evaluated and saved (published recipe: 0.99992). Off by default.
    """

    learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate; default: scaled."})
    base_learning_rate: float = field(default=1.6e-3, metadata={"help": "Learning rate for 1024 images a step."})
    weight_decay: float = field(default=0.05, metadata={"help": "AdamW weight decay of matrices and convolutions."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 switches it off (recipe)."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Smoothing of human and dense targets."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off with dense labels."})
    # every parameter takes part in every loss, so that there is nothing to search for
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Search for unused parameters."})
    cls_weight: float = field(default=1.0, metadata={"help": "Weight of the class-token loss."})
    dense_weight: float = field(default=1.0, metadata={"help": "Weight of the patch-token loss (beta)."})
    cls_target: Literal["dense", "label", "blend"] = field(
        default="dense", metadata={"help": "Target of the class token: pooled map, human label, or both."}
    )
    label_crop: Literal["correct", "authors"] = field(
        default="correct", metadata={"help": "'authors' reproduces their exchange of rows and columns."}
    )
    label_temperature: float = field(default=1.0, metadata={"help": "Divides map scores before softmax."})
    uncovered_tokens: Literal["nearest", "ignore"] = field(
        default="nearest", metadata={"help": "Tokens outside the label map: labels of the nearest cell, or no loss."}
    )
    mix_probability: float = field(default=1.0, metadata={"help": "Probability that a batch is mixed (MixToken)."})
    mix_alpha: float = field(default=1.0, metadata={"help": "Beta parameter of the mixing share."})
    ema_decay: float | None = field(default=None, metadata={"help": "Decay of the weight average; off by default."})

    def __post_init__(self):
        self._check_token_label_options()
        if not torch.accelerator.is_available():
            # said openly, the library allows bfloat16 on a CPU; and there is nothing to pin memory for
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of images must not hang on what each process drew before
        scale_learning_rate = self.learning_rate is None
        if scale_learning_rate:
            self.learning_rate = self.base_learning_rate
        super().__post_init__()
        if scale_learning_rate:
            self.learning_rate = self.base_learning_rate * self.images_per_step / 1024

    @property
    def images_per_step(self) -> int:
        """Images that enter one optimiser step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def _check_token_label_options(self):
        lower = {"cls_weight": 0, "dense_weight": 0, "label_temperature": None, "mix_alpha": None}
        lower |= {"base_learning_rate": None, "num_train_epochs": None}
        lower |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        for name, smallest in lower.items():
            value = getattr(self, name)
            if not (value > 0 if smallest is None else value >= smallest):  # also refuses NaN
                wanted = "positive" if smallest is None else f"at least {smallest}"
                raise ValueError(f"`{name}` must be {wanted}, got {value}.")
        choices = {"cls_target": ("dense", "label", "blend"), "label_crop": ("correct", "authors")}
        choices["uncovered_tokens"] = ("nearest", "ignore")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"`label_smoothing_factor` must lie in [0, 1), got {self.label_smoothing_factor}.")
        if not 0 <= self.mix_probability <= 1:
            raise ValueError(f"`mix_probability` must lie in [0, 1], got {self.mix_probability}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in (0, 1), got {self.ema_decay}.")
        if self.learning_rate is not None and not self.learning_rate >= 0:
            raise ValueError(f"`learning_rate` must be at least 0, got {self.learning_rate}.")
