"""Metrics as `evaluate.Metric` subclasses: they need no download and add up over processes."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch


class TopKAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy from ranked predictions."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of images whose true class is the best, or among the five best, predicted classes.",
            citation="",
            inputs_description=(
                "predictions: class ids of each image, best first; references: true class id of each image."
            ),
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        """
        Args:
            predictions: `(num_images, k)` class ids, best first.
            references: `(num_images,)` class ids.

        Returns:
            `accuracy` and, with at least five ranks, `top5_accuracy`, in [0, 1].
        """
        hits = np.asarray(predictions) == np.asarray(references)[:, None]
        results = {"accuracy": float(hits[:, 0].mean())}
        if hits.shape[1] >= 5:
            results["top5_accuracy"] = float(hits[:, :5].any(axis=1).mean())
        return results


def rank_classes(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Ids of the five best classes (fewer if there are not five), `(B, 5)`, so that no logits are gathered."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


def compute_accuracy(prediction: Any) -> dict[str, float]:
    """Top-1 and top-5 accuracy of ranked predictions."""
    return TopKAccuracy(keep_in_memory=True).compute(
        predictions=prediction.predictions, references=prediction.label_ids
    )
