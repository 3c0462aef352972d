"""Metrics whose measures follow from counts: they need no memory for images, and add up over processes."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import distributed
from transformers import TrainingArguments


TOP_K = 5


class AccumulatingMetric(evaluate.Metric):
    """A metric that counts what is added, in an array of a fixed shape, and keeps nothing else.

    Processes of `torch.distributed` add their counts, and each gets the result; others are combined by `evaluate`, with one row of
    counts for each process in its files. A subclass says what is counted (`add_batch`) and what follows from it (`measures`).
    """

    def __init__(self, shape: tuple[int, ...], **kwargs: Any):
        if kwargs.get("num_process", 1) == 1:
            kwargs["keep_in_memory"] = True
        super().__init__(**kwargs)
        self.evaluations, self.name_of_evaluations = 0, self.experiment_id
        self.counts = torch.zeros(shape, dtype=torch.int64)

    def describe(self) -> tuple[str, str]:
        """What is measured, and what predictions and references are."""
        raise NotImplementedError

    def measures(self, counts: np.ndarray) -> dict[str, Any]:
        """The measures that follow from counts of the shape of `counts`."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        description, inputs = self.describe()
        number = datasets.Value("int64")
        features = datasets.Features({"predictions": datasets.Sequence(number), "references": number})
        return evaluate.MetricInfo(description, "", features, inputs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Counts a single one; see `add_batch`."""
        further = {name: [value] for name, value in kwargs.items()}
        self.add_batch(predictions=[prediction], references=[reference], **further)

    def compute(self, *, predictions: Any = None, references: Any = None) -> dict[str, Any] | None:
        """The measures of all that was added in all processes; begins again. Where `evaluate` combines processes, only the first gets
        them.

        Raises:
            ValueError: If predictions come without references, or the other way round.
        """
        if (predictions is None) != (references is None):
            raise ValueError("Give predictions and references, or neither after they were added.")
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        if distributed.is_available() and distributed.is_initialized():
            # processes that only know how to exchange what is on their accelerators
            has_cpu = "gloo" in distributed.get_backend_config()
            counts = self.counts if has_cpu else self.counts.to(torch.accelerator.current_accelerator())
            distributed.all_reduce(counts)
            result = self.measures(counts.cpu().numpy())
        else:
            self.evaluations += 1  # each has files of its own
            self.info.experiment_id = f"{self.name_of_evaluations}-{self.evaluations}"
            super().add_batch(predictions=[self.counts.flatten().tolist()], references=[0])
            result = super().compute()
        self.counts.zero_()
        return result

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, Any]:
        return self.measures(np.asarray(predictions).sum(axis=0).reshape(self.counts.shape))


class TopKAccuracy(AccumulatingMetric):
    """Top-1 and top-5 accuracy from ranked predictions.

    Args:
        has_top5: Whether there are enough classes for a top-5 accuracy.
        further_counts: Number of counts that a subclass adds to those of images, hits, and hits among the best five.
    """

    def __init__(self, has_top5: bool = True, further_counts: int = 0, **kwargs: Any):
        super().__init__((3 + further_counts,), **kwargs)
        self.has_top5 = has_top5

    def describe(self) -> tuple[str, str]:
        """What is measured, and what predictions and references are."""
        description = "Share of images whose true class is the best, or among the five best, predicted classes."
        inputs = "predictions: class ids of each image, best first; references: true class id of each image."
        return description, inputs

    def add_batch(self, *, predictions: Any, references: Any, **kwargs: Any) -> None:
        """Counts images: class ids `(B, k)`, best first, and true class ids `(B,)`."""
        ranked, truth = torch.as_tensor(predictions).cpu(), torch.as_tensor(references).cpu()
        if ranked.ndim != 2 or ranked.shape[:1] != truth.shape:
            raise ValueError(
                f"Expected ranked classes (B, k) and classes (B,), got {tuple(ranked.shape)} and {tuple(truth.shape)}."
            )
        hits = ranked == truth[:, None]
        self.counts[:3] += torch.stack([torch.tensor(len(truth)), hits[:, 0].sum(), hits[:, :TOP_K].any(dim=1).sum()])

    def measures(self, counts: np.ndarray) -> dict[str, float]:
        """`accuracy` and, with enough classes, `top5_accuracy`, in [0, 1]."""
        images, *hits = counts[:3].tolist()
        names = ("accuracy", "top5_accuracy") if self.has_top5 else ("accuracy",)
        return {name: count / images if images else float("nan") for name, count in zip(names, hits)}


def check_best_metric(args: TrainingArguments, names: Sequence[str] | None) -> None:
    """Raises a `ValueError` if the metric that chooses the best checkpoint, and stops training early, is none that an evaluation gives, or there
    is no evaluation to save after.

    Args:
        names: Those that it gives, without prefix; `None` if they are not known.
    """
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError("`save_strategy` best saves after evaluations, of which there are none: set `eval_strategy`.")
    if args.metric_for_best_model is None or names is None:
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    if metric not in names:
        raise ValueError(f"`metric_for_best_model` must be one of {', '.join(names)}, got {metric}.")
    if args.greater_is_better == metric.endswith("loss"):
        raise ValueError(
            f"`greater_is_better` {args.greater_is_better} would keep the checkpoint with the worst {metric}; leave it out."
        )


def rank_classes(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Ids of the six best classes (fewer if there are not six), `(B, 6)`, so that no logits are gathered. The sixth tells that a top-5
    accuracy says something."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(TOP_K + 1, logits.shape[-1]), dim=-1).indices


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Top-1 and, with more than five ranks, top-5 accuracy of ranked predictions, which are those of all processes already."""
    metric = TopKAccuracy(has_top5=prediction.predictions.shape[1] > TOP_K)
    metric.add_batch(predictions=prediction.predictions, references=prediction.label_ids)
    return metric.measures(metric.counts.numpy())
