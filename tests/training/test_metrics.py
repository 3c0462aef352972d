"""Accuracies of the Trainer."""

import pytest
import torch
from transformers import EvalPrediction

from modeling_lvvit.training.metrics import compute_accuracy, rank_classes


@pytest.mark.parametrize(
    ("num_classes", "names"), [(3, {"accuracy"}), (5, {"accuracy"}), (6, {"accuracy", "top5_accuracy"})]
)
def test_top5_is_reported_where_there_are_more_than_five_classes(num_classes, names):
    """Of five classes it would be 100 %, whatever the model says."""
    logits = torch.arange(num_classes).flip(0).float().expand(num_classes, -1)
    ranked = rank_classes(logits, None)
    figures = compute_accuracy(EvalPrediction(ranked.numpy(), torch.arange(num_classes).numpy()))
    assert figures.keys() == names
    assert figures["accuracy"] == pytest.approx(1 / num_classes)
    assert figures.get("top5_accuracy", 5 / 6) == pytest.approx(5 / 6)
