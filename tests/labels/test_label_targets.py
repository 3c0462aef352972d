"""Targets of maps that name every class, and of maps that cover a small part of their image."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import roi_align

from modeling_lvvit.labels.label_crops import (
    CropGeometry,
    crop_label_maps,
    crop_palette_scores,
    pool_label_maps,
    softmax_over_all_classes,
)
from modeling_lvvit.labels.label_maps import build_palette
from modeling_lvvit.labels.sparse_targets import SparseTargets
from modeling_lvvit.token_labeling.arguments import TokenLabelTrainingArguments
from modeling_lvvit.token_labeling.augmentation.collator import TokenLabelCollator
from modeling_lvvit.token_labeling.augmentation.transforms import AugmentationConfig, TrainTransform
from modeling_lvvit.token_labeling.losses import TokenLabelingLoss, blend_weight
from modeling_lvvit.token_labeling.sparse_cross_entropy import soft_cross_entropy


WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, -16, -20, -100, -10_000, 100])
def test_targets_that_name_all_classes_do_not_depend_on_an_offset(offset, dtype):
    scores = torch.tensor([[2.0, 0.0, -1.0]]).to(dtype) + offset
    targets = softmax_over_all_classes(scores, torch.tensor([[0, 1, 2]]), 3)
    torch.testing.assert_close(targets.to_dense(), scores.double().softmax(-1).float(), rtol=1e-6, atol=1e-7)
    if dtype == torch.float32:
        assert targets.to_dense()[0].tolist() == pytest.approx([0.844, 0.114, 0.042], abs=5e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_stored_maps_of_all_classes_and_of_some_in_a_batch(temperature):
    """The second map names one class of three: its padding stands for the two others, each with score 0."""
    ids = torch.tensor([[0, 1, 2], [2, 2, 2]]).view(2, 3, 1, 1)
    palette, index = build_palette(ids)
    scores = torch.tensor([[-14.0, -16.0, -17.0], [-1.0, -1.0, -1.0]]).view(2, 3, 1, 1).half()
    geometry = CropGeometry(WHOLE.expand(2, 4))
    cls, tokens = crop_label_maps(palette, index, scores, geometry, (1, 1), 3, temperature=temperature)
    dense = torch.tensor([[-14.0, -16.0, -17.0], [0.0, 0.0, -1.0]]).double() / temperature
    for targets in (cls.to_dense(), tokens.to_dense()[:, 0]):
        torch.testing.assert_close(targets, dense.softmax(-1).float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("names_all", [True, False])
def test_loss_and_gradient_of_all_negative_scores_are_those_of_float64(dtype, names_all):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, 7, 5, 5, generator=generator) - 40
    palette = torch.arange(7).expand(4, -1)
    _, targets = crop_palette_scores(scores, palette, CropGeometry(WHOLE.expand(4, 4)), (3, 2), 7)
    targets.names_all = names_all
    targets = targets.smooth(0.1)
    pooled = pool_label_maps(scores, CropGeometry(WHOLE.expand(4, 4)), (3, 2)).double()
    expected_targets = 0.9 * pooled.flatten(2).mT.softmax(-1) + 0.1 / 7
    logits = torch.randn(4, 6, 7, generator=generator).to(dtype).requires_grad_()
    loss = soft_cross_entropy(logits, targets).mean()
    loss.backward()
    reference = logits.detach().double().requires_grad_()
    expected = -(expected_targets * reference.log_softmax(-1)).sum(-1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(logits.grad.double(), reference.grad, **tolerance)


@pytest.mark.parametrize("shape", [(6,), (6, 5)])
def test_top_class_is_the_most_probable_of_all(shape):
    """Palettes of all lengths, with and without class 0, and scores mostly below those of the classes that are not named."""
    generator = torch.Generator().manual_seed(1)
    for num_named in range(1, 7):
        for _ in range(20):
            ids = torch.stack([torch.randperm(6, generator=generator)[:num_named].sort().values for _ in range(6)])
            ids[0, 1:] = 0  # padding
            excess = torch.randn(*shape, num_named, generator=generator) - (1.0 if num_named < 6 else 0.0)
            excess[0, ..., 1:] = 0
            targets = SparseTargets(ids, excess, torch.zeros(shape), 6)
            best = targets.to_dense().amax(-1, keepdim=True)
            assert (targets.to_dense().gather(-1, targets.top_class().unsqueeze(-1)) == best).all()
            assert targets.top_class().dtype == torch.int64


def test_labels_agree_with_no_named_class_that_has_less_than_the_others():
    """Class 2 is named with score -3: each of the four others has twenty times its probability."""
    targets = softmax_over_all_classes(torch.tensor([[-3.0]]), torch.tensor([[2]]), 5)
    assert targets.top_class().tolist() == [0]
    assert blend_weight(targets, torch.tensor([2])).tolist() == [pytest.approx(0.9)]


def crops_of_region(region: tuple[float, ...], count: int, generator: torch.Generator) -> torch.Tensor:
    """Random crops of an image, as fractions of a region of it."""
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    corners[:, 1] = torch.maximum(corners[:, 1], corners[:, 0] + 0.12)  # RoIAlign widens crops of less than a cell
    offset, size = torch.tensor(region[:2]), torch.tensor(region[2:]) - torch.tensor(region[:2])
    return ((corners - offset) / size).flatten(1)


REGIONS = [(0.3, 0.3, 0.6, 0.6), (0.1, 0.45, 0.2, 0.5), (0.2, 0.0, 0.8, 1.0), (0.0, 0.0, 1.0, 1.0)]


@pytest.mark.parametrize("region", REGIONS)
def test_crops_larger_than_the_map_equal_roi_align(region):
    """RoIAlign knows no nearest cell outside a map, so that its map is continued here."""
    generator = torch.Generator().manual_seed(0)
    boxes, size = crops_of_region(region, 1000, generator), torch.tensor([11, 9, 11, 9])
    maps, margin = torch.randn(1000, 1, 9, 11, generator=generator), 230
    expected = []
    for part, box in zip(maps.split(50), boxes.split(50)):
        wide = torch.nn.functional.pad(part.double(), (margin,) * 4, mode="replicate")
        borders = (box * size).double() - 0.5 + margin
        expected.append(
            roi_align(wide, torch.cat((torch.arange(len(part)).double().unsqueeze(1), borders), 1), (5, 4))
        )
    pooled = pool_label_maps(maps, CropGeometry(boxes), (5, 4))
    # where a bin is a whole number of cells long, rounding decides whether it has a point more
    assert ((pooled - torch.cat(expected)).abs() > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("region", REGIONS)
def test_moved_crops_larger_than_the_map_equal_a_dense_mean(region):
    generator = torch.Generator().manual_seed(0)
    boxes, grid = crops_of_region(region, 4, generator), (4, 3)
    maps = torch.nn.functional.interpolate(torch.randn(4, 2, 4, 5, generator=generator), (9, 11), mode="bicubic")
    affine = torch.tensor([[0.9, 0.2, 0.05], [-0.3, 1.1, 0.1]]).expand(4, 2, 3)
    geometry = CropGeometry(boxes, affine, torch.tensor([[-1e4, -1e4, 1e4, 1e4]]).expand(4, 4))
    points = 2 * geometry.points(grid, (60, 60)) - 1
    values = torch.nn.functional.grid_sample(
        maps.double(), points.double(), padding_mode="border", align_corners=False
    )
    expected = torch.nn.functional.avg_pool2d(values, 60)
    assert (pool_label_maps(maps, geometry, grid) - expected).abs().mean() < 0.02


def test_targets_do_not_depend_on_the_other_crops_of_a_batch():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat([crops_of_region(region, 2, generator) for region in REGIONS])
    maps, affine = torch.randn(8, 3, 9, 11, generator=generator), torch.tensor([[0.9, 0.2, 0.05], [-0.3, 1.1, 0.1]])
    geometry = CropGeometry(boxes, affine.expand(8, 2, 3), torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(8, 4))
    for grid, covered_only in (((4, 3), False), ((1, 1), True)):
        together = pool_label_maps(maps, geometry, grid, covered_only=covered_only)
        alone = [pool_label_maps(maps[[i]], geometry.select([i]), grid, covered_only=covered_only) for i in range(8)]
        assert torch.equal(together, torch.cat(alone))


def test_training_counts_all_cells_of_a_map_of_a_small_region():
    """Every cell names another class than its neighbors; a token of the whole image spans many of them."""
    ids = np.arange(18 * 18).reshape(1, 18, 18) % 5
    plain = AugmentationConfig(
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        horizontal_flip=0.0,
        random_erasing=0.0,
        rand_augment="rand-m1-n1",
    )
    transform = TrainTransform((32, 32), [0.5] * 3, [0.5] * 3, plain)
    transform.rand_augment.operations = []
    transform.rand_augment.draw = lambda size: (None, [])
    image, region = Image.new("RGB", (64, 64)), (0.25, 0.25, 0.5, 0.5)
    sample = transform(image, ids, np.full(ids.shape, 30, np.float16), region)
    batch = TokenLabelCollator((4, 4), mix_probability=0.0)(
        [{**sample, "token_label_palette": torch.arange(5), "labels": 0}]
    )
    assert batch["crop_cells"] == [(72, 72)]
    objective = TokenLabelingLoss(TokenLabelTrainingArguments(output_dir="unused"), (4, 4), 5)
    _, _, tokens = objective.crop_targets(batch)
    # the token that shows exactly the map: all classes have nearly a fifth
    assert tokens.to_dense()[0, 5].tolist() == pytest.approx([0.2] * 5, abs=0.1)
