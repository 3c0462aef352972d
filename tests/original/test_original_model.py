"""The rendering of the authors' step computes what ours computes."""

import numpy as np
import pytest
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.benchmark.models import dense_targets
from modeling_lvvit.original import model as original_model
from modeling_lvvit.original.convert import convert_state_dict
from modeling_lvvit.original.model import OriginalLVViT, draw_box, original_loss
from modeling_lvvit.token_labeling import TokenLabelCollator, TokenLabelTrainingArguments, finish_images
from modeling_lvvit.token_labeling.losses import LABEL_FIELDS, TokenLabelingLoss
from support.models import NUM_CLASSES, tiny_config
from support.samples import samples_of


@pytest.fixture
def both_models() -> tuple[OriginalLVViT, LVViTForImageClassification]:
    torch.manual_seed(0)
    config = tiny_config()
    original, ours = OriginalLVViT(config), LVViTForImageClassification(config)
    ours.load_state_dict(convert_state_dict(original.state_dict()))
    return original, ours


def test_logits_agree(both_models):
    original, ours = (model.eval() for model in both_models)
    images = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).logits, original(images), rtol=1e-4, atol=1e-5)


def test_training_losses_and_gradients_agree(both_models, labelled_rows, tmp_path, monkeypatch):
    original, ours = (model.train() for model in both_models)
    torch.manual_seed(5)
    samples = samples_of(labelled_rows)
    batch = finish_images(TokenLabelCollator((4, 6))([samples[index] for index in range(6)]))
    top, left, bottom, right = 1, 2, 3, 5
    batch["mix_mask"] = torch.zeros(6, 4, 6, dtype=torch.bool)
    batch["mix_mask"][:, top:bottom, left:right] = True
    monkeypatch.setattr(original_model, "draw_box", lambda *_: (top, left, bottom, right))
    targets = dense_targets(batch, (4, 6), NUM_CLASSES)
    theirs = original_loss(original(batch["pixel_values"]), targets, (4, 6))
    args = TokenLabelTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    outputs = ours(batch["pixel_values"], mix_mask=batch["mix_mask"])
    labels = {name: batch[name] for name in LABEL_FIELDS if name in batch}
    loss = TokenLabelingLoss(args, (4, 6), NUM_CLASSES)(outputs, labels, batch["mix_mask"])["loss"]
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-5)
    theirs.backward()
    loss.backward()
    gradients = convert_state_dict({name: weight.grad for name, weight in original.named_parameters()})
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(
            weight.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_boxes_stay_on_the_grid():
    np.random.seed(0)
    boxes = [draw_box(14, 14) for _ in range(500)]
    assert all(0 <= top <= bottom <= 14 and 0 <= left <= right <= 14 for top, left, bottom, right in boxes)
    areas = [(bottom - top) * (right - left) / 196 for top, left, bottom, right in boxes]
    assert np.mean(areas) == pytest.approx(0.271, abs=0.03)
