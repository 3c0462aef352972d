"""A `Trainer` of segmentation models that evaluates whole images."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torch.utils.data import default_collate as stack
from transformers.trainer_utils import EvalLoopOutput

from ..data.images import Normalization
from ..data.sampling import ShardedEvalSampler
from ..finite import check_scores
from ..training.base_trainer import BaseImageTrainer
from ..training.fsdp import is_fsdp_requested
from ..training.schedule import polynomial_factor
from .arguments import SCORES, SegmentationTrainingArguments
from .dataset import SegmentationDataset
from .inference import InferenceSettings, predict_classes
from .metrics import SegmentationScores


def collate_crops(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Training samples of one size to a batch: `pixel_values` `(B, 3, h, w)`, `labels` `(B, h, w)`, and what `finish_crops` needs."""
    batch = stack([{name: sample[name] for name in ("pixel_values", "labels")} for sample in samples])
    if batch["pixel_values"].dtype != torch.uint8:
        return batch
    sizes = [sample["image_size"] for sample in samples]
    return {**batch, "normalization": samples[0]["normalization"], "image_sizes": sizes}


def finish_crops(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch of `collate_crops` as the model takes it: uint8 images are normalized, with 0 in the border of those that are smaller."""
    if batch["pixel_values"].dtype != torch.uint8:
        return batch
    batch = dict(batch)
    normalization, sizes = batch.pop("normalization"), batch.pop("image_sizes")
    pixel_values = normalization(batch["pixel_values"])
    for image, (height, width) in zip(pixel_values, sizes):
        if (height, width) != image.shape[1:]:
            image[:, height:] = 0
            image[:, :, width:] = 0
    return {**batch, "pixel_values": pixel_values}


def collate_images(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Evaluation samples of any sizes to lists, and their `normalization`."""
    lists = {name: [sample[name] for sample in samples] for name in ("pixel_values", "labels")}
    return {**lists, "normalization": samples[0].get("normalization")}


def check_batches(model: nn.Module, args: SegmentationTrainingArguments, num_rows: int) -> None:
    """Raises a `ValueError` if an epoch has a batch of a single image, of which UperNet cannot take statistics."""
    batch_size, is_synchronized = args.train_batch_size, args.batch_norm == "synchronized" and args.world_size > 1
    needs_two = getattr(model.config, "segmentation_head", None) == "upernet" and 1 in model.config.pool_scales
    if not needs_two or args.batch_norm == "frozen" or is_synchronized:
        return
    if batch_size == 1:
        raise ValueError(
            "UperNet cannot be trained on one image at a time: its batch norms need at least two. Use a larger "
            "`per_device_train_batch_size`, `batch_norm` synchronized on several devices, or `segmentation_head` fcn."
        )
    if not args.dataloader_drop_last and num_rows % batch_size == 1:
        raise ValueError(
            f"The last batch of {num_rows} images in batches of {batch_size} has a single one, of which the batch norms of UperNet "
            "cannot take statistics. Use `dataloader_drop_last` true or another `per_device_train_batch_size`."
        )


class SegmentationTrainer(BaseImageTrainer):
    """Trains a model that returns `loss` and `logits` for `pixel_values` and `labels` (`LVViTForSemanticSegmentation`), and evaluates it
    on whole images in windows. No logits are kept or gathered: pixels are counted as images come.

    `evaluate` gives `mean_iou`, `pixel_accuracy` and `mean_accuracy`, and of how many classes the first is the mean
    (`measured_classes` of `num_classes`); those of each class are in `class_scores` after it.

    Args:
        eval_dataset: With `SegmentationEvalTransform`.

    Raises:
        ValueError: If training set and batch size do not fit, or FSDP or DataParallel would be used.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SegmentationTrainingArguments,
        train_dataset: SegmentationDataset | None = None,
        eval_dataset: SegmentationDataset | None = None,
        inference: InferenceSettings | None = None,
        **kwargs: Any,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                "DataParallel is not supported, it takes batch-norm statistics of parts of a batch. Start one process per GPU: "
                f"accelerate launch --num_processes {args.n_gpu} ..., or set CUDA_VISIBLE_DEVICES."
            )
        if is_fsdp_requested():
            raise ValueError(
                "FSDP is not supported here: processes that evaluate images of different sizes would wait for each other. The "
                "largest model has 209 million parameters; use the configurations without FSDP."
            )
        if train_dataset is not None:
            check_batches(model, args, len(train_dataset))
        super().__init__(model, args, collate_crops, train_dataset, eval_dataset, **kwargs)
        self.inference = inference or InferenceSettings()
        self.class_scores: dict[str, list[float]] = {}

    @property
    def metric_names(self) -> list[str]:
        """Metrics of an evaluation, without prefix."""
        return list(SCORES)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As in `Trainer`, or with `lr_schedule="published"` the authors' schedule (`polynomial_factor`)."""
        args = self.args
        if args.lr_schedule == "library" or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            return polynomial_factor(step, num_training_steps, warmup_steps, args.lr_power)

        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        inputs = finish_crops(super()._prepare_inputs(inputs))
        # which casts floating-point images to its type
        return super()._prepare_inputs(inputs) if self.is_deepspeed_enabled else inputs

    def get_eval_dataloader(self, eval_dataset: SegmentationDataset | str | None = None) -> DataLoader:
        """Images of this process in lists; they are moved to the device one after another."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        loader = DataLoader(
            dataset,
            batch_size=self.args.eval_batch_size,
            sampler=ShardedEvalSampler(len(dataset), self.args.process_index, self.args.world_size),
            collate_fn=collate_images,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.prepare_loader(loader)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Segments the images of a loader and counts their pixels; see `Trainer.evaluation_loop`."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        was_training = model.training
        model.to(self.args.device).eval()
        encoding = dataloader.dataset.encoding
        scores = SegmentationScores(encoding.num_labels, encoding.label_ignore_index)
        self.callback_handler.eval_dataloader = dataloader
        try:
            for batch in dataloader:
                for predicted, labels in self._predictions(model, batch):
                    scores.add_batch(predictions=predicted, references=labels)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        finally:
            model.train(was_training)
        results = scores.compute()
        self.class_scores = {name: results[f"class_{name}"] for name in ("iou", "accuracy")}
        results["num_classes"] = encoding.num_labels
        metrics = {
            f"{metric_key_prefix}_{name}": results[name] for name in (*SCORES, "measured_classes", "num_classes")
        }
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))

    def _predictions(self, model: nn.Module, batch: dict[str, Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Predicted and true classes `(B, height, width)` of the images of a batch, those of one size together."""
        groups = defaultdict(list)
        for image, labels in zip(batch["pixel_values"], batch["labels"]):
            groups[image.shape].append((image, labels))
        for group in groups.values():
            images, labels = map(torch.stack, zip(*group))
            predicted = self.predict_images(model, images, batch["normalization"])
            yield predicted, labels.to(predicted.device, non_blocking=True)

    def predict_images(
        self, model: nn.Module, pixel_values: torch.Tensor, normalization: Normalization | None = None
    ) -> torch.Tensor:
        """Classes `(B, height, width)` of images of one size `(B, 3, height, width)`, those still to be normalized as they say, in the precision
        of training."""

        def forward(pixel_values: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                logits = model(pixel_values=pixel_values).logits
            size = " x ".join(map(str, pixel_values.shape[-2:]))
            check_scores(logits, [f"a window of {size} pixels"] * len(logits), type(model).__name__)
            return logits

        pixel_values = pixel_values.to(self.args.device, non_blocking=True)
        pixel_values = pixel_values if normalization is None else normalization(pixel_values)
        return predict_classes(forward, pixel_values, self.inference)
