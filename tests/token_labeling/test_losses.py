"""Losses against their dense definition and numbers by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps
from modeling_lvvit.labels.label_maps import build_palette
from modeling_lvvit.labels.sparse_targets import SparseTargets
from modeling_lvvit.token_labeling.losses import (
    TokenLabelingLoss,
    blend_weight,
    mixed_cross_entropy,
    token_labeling_loss,
)
from modeling_lvvit.token_labeling.sparse_cross_entropy import soft_cross_entropy
from support.trainers import arguments


def random_targets(batch_size: int = 4, num_classes: int = 9) -> tuple[SparseTargets, SparseTargets]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(batch_size, num_classes, 5, 6, generator=generator).argsort(dim=1)[:, :3]
    scores = torch.randn(batch_size, 3, 5, 6, generator=generator)
    boxes = torch.tensor([[0.1, 0.0, 0.8, 0.6]]).expand(batch_size, 4)
    return crop_label_maps(*build_palette(ids), scores, CropGeometry(boxes), (3, 2), num_classes)


def dense_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1)


def test_worked_number():
    targets = SparseTargets(torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.25]), 2)
    loss = soft_cross_entropy(torch.tensor([[0.0, math.log(2)]]), targets)
    assert loss.item() == pytest.approx(math.log(3) - 0.75 * math.log(2))


def test_sparse_loss_and_gradient_equal_dense_ones():
    cls, tokens = random_targets()
    for targets, shape in ((cls.smooth(0.1), (4, 9)), (tokens.smooth(0.1), (4, 6, 9))):
        logits = torch.randn(shape, requires_grad=True)
        ours, reference = soft_cross_entropy(logits, targets), dense_cross_entropy(logits, targets.to_dense())
        torch.testing.assert_close(ours, reference)
        gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (ours, reference)]
        torch.testing.assert_close(*gradients)


def test_weighted_worked_number():
    targets = SparseTargets(torch.tensor([[1]]), torch.tensor([[0.5]]), torch.tensor([0.25]), 2)
    loss = soft_cross_entropy(torch.tensor([[0.0, math.log(2)]]), targets, torch.tensor([3.0, 1.0]))
    assert loss.item() == pytest.approx(1.5 * math.log(3) - 0.75 * math.log(2))


@pytest.mark.parametrize("names_all", [False, True])
def test_weighted_loss_and_gradient_are_those_of_torch(names_all, monkeypatch):
    """In parts of five rows, of class token and patch tokens, smoothed."""
    monkeypatch.setattr("modeling_lvvit.token_labeling.sparse_cross_entropy.CHUNK_ELEMENTS", 9 * 5)
    weights, scale = torch.rand(9) + 0.1, torch.rand(4, 6)
    cls, tokens = random_targets()
    if names_all:
        everything = torch.arange(9).expand(4, -1)
        cls, tokens = (
            SparseTargets(everything, part.to_dense(), torch.zeros_like(part.other), 9, names_all=True)
            for part in (cls, tokens)
        )
    for targets, rows in ((cls.smooth(0.1), scale[:, 0]), (tokens.smooth(0.1), scale)):
        logits = torch.randn(*rows.shape, 9, requires_grad=True)
        dense = targets.to_dense().reshape(-1, 9)
        ours = soft_cross_entropy(logits, targets, weights)
        reference = nn.functional.cross_entropy(logits.reshape(-1, 9), dense, weights, reduction="none").view_as(ours)
        torch.testing.assert_close(ours, reference)
        gradients = [
            torch.autograd.grad((rows * loss).sum(), logits, retain_graph=True)[0] for loss in (ours, reference)
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mixing", ["none", "token", "pixels"])
def test_class_weights_act_on_class_token_and_patch_tokens(mixing, tmp_path):
    """Against the formula, with dense labels of 9 classes for 3 x 2 tokens, smoothing and mixing."""
    weights = torch.rand(9) + 0.1
    cls, tokens = random_targets()
    generator = torch.Generator().manual_seed(2)
    outputs = {"cls_logits": torch.randn(4, 9), "patch_logits": torch.randn(4, 6, 9)}
    mask = torch.rand(1, 3, 2, generator=generator) < 0.5
    share = torch.rand(1, 3, 2, generator=generator).expand(4, -1, -1)
    labels = {"labels": torch.zeros(4, dtype=torch.long), **({"mix_share": share} if mixing == "pixels" else {})}
    objective = TokenLabelingLoss(arguments(tmp_path, label_smoothing_factor=0.1), (3, 2), 9, weights)
    objective.crop_targets = lambda labels: (None, cls, tokens)
    labels["token_label_palette"] = None
    losses = objective(outputs, labels, mask.expand(4, -1, -1) if mixing == "token" else None)
    exchanged = {"none": torch.zeros(1), "token": mask.float().flatten(1), "pixels": share.flatten(1)}[mixing]
    kept = 1 - exchanged.expand(4, 6).mean(dim=1, keepdim=True)
    one, many = cls.smooth(0.1).to_dense(), tokens.smooth(0.1).to_dense()
    one = kept * one + (1 - kept) * one.flip(0)
    if mixing == "pixels":
        many = (1 - share).flatten(1)[..., None] * many + share.flatten(1)[..., None] * many.flip(0)
    expected = [
        dense_cross_entropy(outputs[name], weights * target).mean()
        for name, target in (("cls_logits", one), ("patch_logits", many))
    ]
    torch.testing.assert_close(losses["cls_loss"], expected[0])
    torch.testing.assert_close(losses["token_loss"], expected[1])


def test_mixed_loss_equals_loss_of_mixed_target():
    cls, _ = random_targets()
    logits, kept = torch.randn(4, 9), torch.tensor([0.3, 0.6, 0.6, 0.3])
    weight = torch.tensor([0.5, 0.9, 0.9, 0.5])
    dense = weight.unsqueeze(1) * cls.to_dense()
    mixed = kept.unsqueeze(1) * dense + (1 - kept.unsqueeze(1)) * dense.flip(0)
    torch.testing.assert_close(mixed_cross_entropy(logits, cls, weight, kept), dense_cross_entropy(logits, mixed))


def test_blend_weight_is_half_where_both_agree():
    dense = SparseTargets.from_labels(torch.tensor([3, 1]), 5)
    assert blend_weight(dense, torch.tensor([3, 2])).tolist() == pytest.approx([0.5, 0.9])


def test_components_add_up():
    _, tokens = random_targets()
    losses = token_labeling_loss(torch.randn(4, 6, 9), torch.ones(4), tokens, cls_weight=2.0, dense_weight=0.5)
    assert losses["loss"].item() == pytest.approx(2.0 + 0.5 * losses["token_loss"].item())


def test_without_token_targets_the_loss_is_zero_but_depends_on_patch_logits():
    patch_logits = torch.randn(2, 6, 9, requires_grad=True)
    losses = token_labeling_loss(patch_logits, torch.ones(2), None)
    assert losses["token_loss"].item() == 0
    losses["loss"].backward()
    assert torch.equal(patch_logits.grad, torch.zeros_like(patch_logits))


def test_bfloat16_logits_are_summed_in_float32():
    _, tokens = random_targets()
    assert soft_cross_entropy(torch.randn(4, 6, 9, dtype=torch.bfloat16), tokens).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loss_in_parts_equals_loss_at_once(dtype, monkeypatch):
    _, tokens = random_targets()
    logits, weight = torch.randn(4, 6, 9, dtype=dtype, requires_grad=True), torch.rand(4, 6)
    results = []
    for elements in (2**24, 9 * 5):  # all 24 rows; five at a time
        monkeypatch.setattr("modeling_lvvit.token_labeling.sparse_cross_entropy.CHUNK_ELEMENTS", elements)
        loss = soft_cross_entropy(logits, tokens)
        results.append((loss, torch.autograd.grad((weight * loss).sum(), logits)[0]))
    torch.testing.assert_close(*results)
    assert results[0][1].dtype == dtype


class LargeTensors(TorchDispatchMode):
    """Counts the tensors of at least `size` elements that operations make again."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.pointers = size, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().nbytes() // result.element_size() >= self.size
        ):
            self.pointers |= {result.untyped_storage().data_ptr()} - known
        return result


