"""What the training arguments of all programs share."""

import math
import os
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import HubStrategy

from ..data.loaders import NUM_WORKERS_HELP, PREFETCH_FACTOR, default_num_workers
from .batch_norm import BatchNormMode
from .callbacks import choose_early_stopping_schedule


RESUME_WORDS = {"true": "last", "yes": "last", "false": None, "no": None, "none": None}


@dataclass
class BaseImageTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose learning rate follows the batch size, with defaults for images. Its options are described in their `help`."""

    reference_images_per_step: ClassVar[int] = 1
    option_groups: ClassVar[dict[str, str]] = {"output_dir": "training"}

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate; default: base_learning_rate times the images of an optimizer step, divided by those of the "
            "reference batch."
        },
    )
    base_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate for a reference batch."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 switches it off (recipe)."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  the library's own spelling, which its parser knows
        default="tensorboard", metadata={"help": "Where to log: tensorboard, wandb, ..., or none."}
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Steps between two logs, or below 1 their share of the run."}
    )
    # the filter reads every loss as soon as it is computed, so that the device waits for the processor; it also hides NaN
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of logs."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: samples are made of them."})
    ddp_timeout: int = field(
        default=86_400, metadata={"help": "Seconds to wait for another process, which may be checking all images."}
    )
    # every parameter takes part in every loss, so that there is nothing to search for
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Search for unused parameters."})
    # of the library: every_save, which puts drafts in the place of a finished model that is there already
    hub_strategy: HubStrategy | str = field(
        default="end", metadata={"help": "What --push_to_hub publishes: end, or every_save."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "End training after so many evaluations in a row without a better metric_for_best_model; the best checkpoint is kept, "
            "saved and published. Evaluates and saves every epoch unless eval_strategy, eval_steps or save_steps say otherwise; default: "
            "off."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "How much better than the best value so far counts as better."}
    )
    batch_norm: BatchNormMode = field(
        default="local",
        metadata={
            "help": "Statistics of batch norms: local, of the images of a device, as the authors; synchronized, of all devices; frozen, "
            "those of the checkpoint."
        },
    )

    dataloader_num_workers: int | None = field(default=None, metadata={"help": NUM_WORKERS_HELP})
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Keep these processes from one epoch to the next; default: true."}
    )
    dataloader_prefetch_factor: int | None = field(
        default=None,
        metadata={"help": f"Batches that each of these processes loads ahead; default: {PREFETCH_FACTOR}."},
    )

    def __post_init__(self):
        self.check_options()
        if not torch.accelerator.is_available():
            # said openly, the library allows bfloat16 on a CPU; and there is nothing to pin memory for
            self.use_cpu, self.dataloader_pin_memory = True, False
        self._given_to_workers = (self.dataloader_persistent_workers, self.dataloader_prefetch_factor)
        given = self.dataloader_num_workers
        self.use_workers(default_num_workers(self.use_cpu) if given is None else given)
        if self.accelerator_config is None:  # pinned batches are copied while the device computes
            self.accelerator_config = {"non_blocking": self.dataloader_pin_memory}
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of images must not depend on what each process drew before
        self.is_learning_rate_scaled = self.learning_rate is None
        if self.is_learning_rate_scaled:
            self.learning_rate = self.base_learning_rate
        super().__post_init__()
        config = self.accelerator_config
        if (
            config.dispatch_batches
            or config.split_batches
            or not config.even_batches
            or not config.use_seedable_sampler
        ):
            raise ValueError(
                "`accelerator_config` may not change how batches are divided (dispatch_batches, split_batches, even_batches, "
                "use_seedable_sampler): every process loads its own images of each step."
            )
        # accelerate's loading by one process (its default under FSDP) cannot pass on batch-norm statistics (its issue 3898)
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if self.fsdp_plugin_args is not None:
            self.fsdp_plugin_args["cpu_ram_efficient_loading"] = False
        self._scale_learning_rate()

    def _scale_learning_rate(self) -> None:
        if self.is_learning_rate_scaled:
            self.learning_rate = self.base_learning_rate * self.images_per_step / self.reference_images_per_step

    def keep_images_per_step(self, images: int, source: str) -> None:
        """Has an optimizer step take so many images, by the number of its micro-batches.

        Args:
            images: Of a step, over all processes.
            source: Where they come from, for messages.

        Raises:
            ValueError: If they are not so many times those that the processes here take at once.
        """
        at_once = self.train_batch_size * self.world_size
        here = f"{self.world_size} processes" if self.world_size > 1 else "one process"
        if images % at_once:
            fitting = [size for size in range(1, images + 1) if images % (size * self.world_size) == 0]
            advice = f"no number of images can be given to {here} alike"
            if fitting:
                nearest = min(fitting, key=lambda size: abs(size - self.per_device_train_batch_size))
                advice = f"use `per_device_train_batch_size` {nearest}"
            raise ValueError(
                f"{source} has steps of {images} images, and here {here} take{'s' if self.world_size == 1 else ''} {at_once} at once, which do not add up to them: {advice}. "
                "To train with other steps, start a new run from its weights with `model_name_or_path`."
            )
        steps = images // at_once
        if steps != self.gradient_accumulation_steps:
            if self.process_index == 0:
                print(
                    f"{source} has steps of {images} images: gradient_accumulation_steps {steps} keeps them on {here}",
                    flush=True,
                )
            self.gradient_accumulation_steps = steps
            self._scale_learning_rate()

    def use_workers(self, number: int) -> None:
        """Has so many processes load images for each process that trains; what they were given holds, and where there are none is of
        no meaning."""
        is_persistent, prefetch_factor = self._given_to_workers
        self.dataloader_num_workers = number
        self.dataloader_persistent_workers = number > 0 and is_persistent is not False
        self.dataloader_prefetch_factor = (prefetch_factor or PREFETCH_FACTOR) if number else None

    @property
    def has_ema(self) -> bool:
        """Whether the weights are averaged."""
        return False

    @property
    def images_per_step(self) -> int:
        """Images that enter one optimizer step, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    def check_options(self) -> None:
        """Raises a `ValueError` if an option is outside its range; before anything of the library is set up."""
        word = str(self.resume_from_checkpoint)
        if not os.path.isdir(word):  # what others call it
            self.resume_from_checkpoint = RESUME_WORDS.get(word.lower(), self.resume_from_checkpoint)
        self.check_numbers(0, "weight_decay", "max_grad_norm", positive=("adam_epsilon",))
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        self.check_numbers(1, *sizes, positive=("base_learning_rate", "num_train_epochs"))
        self.check_choice("batch_norm", "local", "synchronized", "frozen")
        if self.push_to_hub and self.hub_strategy not in ("end", "every_save"):
            raise ValueError(
                f"`hub_strategy` {self.hub_strategy!r} would publish the state of the optimizer, which is a pickle. Use `end`, or "
                "`every_save`, which publishes the weights of every checkpoint."
            )
        if self.learning_rate is not None:
            self.check_numbers(0, "learning_rate")
        for name, smallest in (("dataloader_num_workers", 0), ("dataloader_prefetch_factor", 1)):
            if getattr(self, name) is not None:
                self.check_numbers(smallest, name)
        self._check_early_stopping()

    def _check_early_stopping(self) -> None:
        """Chooses what early stopping needs and was not given; `early_stopping_choices` says what."""
        self.early_stopping_choices: dict[str, object] = {}
        if self.early_stopping_patience is None:
            if self.early_stopping_threshold:
                raise ValueError("`early_stopping_threshold` needs `early_stopping_patience`.")
            return
        self.check_numbers(1, "early_stopping_patience")
        self.check_numbers(0, "early_stopping_threshold")
        self.early_stopping_choices = choose_early_stopping_schedule(self)
        for name, value in self.early_stopping_choices.items():
            setattr(self, name, value)

    def check_batches(self, num_images: int) -> None:
        """Raises a `ValueError` if an epoch of so many images has no step."""
        images = self.images_per_step
        if self.dataloader_drop_last and num_images < images:
            raise ValueError(
                f"There are {num_images} training images, fewer than a step takes ({images}), and a last, smaller step is left out. Choose a "
                "smaller `per_device_train_batch_size` or `gradient_accumulation_steps`, or `dataloader_drop_last` false."
            )

    def check_reporting(self) -> None:
        """Raises a `ValueError` if something to log to is unknown or not installed."""
        for name in self.report_to:
            try:
                for callback in get_reporting_integration_callbacks([name]):
                    callback()
            except (ValueError, RuntimeError, ImportError) as error:  # which says what to install
                raise ValueError(f"`report_to` {name}: {error}") from error

    def check_numbers(self, smallest: float = 0, *names: str, positive: tuple[str, ...] = ()) -> None:
        """Raises a `ValueError` if one of the fields is not finite or smaller than `smallest`, or, of those of `positive`, not above 0."""
        for name in (*names, *positive):
            value = getattr(self, name)
            if not math.isfinite(value) or not (value > 0 if name in positive else value >= smallest):
                wanted = "positive" if name in positive else f"at least {smallest}"
                raise ValueError(f"`{name}` must be {wanted}, got {value}.")

    def check_choice(self, name: str, *allowed: str) -> None:
        """Raises a `ValueError` if a field has a value that is not allowed."""
        if getattr(self, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
