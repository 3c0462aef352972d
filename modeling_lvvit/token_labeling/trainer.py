"""A `Trainer` that learns from dense labels."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker
from transformers.utils import logging

from .arguments import TokenLabelTrainingArguments
from .callbacks import EMACallback
from .collator import TokenLabelCollator
from .dataset import TokenLabelDataset
from .label_maps import SparseTargets, covered_tokens, crop_label_maps
from .losses import blend_weight, mixed_cross_entropy, token_labeling_loss
from .metrics import TopKAccuracy
from .stream import TokenLabelStream


logger = logging.get_logger(__name__)
# names that the collator adds for the losses and that no model takes
LABEL_FIELDS = ("labels", "crop_box", "token_label_palette", "token_label_index", "token_label_scores")
# parameters of more than one dimension that the published recipe exempts from weight decay besides all vectors
NO_DECAY_NAMES = ("cls_token", "position_embeddings", "pos_embed")


def token_grid_of(model: nn.Module) -> tuple[int, int]:
    """Token rows and columns that the configuration of a model describes."""
    config = model.config
    if hasattr(config, "grid_size"):
        return tuple(config.grid_size)
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    return size[0] // config.patch_size, size[1] // config.patch_size


class TokenLabelTrainer(Trainer):
    """Trains a model on its class token and on every patch token.

    The model must return `cls_logits` `(B, C)`, `patch_logits` `(B, N, C)` and `logits` `(B, C)`, and take `mix_mask`.
    Batches are those of `TokenLabelCollator`. A training set without label maps, or `dense_weight=0`, trains the class
    token with the plain labels; then `config.patch_logits_weight` is set to 0, because the patch head stays untrained.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, ...: As in `transformers.Trainer`. Without
            `data_collator` a `TokenLabelCollator` is made from the arguments; without `compute_metrics` top-1 and
            top-5 accuracy are reported.

    Raises:
        ValueError: If arguments, model and data do not fit each other; always before training.
    """

    # the losses are means over a micro-batch; the Trainer divides them by the number of accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: TokenLabelTrainingArguments,
        data_collator: Any | None = None,
        train_dataset: Any | None = None,
        compute_metrics: Any | None = None,
        **kwargs: Any,
    ):
        self.grid_size = token_grid_of(model)
        self.num_classes = model.config.num_labels
        has_label_maps = getattr(train_dataset, "has_label_maps", None)
        self._check_fit(args, train_dataset)
        if has_label_maps is not None:
            self._set_patch_logits_weight(model, trained=has_label_maps and args.dense_weight > 0)
        if data_collator is None:
            data_collator = TokenLabelCollator(self.grid_size, args.mix_probability, args.mix_alpha)
        if compute_metrics is None:
            kwargs.setdefault("preprocess_logits_for_metrics", rank_classes)
            compute_metrics = compute_accuracy
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        # the Trainer seeds every process alike; augmentation, mixing and drop path should differ between them
        torch.manual_seed(args.seed + args.process_index)
        # the loss is ours: the Trainer need not count labels over all processes at every step
        self.model_accepts_loss_kwargs = False
        self.ema = EMACallback(args.ema_decay) if args.ema_decay is not None else None
        if self.ema is not None:
            self.add_callback(self.ema)
        self._component_sums: dict[str, torch.Tensor] = {}
        self._component_count = 0

    def _check_fit(self, args: TokenLabelTrainingArguments, train_dataset: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                "DataParallel would tear apart the images that are mixed with each other. Start one process per GPU: "
                f"accelerate launch --num_processes {args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES."
            )
        if args.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the dense labels and crop boxes before they reach the loss; "
                "leave it at False."
            )
        if isinstance(train_dataset, (TokenLabelDataset, TokenLabelStream)):
            train_dataset.check_num_classes(self.num_classes)

    def _set_patch_logits_weight(self, model: nn.Module, trained: bool) -> None:
        """Lets the patch head enter the prediction exactly when it is trained."""
        config = model.config
        if not hasattr(config, "patch_logits_weight"):
            return
        if not trained and config.patch_logits_weight:
            logger.info("No dense labels: the patch head is not trained and left out of `logits`.")
            config.patch_logits_weight = 0.0
        elif trained and not config.patch_logits_weight:
            config.patch_logits_weight = type(config)().patch_logits_weight

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and convolutions; vectors, class token and position table are exempt (published recipe)."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY_NAMES
        ]

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; a stream has divided its rows between the processes itself."""
        if not isinstance(self.train_dataset, TokenLabelStream):
            return super().get_train_dataloader()
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        # as if there were one process: accelerate would pass over the samples of the others once more
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Token-labeling loss in training; cross-entropy of `logits` with the labels in evaluation."""
        labels = {name: inputs[name] for name in LABEL_FIELDS if name in inputs}
        outputs = model(**{name: value for name, value in inputs.items() if name not in labels})
        if model.training:
            losses = self.training_losses(outputs, labels, inputs.get("mix_mask"))
            self._count_components(losses)
            loss = losses["loss"]
        else:
            loss = nn.functional.cross_entropy(outputs["logits"].float(), labels["labels"])
        return (loss, outputs) if return_outputs else loss

    def training_losses(
        self, outputs: Any, labels: dict[str, torch.Tensor], mix_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Named components of the loss (see `losses.token_labeling_loss`).

        Args:
            outputs: Output of the model, with `cls_logits` and `patch_logits`.
            labels: The fields of `LABEL_FIELDS` that the batch has.
            mix_mask: Bool `(B, rows, columns)`, or `None` for an unmixed batch.
        """
        args, cls_logits, patch_logits = self.args, outputs["cls_logits"], outputs["patch_logits"]
        smoothing = args.label_smoothing_factor
        cls_dense = token_targets = counted = None
        if "token_label_palette" in labels and args.dense_weight > 0:
            cls_dense, token_targets = crop_label_maps(
                labels["token_label_palette"],
                labels["token_label_index"],
                labels["token_label_scores"],
                labels["crop_box"],
                self.grid_size,
                self.num_classes,
                args.label_crop,
                args.label_temperature,
            )
            token_targets = token_targets.smooth(smoothing)
            if args.uncovered_tokens == "ignore":
                counted = covered_tokens(labels["crop_box"], self.grid_size)
        terms = self._cls_targets(cls_dense, labels.get("labels"))
        kept = 1.0 - mix_mask.flatten(1).float().mean(dim=1) if mix_mask is not None else None
        cls_losses = sum(
            mixed_cross_entropy(cls_logits, target.smooth(smoothing), weight, kept) for target, weight in terms
        )
        return token_labeling_loss(
            patch_logits, cls_losses, token_targets, args.cls_weight, args.dense_weight, counted
        )

    def _cls_targets(
        self, dense: SparseTargets | None, labels: torch.Tensor | None
    ) -> list[tuple[SparseTargets, torch.Tensor | float]]:
        """Targets of the class token with the weight of each for every sample."""
        if dense is not None and self.args.cls_target == "dense":
            return [(dense, 1.0)]
        human = SparseTargets.from_labels(labels, self.num_classes)
        if dense is None or self.args.cls_target == "label":
            return [(human, 1.0)]
        weight = blend_weight(dense, labels)
        return [(dense, weight), (human, 1.0 - weight)]

    def _count_components(self, losses: dict[str, torch.Tensor]) -> None:
        for name in ("cls_loss", "token_loss"):
            value = losses[name].detach()
            self._component_sums[name] = self._component_sums[name] + value if name in self._component_sums else value
        self._component_count += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss components since the last log, over all processes."""
        if "loss" in logs and self._component_count:
            for name, total in self._component_sums.items():
                logs[name] = self.accelerator.reduce(total / self._component_count, reduction="mean").item()
            self._component_sums, self._component_count = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; with `ema_decay` the averaged weights are evaluated."""
        if self.ema is None:
            return super().evaluate(*args, **kwargs)
        with self.ema.average_in(self.accelerator.unwrap_model(self.model)):
            return super().evaluate(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but a card that is already there stays: a push would otherwise replace it by a draft."""
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)


def rank_classes(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Ids of the five best classes (fewer if there are not five), `(B, 5)`, so that no logits are gathered."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ranked predictions."""
    return TopKAccuracy(keep_in_memory=True).compute(
        predictions=prediction.predictions, references=prediction.label_ids
    )
