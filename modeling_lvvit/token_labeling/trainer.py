"""A `Trainer` that learns from dense labels."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from ..annotators.online import OnlineAnnotator
from ..data.classes.multi_label import is_multi_label
from ..data.sampling import BALANCED, BalancedSampler
from ..data.steps import StreamOrder
from ..per_class.scores import AVERAGES, ComputeClassMetrics
from ..per_class.weights import training_weights
from ..training.base_trainer import BaseImageTrainer
from ..training.divergence import DivergenceError
from ..training.ema import EMA_FILE, EMACallback
from ..training.metrics import TOP_K, rank_classes
from ..training.schedule import published_factor
from ..training.throughput import LossComponents
from .arguments import TokenLabelTrainingArguments
from .augmentation import TokenLabelCollator, finish_images
from .dataset import TokenLabelDataset
from .losses import LABEL_FIELDS, TokenLabelingLoss
from .multi_label import METRICS, MultiLabelLoss, compute_multi_label_metrics
from .stream import TokenLabelStream
from .trainer_setup import (
    check_fit,
    check_problem_type,
    token_grid_size,
    trains_patches,
    use_patch_head,
    with_patch_head,
)


class TokenLabelTrainer(BaseImageTrainer):
    """Trains a model on its class token and on every patch token.

    The model is LV-ViT, or any image classifier of transformers or timm, which gets a patch head (`add_patch_head`); or one that
    returns `cls_logits` `(B, C)`, `patch_logits` `(B, N, C)` and `logits` `(B, C)`, and takes `mix_mask`. Batches are those of `TokenLabelCollator`. A training set without label maps, or `dense_weight=0`, trains the class
    token with the plain labels; then `config.patch_logits_weight` is set to 0, because the patch head stays untrained.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, ...: As in `transformers.Trainer`. Without
            `data_collator` a `TokenLabelCollator` is made from the arguments; without `compute_metrics` top-1 and
            top-5 accuracy are reported, or for `problem_type` multi_label_classification those of `multi_label.METRICS`.
        annotator: Labels the crops of every batch on the device, instead of stored label maps.

    Raises:
        ValueError: If arguments, model and data do not fit each other; always before training.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TokenLabelTrainingArguments,
        data_collator: Any | None = None,
        train_dataset: Any | None = None,
        compute_metrics: Any | None = None,
        annotator: OnlineAnnotator | None = None,
        **kwargs: Any,
    ):
        model = with_patch_head(model, train_dataset)
        self.grid_size = token_grid_size(model)
        self.num_classes = model.config.num_labels
        self.annotator = annotator
        check_fit(args, train_dataset, self.num_classes, self.grid_size, annotator)
        check_problem_type(args, model.config, train_dataset, kwargs.get("eval_dataset"))
        if hasattr(train_dataset, "has_label_maps"):
            use_patch_head(model, trains_patches(args, train_dataset, annotator))
        if data_collator is None:
            mixing = (args.mix_probability, args.mix_alpha, tuple(args.mix_methods), args.mixup_alpha)
            data_collator = TokenLabelCollator(self.grid_size, *mixing)
        self.is_multi_label = is_multi_label(model.config)
        if compute_metrics is None and self.is_multi_label:
            compute_metrics = compute_multi_label_metrics
        elif compute_metrics is None:
            kwargs.setdefault("preprocess_logits_for_metrics", rank_classes)
            compute_metrics = ComputeClassMetrics(self.num_classes)
        with warnings.catch_warnings():  # the loss here smooths the targets of several classes too
            warnings.filterwarnings("ignore", "Label smoothing is not compatible with multi-label")
            super().__init__(model, args, data_collator, train_dataset, compute_metrics=compute_metrics, **kwargs)
        self.class_weights = None
        if args.class_weights is not None:
            self.class_weights = training_weights(args.class_weights, self.class_names, self.class_counts)
        if self.is_multi_label:
            self.objective = MultiLabelLoss(args)
        else:
            weights = (
                None if self.class_weights is None else torch.tensor(self.class_weights).to(args.device, torch.float32)
            )
            self.objective = TokenLabelingLoss(args, self.grid_size, self.num_classes, weights)
        self.ema = None
        if args.has_ema:
            self.ema = EMACallback(args.ema_decay or args.base_ema_decay, is_base=args.ema_decay is None)
            self.add_callback(self.ema)
        self.components = LossComponents()
        self.eval_losses: list[torch.Tensor] | None = None  # of the images of all processes, in an evaluation

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by id."""
        return [self.model.config.id2label[index] for index in range(self.num_classes)]

    @property
    def class_counts(self) -> np.ndarray | None:
        """Training images of each class; `None` where they are not counted: of a stream, or with several classes an image."""
        dataset = self.train_dataset
        is_counted = isinstance(dataset, TokenLabelDataset) and not self.is_multi_label
        return dataset.class_counts(self.num_classes) if is_counted else None

    def _get_train_sampler(self, train_dataset: Any | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == BALANCED:
            return BalancedSampler(dataset.class_ids(), dataset.seed_and_epoch)
        return super()._get_train_sampler(dataset)

    @property
    def trains_patches(self) -> bool:
        """Whether patch tokens learn anything."""
        return trains_patches(self.args, self.train_dataset, self.annotator)

    @property
    def metric_names(self) -> list[str] | None:
        """Metrics of an evaluation, without prefix; `None` if they are not known."""
        if isinstance(self.eval_dataset, dict):
            return None
        has_raw = self.args.has_ema and self.args.evaluate_raw_weights
        if self.compute_metrics is compute_multi_label_metrics:
            return ["loss", *METRICS, *([f"raw_{METRICS[0]}"] if has_raw else [])]
        if not isinstance(self.compute_metrics, ComputeClassMetrics):
            return None
        names = ["accuracy", *(["top5_accuracy"] if self.num_classes > TOP_K else []), *AVERAGES]
        return ["loss", *names, *(f"raw_{name}" for name in names if has_raw and name.endswith("accuracy"))]

    def tensors_to_save(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As in `BaseImageTrainer`, and the weight average."""
        yield from super().tensors_to_save()
        if self.ema is not None and self.ema.average is not None:
            yield from ((f"weight average of {name}", tensor) for name, tensor in self.ema.average.items())

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As in `Trainer`, or with `lr_schedule="published"` the authors' schedule (`schedule.published_factor`)."""
        args = self.args
        if args.lr_schedule == "library" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)

        def factor(step: int) -> float:
            epoch = int(
                step * args.num_train_epochs / num_training_steps
            )  # shorter ones where `max_steps` shortens a run
            return published_factor(
                epoch,
                args.num_train_epochs - args.cooldown_epochs,
                args.warmup_epochs,
                args.base_warmup_learning_rate / args.base_learning_rate,
                args.base_min_learning_rate / args.base_learning_rate,
            )

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def stream_order(self) -> StreamOrder | None:
        """As in `BaseImageTrainer`."""
        stream, args = self.train_dataset, self.args
        if not isinstance(stream, TokenLabelStream):
            return None
        begun = self.layout.stream_order or {}
        workers = {
            "num_processes": args.world_size,
            "num_workers": max(args.dataloader_num_workers, 1),
            "batch_size": self._train_batch_size,
        }
        stream.order = stream.begin_order(**(begun or workers))
        return stream.order

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        # Accelerate's wrapper around `forward` would copy the patch logits, the largest output, to float32, which the losses do
        # not need. What it also does, autocast, is entered here where the model is called.
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if unwrapped.__dict__.pop("_original_forward", None) is not None:
            del unwrapped.forward  # the one that hides that of the class
        return model, loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = finish_images(super()._prepare_inputs(inputs))
        # which casts floating-point images to its type
        return super()._prepare_inputs(inputs) if self.is_deepspeed_enabled else inputs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ):
        """As in `Trainer`, in the precision of training for batches without labels too, and without patch logits."""
        if ignore_keys is None:
            ignore_keys = getattr(self.model.config, "keys_to_ignore_at_inference", [])
        ignore_keys = [*ignore_keys, "cls_logits", "patch_logits", "hidden_states", "attentions"]
        with nullcontext() if "labels" in inputs else self.accelerator.autocast():
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Token-labeling loss in training; in evaluation cross-entropy of `logits` with the labels. For images with several
        classes both are the binary cross-entropy of each class."""
        labels = {name: inputs[name] for name in LABEL_FIELDS if name in inputs}
        fields = {name: value for name, value in inputs.items() if name not in labels}
        online_targets = None
        if model.training and self.annotator is not None:
            pixel_values = fields["pixel_values"]
            if self.trains_patches:
                online_targets = self.annotator.label(pixel_values, self.grid_size, self.args.label_temperature)
            fields["pixel_values"] = self.annotator.erase(pixel_values)
        with self.accelerator.autocast():
            outputs = model(**fields)
        if model.training:
            losses = self.objective(outputs, labels, inputs.get("mix_mask"), online_targets)
            losses = {name: self.loss_weight * loss for name, loss in losses.items()}
            self.components.add(losses)
            loss = losses["loss"]
        else:
            outputs = convert_to_fp32(outputs)
            losses = self.image_losses(outputs["logits"], labels["labels"])
            loss = losses.mean()
            if self.eval_losses is not None:
                self.eval_losses.append(self.accelerator.gather_for_metrics(losses.detach()))
        return (loss, outputs) if return_outputs else loss

    def image_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each image, `(B,)`; for images with several classes the mean binary cross-entropy of the classes."""
        if self.is_multi_label:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")  # (B, C)
            return loss.mean(dim=1)
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, but the loss is the mean over the images, each once. The library takes the mean of a batch for each of its
        images; with several processes the last batches are filled up with images that come again, which it cannot leave out there."""
        self.eval_losses = []
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if self.eval_losses:
                output.metrics[f"{metric_key_prefix}_loss"] = torch.cat(self.eval_losses).double().mean().item()
        finally:
            self.eval_losses = None
        return output

    def check_loss(self, loss: float) -> None:
        """As in `BaseImageTrainer`; scores of the annotator that are not finite are a reason of their own."""
        if self.annotator is not None:
            bad = int(self.accelerator.reduce(self.annotator.bad_images.clone(), reduction="sum"))
            if bad:
                raise DivergenceError(
                    f"The annotator {self.annotator.annotator.name} gave scores that are NaN or infinite for {bad:,} training images up to "
                    f"step {self.state.global_step:,}. Choose `annotator_dtype` float32, or another annotator."
                )
        super().check_loss(loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss components since the last log, over all processes, and the speed."""
        if "loss" in logs and self.components.count:
            for name, mean in self.components.take().items():
                if name != "token_loss" or self.trains_patches:
                    logs[name] = self.accelerator.reduce(mean, reduction="mean").item()
        super().log(logs, *args, **kwargs)

    def speed(self) -> dict[str, float]:
        """As in `BaseImageTrainer`, with the share of the annotator."""
        return self.throughput.report(self.annotator.clock.seconds() if self.annotator is not None else None)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in `BaseImageTrainer`."""
        if self.ema is not None:
            self.ema.checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in `BaseImageTrainer`; during training with a weight average, that is evaluated, and the raw accuracy added."""
        several = isinstance(eval_dataset or self.eval_dataset, dict)
        if several or self.ema is None or self.ema.average is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        raw = {}
        if self.args.evaluate_raw_weights:
            with self.evaluating():
                figures = self.evaluation_loop(
                    self.get_eval_dataloader(eval_dataset),
                    "Raw weights",
                    ignore_keys=ignore_keys,
                    metric_key_prefix=f"{metric_key_prefix}_raw",
                ).metrics
            raw = {name: value for name, value in figures.items() if name.endswith(("accuracy", METRICS[0]))}
            self.log(dict(raw))
        with self.ema.average_in_model():
            return raw | super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `BaseImageTrainer`; a checkpoint also gets the weight average, before any older one is deleted."""
        super().save_model(output_dir, _internal_call)
        is_checkpoint = output_dir is not None and Path(output_dir).name.startswith(PREFIX_CHECKPOINT_DIR)
        if is_checkpoint and self.ema is not None and self.ema.average is not None:
            with self.saving.noting(Path(output_dir) / EMA_FILE):
                self.ema.save(output_dir, self.args.should_save)
            if _internal_call:
                self.saving.agree()

    def published_weights(self) -> AbstractContextManager[None]:
        """Puts the weight average, where there is one, into the model."""
        return nullcontext() if self.ema is None else self.ema.average_in_model()

    @property
    def published_kind(self) -> str:
        """Which weights are published in training, in words."""
        return "of training" if self.ema is None else "of the moving average"
