"""Images with several classes, or none: loss and metrics of classifiers whose `problem_type` is multi_label_classification."""

from typing import Any

import numpy as np
import torch
from torch import nn

from .arguments import TokenLabelTrainingArguments


METRICS = ("mean_average_precision", "micro_f1", "macro_f1", "exact_match")
THRESHOLD = 0.5  # probability from which on an image counts as one of a class


class MultiLabelLoss:
    """The loss of a training batch: binary cross-entropy of each class by the class token, with plain labels.

        L = cls_weight * mean_{b, c} [-t log p - (1 - t) log(1 - p)],  p = sigmoid(X_cls)

    Targets t are 1 for the classes of an image, else 0. Label smoothing s moves them towards 1/2, `(1 - s) t + s / 2`: the uniform
    distribution over the two answers of each class. Those of mixed images are mixed in the proportion of their tokens, as for single
    classes. Patch tokens learn nothing.

    Worked number: logit 0 gives log 2 = 0.6931, whatever t is; logit log 3 (p = 0.75) with t = 1 and s = 0.2 gives
    -0.9 log 0.75 - 0.1 log 0.25 = 0.3975.
    """

    def __init__(self, args: TokenLabelTrainingArguments):
        self.args = args

    def __call__(
        self,
        outputs: Any,
        labels: dict[str, torch.Tensor],
        mix_mask: torch.Tensor | None = None,
        online_targets: None = None,
    ) -> dict[str, torch.Tensor]:
        """`loss`, `cls_loss` and `token_loss`, scalars in float32; `token_loss` is an exact zero that still depends on `patch_logits`, so
        that distributed training sees a gradient for every parameter.

        Args:
            labels: `labels` `(B, C)`, 0 or 1, and `mix_share` `(B, rows, columns)` where CutMix or Mixup was used.
            mix_mask: Bool `(B, rows, columns)` of MixToken, or `None`.
        """
        smoothing = self.args.label_smoothing_factor
        targets = (1 - smoothing) * labels["labels"].float() + smoothing / 2
        exchanged = mix_mask if mix_mask is not None else labels.get("mix_share")
        if exchanged is not None:
            partner_share = exchanged.flatten(1).float().mean(dim=1, keepdim=True)  # (B, 1)
            targets = torch.lerp(targets, targets.flip(0), partner_share)
        cls_loss = nn.functional.binary_cross_entropy_with_logits(outputs["cls_logits"].float(), targets)
        token_loss = 0.0 * outputs["patch_logits"].float().mean()
        return {"loss": self.args.cls_weight * cls_loss + token_loss, "cls_loss": cls_loss, "token_loss": token_loss}


def multi_label_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures of predictions, in [0, 1], by scikit-learn; classes are predicted from a probability of `THRESHOLD` on.

    Args:
        probabilities: `(n, C)`.
        labels: 0 or 1, `(n, C)`.

    Returns:
        `mean_average_precision`, over the classes that any image has (NaN without any); `micro_f1`, of all decisions together;
        `macro_f1`, the mean over the same classes; `exact_match`, the share of images of which every class is right.
    """
    from sklearn.metrics import (  # a second that programs without need do not wait for
        average_precision_score,
        f1_score,
    )

    truth, predicted = labels > 0.5, probabilities >= THRESHOLD
    classes = np.flatnonzero(truth.any(axis=0))
    precisions = [average_precision_score(truth[:, index], probabilities[:, index]) for index in classes]
    scores = [f1_score(truth[:, index], predicted[:, index], zero_division=0.0) for index in classes]
    return {
        "mean_average_precision": float(np.mean(precisions)) if len(classes) else float("nan"),
        "micro_f1": float(f1_score(truth.ravel(), predicted.ravel(), zero_division=0.0)),
        "macro_f1": float(np.mean(scores)) if len(classes) else float("nan"),
        "exact_match": float((truth == predicted).all(axis=1).mean()),
    }


def compute_multi_label_metrics(prediction: Any) -> dict[str, float]:
    """`multi_label_metrics` of logits, for a Trainer."""
    logits = prediction.predictions
    logits = torch.from_numpy(logits[0] if isinstance(logits, tuple) else logits)
    return multi_label_metrics(logits.float().sigmoid().numpy(), prediction.label_ids)


def describe_metrics(metrics: dict[str, float]) -> str:
    """The metrics in words, in per cent; names may begin with `eval_`."""
    titles = ("mean average precision", "micro F1", "macro F1", "all classes right")
    plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return ", ".join(f"{title} {100 * plain[name]:.2f} %" for name, title in zip(METRICS, titles))
