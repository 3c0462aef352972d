"""A `Trainer` that learns from dense labels."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from .arguments import TokenLabelTrainingArguments
from .batch_norm import set_batch_norm
from .callbacks import EpochCallback, EpochSampler, StopOnSignal, leave_signals_to_main_process
from .collator import TokenLabelCollator
from .dataset import TokenLabelDataset
from .ema import EMACallback
from .live_labels import LiveAnnotator
from .metrics import compute_accuracy, rank_classes
from .model_fit import check_fit, token_grid_of, trains_patches, use_patch_head, with_patch_head
from .objective import LABEL_FIELDS, TokenLabelingObjective
from .patch_head import weights_by_own_names
from .randomness import seeded
from .schedule import decayed_parameters, published_schedule
from .sharding import own_class, set_up_sharding, share_statistics
from .stream import TokenLabelStream, stream_loader
from .throughput import LossComponents, Throughput


class TokenLabelTrainer(Trainer):
    """Trains a model on its class token and on every patch token.

    The model is LV-ViT, or any image classifier of transformers or timm, which gets a patch head (`add_patch_head`); or one that
    returns `cls_logits` `(B, C)`, `patch_logits` `(B, N, C)` and `logits` `(B, C)`, and takes `mix_mask`. Batches are those of `TokenLabelCollator`. A training set without label maps, or `dense_weight=0`, trains the class
    token with the plain labels; then `config.patch_logits_weight` is set to 0, because the patch head stays untrained.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, ...: As in `transformers.Trainer`. Without
            `data_collator` a `TokenLabelCollator` is made from the arguments; without `compute_metrics` top-1 and
            top-5 accuracy are reported.
        annotator: Labels the crops of every batch on the device, instead of stored label maps.

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
        annotator: LiveAnnotator | None = None,
        **kwargs: Any,
    ):
        model = with_patch_head(model, train_dataset)
        self.grid_size = token_grid_of(model)
        self.num_classes = model.config.num_labels
        self.annotator = annotator
        check_fit(args, train_dataset, self.num_classes, self.grid_size, annotator)
        if hasattr(train_dataset, "has_label_maps"):
            use_patch_head(model, trains_patches(args, train_dataset, annotator))
        if data_collator is None:
            data_collator = TokenLabelCollator(
                self.grid_size, args.mix_probability, args.mix_alpha, tuple(args.mix_methods), args.mixup_alpha
            )
        if compute_metrics is None:
            kwargs.setdefault("preprocess_logits_for_metrics", rank_classes)
            compute_metrics = compute_accuracy
        super().__init__(model, args, data_collator, train_dataset, compute_metrics=compute_metrics, **kwargs)
        # the Trainer seeds every process alike; drop path should differ between them
        torch.manual_seed(args.seed + args.process_index)
        if annotator is not None:
            annotator.seed(args.seed + args.process_index)
        # the loss is ours: the Trainer need not count labels over all processes at every step
        self.model_accepts_loss_kwargs = False
        self.objective = TokenLabelingObjective(args, self.grid_size, self.num_classes)
        self.throughput = Throughput()
        self.ema = None
        if args.has_ema:
            self.ema = EMACallback(args.ema_decay or args.base_ema_decay, is_base=args.ema_decay is None)
            self.add_callback(self.ema)
        self.stop_on_signal = StopOnSignal(self.accelerator)
        self.add_callback(self.stop_on_signal)
        self.components = LossComponents()
        set_batch_norm(model, args.batch_norm, args.device, args.world_size)
        if isinstance(train_dataset, TokenLabelDataset):
            self._sampler = EpochSampler(len(train_dataset))
            self.add_callback(EpochCallback(train_dataset, self._sampler))

    @property
    def trains_patches(self) -> bool:
        """Whether patch tokens learn anything."""
        return trains_patches(self.args, self.train_dataset, self.annotator)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, with FSDP2 on any device."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_sharding(self.accelerator, self.args, self.model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `schedule.decayed_parameters`."""
        return decayed_parameters(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As in `Trainer`, or with `lr_schedule="published"` the authors' schedule (`schedule.published_factor`)."""
        args = self.args
        if args.lr_schedule == "library" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = published_schedule(optimizer or self.optimizer, args, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any | None = None) -> torch.utils.data.Sampler | None:
        if isinstance(self.train_dataset, TokenLabelDataset):
            return self._sampler
        return super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; a stream has divided its rows between the processes itself."""
        if isinstance(self.train_dataset, TokenLabelStream):
            loader = stream_loader(self.train_dataset, self.data_collator, self._train_batch_size, self.args)
        else:
            loader = super().get_train_dataloader()
        leave_signals_to_main_process(loader)
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in `Trainer`."""
        loader = super().get_eval_dataloader(*args, **kwargs)
        leave_signals_to_main_process(loader)
        return loader

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        model, loader = super()._prepare_for_training(*args, **kwargs)
        # Accelerate's wrapper around `forward` would copy the patch logits, the largest output, to float32, which the losses do
        # not need. What it also does, autocast, is entered here where the model is called.
        own = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if own.__dict__.pop("_original_forward", None) is not None:
            del own.forward  # the one that hides that of the class
        return model, loader

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

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The micro-batches of an optimiser step, and the number of their images in this process."""
        with self.throughput.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        images = sum(len(batch["pixel_values"]) for batch in batches)
        self.throughput.count(images * self.args.world_size)
        return batches, images

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Token-labeling loss in training; cross-entropy of `logits` with the labels in evaluation."""
        labels = {name: inputs[name] for name in LABEL_FIELDS if name in inputs}
        fields = {name: value for name, value in inputs.items() if name not in labels}
        live_targets = None
        if model.training and self.annotator is not None:
            pixel_values = fields["pixel_values"]
            if self.trains_patches:
                live_targets = self.annotator.label(pixel_values, self.grid_size, self.args.label_temperature)
            fields["pixel_values"] = self.annotator.erase(pixel_values)
        with self.accelerator.autocast():
            outputs = model(**fields)
        if model.training:
            losses = self.objective(outputs, labels, inputs.get("mix_mask"), live_targets)
            # every image of a step counts alike, also in a last micro-batch that is smaller than the others; 1 if there is none
            micro_batches = self.current_gradient_accumulation_steps if num_items_in_batch else 1
            share = len(outputs["cls_logits"]) * micro_batches / (num_items_in_batch or len(outputs["cls_logits"]))
            losses = {name: share * loss for name, loss in losses.items()}
            self.components.add(losses)
            loss = losses["loss"]
        else:
            outputs = convert_to_fp32(outputs)
            loss = nn.functional.cross_entropy(outputs["logits"], labels["labels"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean loss components since the last log, over all processes, and the speed."""
        if "loss" in logs and self.components.count:
            for name, mean in self.components.take().items():
                logs[name] = self.accelerator.reduce(mean, reduction="mean").item()
            logs |= self.throughput.report(self.annotator.clock.seconds() if self.annotator is not None else None)
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in `Trainer`. After SIGTERM or Ctrl-C it returns early, with a checkpoint: see `stop_on_signal.received`."""
        self.throughput.start()
        if self.ema is not None:
            self.ema.checkpoint = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.stop_on_signal.restore_handlers()

    def _finalize_training(self, *args: Any):
        if self.stop_on_signal.is_stopping:
            # the run is not over: its best checkpoint is not loaded, and the one just written not deleted beside it
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but a checkpoint is written before the evaluation, which takes long, unless it hangs on the result."""
        control, args_ = self.control, self.args
        if control.should_save and control.should_evaluate and args_.metric_for_best_model is None:
            control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(
        self,
        eval_dataset: Any | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As in `Trainer`; during training with a weight average, that is evaluated, and the raw accuracy added. Draws nothing
        from the random generators of training."""
        if isinstance(eval_dataset or self.eval_dataset, dict):  # the library calls this for each of them
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        model = self.accelerator.unwrap_model(self.model)
        with self.throughput.paused(), seeded(self.args.seed):
            share_statistics(self.accelerator, model)
            if self.ema is None or self.ema.average is None:
                return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            raw = {}
            if self.args.evaluate_raw_weights:
                loader = self.get_eval_dataloader(eval_dataset)
                figures = self.evaluation_loop(
                    loader, "Raw weights", ignore_keys=ignore_keys, metric_key_prefix=f"{metric_key_prefix}_raw"
                ).metrics
                raw = {name: value for name, value in figures.items() if name.endswith("accuracy")}
                self.log(dict(raw))
            with self.ema.average_in_model():
                share_statistics(self.accelerator, model)
                return raw | super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; a checkpoint also gets the weight average, before any older one is deleted."""
        if self.is_fsdp_enabled:  # whole weights, beside sharded ones too
            share_statistics(self.accelerator, self.model)  # a sharded checkpoint takes them from any process
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)
        if _internal_call and self.ema is not None and self.ema.average is not None:
            self.ema.save(output_dir, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with own_class(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`. A checkpoint is whole once its `trainer_state.json` is: that is written last."""
        state = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}" / TRAINER_STATE_NAME
        if self.args.should_save:
            state.unlink(missing_ok=True)  # of an earlier run that is written over
        own = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with self.throughput.paused(), weights_by_own_names(own):
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # before the main process writes the state that makes the checkpoint whole

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but a card that is already there stays: a push would otherwise replace it by a draft."""
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)