def test_the_gradient_is_the_only_tensor_of_the_size_of_the_logits(monkeypatch):
    """Whatever the number of classes, next to the logits."""
    monkeypatch.setattr("modeling_lvvit.token_labeling.sparse_cross_entropy.CHUNK_ELEMENTS", 900)
    targets = SparseTargets(torch.zeros(4, 2, dtype=torch.long), torch.rand(4, 300, 2), torch.rand(4, 300), 9)
    logits = torch.randn(4, 300, 9, dtype=torch.bfloat16, requires_grad=True)
    with LargeTensors(logits.numel()) as large:
        gradient = torch.autograd.grad(soft_cross_entropy(logits, targets).mean(), logits)[0]
    assert large.pointers - {logits.data_ptr()} == {gradient.data_ptr()}


@pytest.mark.parametrize("shape", [(3,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_that_name_all_classes_are_not_looked_up(shape, dtype):
    """Loss and gradient are those of the same targets with ids, in chunks too."""
    torch.manual_seed(0)
    probabilities = torch.randn(*shape, 7).softmax(-1)
    ids = torch.arange(7).expand(3, -1)
    looked_up = SparseTargets(ids, probabilities - 0.01, torch.full(shape, 0.01), 7).smooth(0.1)
    results = []
    for targets in (looked_up, replace(looked_up, names_all=True)):
        logits = torch.randn(*shape, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        losses = soft_cross_entropy(logits, targets)
        (losses * torch.arange(losses.numel()).view(shape)).sum().backward()
        results.append((losses.detach(), logits.grad))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
