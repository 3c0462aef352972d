"""What the trainers of all programs share: runs that can be stopped, continued and killed."""

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from transformers.trainer_utils import (
    PredictionOutput,
    has_length,
    seed_worker,
)
from transformers.utils import logging

from ..data.failures import naming_file
from ..data.image_dataset import ImageDataset
from ..data.loaders import end_workers, prepare_loader
from ..data.sampling import fold_in, temporary_seed
from ..data.steps import EndlessSampler, StepBatchSampler, StepDivision, StreamOrder
from .base_arguments import BaseImageTrainingArguments
from .batch_norm import set_batch_norm
from .callbacks import EarlyStopping, EpochCallback, StopOnSignal, describe_best
from .checkpoints.checkpoint_trainer import CheckpointTrainer
from .checkpoints.resumable import check_resumable, keep_step
from .checkpoints.whole import check_whole, last_whole_checkpoint
from .divergence import DivergenceError
from .fsdp import broadcast_buffers, configure_fsdp2
from .metrics import check_best_metric
from .progress import tensorboard_callback, use_run_progress
from .run_layout import RunLayout, read_layout
from .schedule import decayed_parameters


logger = logging.get_logger(__name__)


class BaseImageTrainer(CheckpointTrainer):
    """A `Trainer` that ends with a checkpoint when it is told to stop, writes checkpoints that are whole or known not to be, draws the
    samples of an `ImageDataset` as functions of seed, epoch and row, trains sharded (FSDP2) on any device, and logs its speed.

    Training that diverges ends with a `DivergenceError`, and nothing that is NaN or infinite is saved.
    """

    # the losses are means over a micro-batch; the Trainer divides them by the number of accumulation steps
    loss_is_scaled_for_ga = False

    def __init__(self, model: nn.Module, args: BaseImageTrainingArguments, *positional: Any, **kwargs: Any):
        if args.resume_from_checkpoint is not None:
            keep_step(args, Path(args.resume_from_checkpoint))
        super().__init__(model, args, *positional, **kwargs)
        # the losses are ours: the Trainer need not count labels over all processes at every step
        self.model_accepts_loss_kwargs = False
        self.progress = use_run_progress(self, self.throughput)
        self.stop_on_signal = StopOnSignal(self.accelerator)
        self.add_callback(self.stop_on_signal)
        self.num_overflows = torch.zeros((), dtype=torch.int64, device=args.device)
        self.latest_evaluation: tuple[int, dict[str, float]] | None = None  # step and metrics, in training
        self.early_stopping = None
        if args.early_stopping_patience is not None:
            self.early_stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold)
            self.add_callback(self.early_stopping)
            if self.train_dataset is not None and not has_length(self.train_dataset) and args.eval_strategy == "epoch":
                raise ValueError(
                    "A stream has no epochs to evaluate after: give `early_stopping_patience` with `eval_steps`."
                )
        check_best_metric(args, self.metric_names)
        set_batch_norm(model, args.batch_norm, args.device, args.world_size)
        if args.resume_from_checkpoint is not None:
            check_resumable(Path(args.resume_from_checkpoint), model)
        if isinstance(self.train_dataset, ImageDataset):
            args.check_batches(len(self.train_dataset))
            self.add_callback(EpochCallback(self.train_dataset))
        self.batches: StepBatchSampler | None = None
        self.micro_batches: Iterator[tuple[float, int]] = iter(())  # weights and numbers of those of a step
        self.loss_weight = 1.0
        self.layout = RunLayout(args.images_per_step)
        self.add_callback(self.layout)
        self._take_layout(args.resume_from_checkpoint)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, with FSDP2 on any device."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = configure_fsdp2(self.accelerator, self.args, self.model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See `schedule.decayed_parameters`."""
        return decayed_parameters(model)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """As in `Trainer`; `dataloader_drop_last` and `dataloader_persistent_workers` hold for training alone. Evaluations and predictions are
        of all images, and the library would keep the loader of the first one for all others, of whatever data."""
        options = (self.args.dataloader_drop_last, self.args.dataloader_persistent_workers)
        if not is_training:
            self.args.dataloader_drop_last = self.args.dataloader_persistent_workers = False
        try:
            loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last, self.args.dataloader_persistent_workers = options
        return self.prepare_loader(loader)

    def get_train_dataloader(self) -> DataLoader:
        """The micro-batches of this process, see `StepBatchSampler`; as in `Trainer` where the training set is neither sized nor a stream."""
        args, order = self.args, self.stream_order()
        sampler = EndlessSampler() if order is not None else self._get_train_sampler()
        if sampler is None or isinstance(sampler, BatchSampler):
            self.batches = None
            return super().get_train_dataloader()
        if isinstance(sampler, RandomSampler):  # the same order in all processes
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=args.data_seed)
        division = StepDivision(self._train_batch_size, args.world_size, args.gradient_accumulation_steps)
        self.batches = StepBatchSampler(
            sampler, division, args.process_index, args.dataloader_drop_last, lambda: int(self.state.epoch or 0)
        )
        workers = args.dataloader_num_workers
        if order is not None:  # others would read what these read
            workers = min(workers, max(order.num_workers, 1) * math.ceil(order.num_processes / args.world_size))
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )
        loader = prepare_data_loader(  # as if there were one process: the images are divided already
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )
        self.accelerator._dataloaders.append(loader)
        return self.prepare_loader(loader)

    def stream_order(self) -> StreamOrder | None:
        """Where the training set is a stream, the order of the run, or of one that begins now; `None` for other data."""
        return None

    def prepare_loader(self, loader: DataLoader) -> DataLoader:
        """See `loaders.prepare_loader`; every loader of a trainer goes through it."""
        return prepare_loader(loader, self.args.seed, self.args.process_index)

    def end_workers(self) -> None:
        """Ends the workers of all loaders, unless training goes on: they would hold memory, and keep the program from ending at once."""
        if not self.is_in_train:
            for loader in self.accelerator._dataloaders:
                end_workers(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The micro-batches of an optimizer step in this process, and the number of images of the step, over all processes."""
        with self.throughput.waiting():
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        sizes = [len(batch["pixel_values"]) for batch in batches]
        step, processes = self.state.global_step, self.args.world_size
        if self.batches is None:
            images, weights = sum(sizes) * processes, [size * len(sizes) / sum(sizes) for size in sizes]
        else:
            images, weights = self.batches.images(step), self.batches.weights(step)
        self.throughput.count(images)
        self.micro_batches = zip(weights, itertools.count(self.args.process_index, processes))
        return batches, images

    @property
    def metric_names(self) -> list[str] | None:
        """Metrics of an evaluation, without prefix; `None` if they are not known."""
        return None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the speed since the last log; a `DivergenceError` if the loss is not finite."""
        if "loss" in logs:
            self.check_loss(logs["loss"])
            logs |= self.speed()
        board = tensorboard_callback(self)
        with naming_file(Path((board and board.logging_dir) or self.args.output_dir)):
            super().log(logs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`. What the model draws depends on seed, step and micro-batch, not on the process that has it.

        A loss that overflows in float16 counts as 0, as the gradient scaler leaves its step out: a NaN would stay in the sum of the losses.
        """
        self.loss_weight, number = next(self.micro_batches, (1.0, self.args.process_index))
        if self.layout.seeds_steps:
            seed = fold_in(self.args.seed, self.state.global_step, number)
            torch.manual_seed(seed)
            random.seed(seed)
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.scaler is None:
            return loss
        is_finite = loss.isfinite()
        self.num_overflows = self.num_overflows + (~is_finite)
        return torch.where(is_finite, loss, 0.0)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; in training the loss of a micro-batch counts by its images."""
        result = super().compute_loss(model, *args, **kwargs)
        if not model.training:
            return result
        return (self.loss_weight * result[0], *result[1:]) if isinstance(result, tuple) else self.loss_weight * result

    def check_loss(self, loss: float) -> None:
        """See `DivergenceCheck.check_loss`; all processes call it with the same mean loss since the last log."""
        overflows = int(self.accelerator.reduce(self.num_overflows, reduction="sum"))
        self.num_overflows = torch.zeros_like(self.num_overflows)
        self.divergence.check_loss(math.nan if overflows else loss, self.tensors_to_save(), self.state)
        if overflows:
            logger.warning(
                "The loss overflowed in float16 %d times since the last log; it counts as 0 there.", overflows
            )

    def speed(self) -> dict[str, float]:
        """Figures of the time since the last log: see `Throughput.report`."""
        return self.throughput.report()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As in `Trainer`. After SIGTERM or Ctrl-C it returns early, with a checkpoint: see `stop_on_signal.received`.

        Raises:
            DivergenceError: If loss or weights become NaN or infinite.
            ValueError: If the checkpoint is damaged, one of another model or other classes, or has steps of a number of images that cannot be
                divided here.
        """
        if resume_from_checkpoint is True:
            last = last_whole_checkpoint(Path(self.args.output_dir))
            if last is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
            resume_from_checkpoint = str(last)
        if resume_from_checkpoint and resume_from_checkpoint != self.args.resume_from_checkpoint:
            check_whole(Path(resume_from_checkpoint))
            check_resumable(Path(resume_from_checkpoint), self.model)
            keep_step(self.args, Path(resume_from_checkpoint))
        self._take_layout(resume_from_checkpoint)
        self.throughput.start()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.is_in_train = False  # also where it ended with an error
            self.end_workers()
            self.progress.close()
            self.stop_on_signal.restore_handlers()

    def _take_layout(self, checkpoint: str | None) -> None:
        """Goes on with the layout of a checkpoint, or begins one."""
        self.layout.stream_order = None
        order = self.stream_order()
        layout = None if checkpoint is None else read_layout(Path(checkpoint))
        if layout is not None and layout.seeds_steps and (layout.stream_order is None) != (order is None):
            now, then = ("stored data" if value is None else "a stream" for value in (order, layout.stream_order))
            raise ValueError(
                f"{checkpoint} was trained on {then}, this run is on {now}: give or leave out `streaming`."
            )
        self.layout.take(layout or RunLayout(self.args.images_per_step, None if order is None else order.to_dict()))

    def describe_best(self) -> str | None:
        """See `callbacks.describe_best`."""
        return describe_best(self.state, self.args, self.early_stopping)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # a run that had stopped early, or was over and only lacks what is written at its end, is continued to its end
        if not self.control.should_training_stop and self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # `save_strategy` best saves what is better; a run that is told to stop saves anyway
        return super()._determine_best_metric(*args, **kwargs) or self.stop_on_signal.is_stopping

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.check_weights()
        return prepared

    def _finalize_training(self, *args: Any):
        self.check_loss(
            self.accelerator.reduce(self._tr_loss, reduction="mean").item()
        )  # of the steps since the last log
        self.check_weights()
        if self.stop_on_signal.is_stopping:
            # the run is not over: its best checkpoint is not loaded, and the one just written not deleted next to it
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args)

    def _finish_current_push(self) -> None:
        if not self.stop_on_signal.is_stopping:  # else the user should hear first that the run has stopped
            super()._finish_current_push()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but a checkpoint is written before the evaluation, which takes long, unless it depends on the result."""
        control = self.control
        if control.should_save and control.should_evaluate and self.args.metric_for_best_model is None:
            control.should_evaluate = False
            super()._maybe_log_save_evaluate(*args, **kwargs)
            self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What holds during an evaluation: weights are finite, it is no time of training, draws nothing from the random generators of
        training, and all processes have the same statistics."""
        if self.is_in_train:
            self.check_weights()
        with self.throughput.paused(), temporary_seed(self.args.seed):
            broadcast_buffers(self.accelerator, self.accelerator.unwrap_model(self.model))
            yield

    def evaluate(self, eval_dataset: Any | None = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; see `evaluating`."""
        is_several = isinstance(eval_dataset or self.eval_dataset, dict)  # the library calls this for each of them
        with nullcontext() if is_several else self.evaluating():
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        self.end_workers()
        for name, value in metrics.items():
            if name.endswith("_loss") and not math.isfinite(value):
                raise DivergenceError(
                    f"`{name}` is {value}: the model gives scores that are NaN or infinite. Evaluate in float32; if that does not help, "
                    "take an earlier checkpoint."
                )
        if self.is_in_train and eval_dataset is None:
            self.latest_evaluation = (self.state.global_step, metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in `Trainer`."""
        output = super().predict(*args, **kwargs)
        self.end_workers()
        return output

    def evaluate_result(self) -> dict[str, float]:
        """Metrics of the weights that training ended with: those of the evaluation at the last step, or of a new one where that was of other
        weights or computed otherwise."""
        args, step = self.args, self.state.global_step
        is_other = args.load_best_model_at_end and self.state.best_global_step != step
        is_other |= args.fp16_full_eval or args.bf16_full_eval  # which hold after training alone
        if self.latest_evaluation is None or self.latest_evaluation[0] != step or is_other:
            return self.evaluate()
        return self.latest_evaluation[1]
