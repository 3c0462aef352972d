"""The dense-label format: numbers that can be checked by hand."""

import math

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from modeling_lvvit.labels.axis_weights import axis_weights
from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps, pool_label_maps
from modeling_lvvit.labels.label_maps import build_palette, decode, encode_top_k, id_dtype
from modeling_lvvit.labels.sparse_targets import SparseTargets


def asymmetric_map(rows: int = 4, columns: int = 6) -> torch.Tensor:
    """Class ids that tell every quarter of the map apart: [[0, 1], [2, 3]] blown up, `(1, 1, rows, columns)`."""
    quarter = torch.tensor([[0, 1], [2, 3]])
    return quarter.repeat_interleave(rows // 2, 0).repeat_interleave(columns // 2, 1)[None, None]


def top_classes(ids: torch.Tensor, box: list[float], grid=(2, 2), label_crop="correct") -> list[int]:
    scores = torch.full(ids.shape, 10.0, dtype=torch.float16)
    boxes = torch.tensor([box]).expand(len(ids), 4)
    _, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(boxes), grid, 5, label_crop)
    return tokens.top_class()[0].tolist()


SIDES = {
    "left": ([0.0, 0.0, 0.5, 1.0], [0, 0, 2, 2]),
    "right": ([0.5, 0.0, 1.0, 1.0], [1, 1, 3, 3]),
    "top": ([0.0, 0.0, 1.0, 0.5], [0, 1, 0, 1]),
    "bottom": ([0.0, 0.5, 1.0, 1.0], [2, 3, 2, 3]),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("mirrored", [False, True])
def test_each_side_gets_its_own_labels(side, batch_size, mirrored):
    box, expected = SIDES[side]
    ids = asymmetric_map()
    if mirrored:  # the right half of the mirrored map is the left half of the map
        ids = ids.flip(-1)
        expected = [expected[i] + (1 if expected[i] % 2 == 0 else -1) for i in range(4)]
    assert top_classes(ids.expand(batch_size, -1, -1, -1).contiguous(), box) == expected


def test_authors_crop_exchanges_rows_and_columns():
    box, _ = SIDES["top"]
    assert top_classes(asymmetric_map(), box, label_crop="authors") == SIDES["left"][1]


def test_unknown_crop_mode_is_refused():
    with pytest.raises(ValueError, match="'correct' or 'authors'"):
        top_classes(asymmetric_map(), SIDES["top"][0], label_crop="other")


def test_crop_equals_roi_align_for_random_boxes():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(8, 3, 9, 13, generator=generator)
    corners = torch.rand(8, 2, 2, generator=generator).sort(dim=1).values * 0.6 + torch.tensor([[0.0], [0.4]])
    boxes = torch.stack((corners[:, 0, 0], corners[:, 0, 1], corners[:, 1, 0], corners[:, 1, 1]), dim=1)
    scale = torch.tensor([13, 9, 13, 9])
    regions = torch.cat((torch.arange(8.0).unsqueeze(1), boxes * scale - 0.5), dim=1)
    expected = roi_align(maps, regions, (5, 4))
    torch.testing.assert_close(
        pool_label_maps(maps, CropGeometry(boxes), (5, 4), "correct"), expected, rtol=1e-5, atol=2e-6
    )


def test_axis_weights_of_a_whole_axis_are_the_identity():
    weights = axis_weights(torch.tensor([0.0]), torch.tensor([1.0]), map_size=4, num_bins=4)
    torch.testing.assert_close(weights[0], torch.eye(4))


def test_axis_weights_sum_to_one_for_tiny_and_border_crops():
    start, end = torch.tensor([0.0, 0.99, 0.5]), torch.tensor([0.01, 1.0, 0.5])
    torch.testing.assert_close(axis_weights(start, end, 6, 3).sum(-1), torch.ones(3, 3))


def test_crop_does_not_change_its_inputs_and_repeats():
    ids, scores = asymmetric_map(), torch.full((1, 1, 4, 6), 3.0)
    box = torch.tensor([[0.1, 0.2, 0.7, 0.9]])
    palette, index = build_palette(ids)
    before = [value.clone() for value in (palette, index, scores, box)]
    first = crop_label_maps(palette, index, scores, CropGeometry(box), (3, 2), 5)[1].to_dense()
    second = crop_label_maps(palette, index, scores, CropGeometry(box), (3, 2), 5)[1].to_dense()
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, (palette, index, scores, box)))


def test_one_cell_softmax_by_hand():
    """Scores log 3 and 0 for classes 4 and 1 of five: (3, 1, 1, 1, 1) / 7."""
    ids = torch.tensor([4, 1]).view(1, 2, 1, 1)
    scores = torch.tensor([math.log(3), 0.0]).view(1, 2, 1, 1)
    cls, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(torch.tensor([[0.0, 0, 1, 1]])), (1, 1), 5)
    expected = torch.tensor([1, 1, 1, 1, 3]) / 7
    torch.testing.assert_close(cls.to_dense()[0], expected)
    torch.testing.assert_close(tokens.to_dense()[0, 0], expected)


def test_temperature_sharpens_targets():
    ids, scores = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1, 1)
    box = torch.tensor([[0.0, 0, 1, 1]])
    cls, _ = crop_label_maps(*build_palette(ids), scores, CropGeometry(box), (1, 1), 3, temperature=0.5)
    assert cls.to_dense()[0, 0].item() == pytest.approx(math.exp(2) / (math.exp(2) + 2))


@pytest.mark.parametrize("num_classes", [10, 1000, 21_841, 100_000])
@pytest.mark.parametrize("k", [1, 5])
def test_sparse_targets_equal_dense_softmax(num_classes, k):
    """Batches whose palettes have different lengths, so that padding is exercised."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(3, num_classes, 5, 7, generator=generator) * 4
    logits[0] = logits[0, :, :1, :1]  # one image with k classes only
    ids, scores = (torch.from_numpy(value) for value in encode_top_k(logits, k))
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.2, 0.1, 0.9, 0.6], [0.5, 0.5, 1, 1]])
    _, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(boxes), (4, 3), num_classes)
    pooled = pool_label_maps(decode(ids, scores, num_classes), CropGeometry(boxes), (4, 3), "correct")
    expected = pooled.double().flatten(2).mT.softmax(-1).float()
    torch.testing.assert_close(tokens.to_dense(), expected, rtol=2e-5, atol=1e-7)


def test_encode_keeps_the_best_classes_in_order():
    logits = torch.tensor([0.5, 3.0, -1.0, 2.0]).view(4, 1, 1)
    ids, scores = encode_top_k(logits, 2)
    assert ids[:, 0, 0].tolist() == [1, 3]
    assert scores[:, 0, 0].tolist() == [3.0, 2.0]
    assert ids.dtype == np.int16
    assert scores.dtype == np.float16


def test_ids_beyond_int16_are_kept():
    assert id_dtype(32_768) == np.int16
    assert id_dtype(32_769) == np.int32
    logits = torch.zeros(40_000, 1, 1)
    logits[39_999] = 1
    assert encode_top_k(logits, 1)[0].item() == 39_999


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_scores_that_float16_cannot_hold_are_refused(bad):
    with pytest.raises(ValueError, match="float16"):
        encode_top_k(torch.full((2, 1, 1), bad), 1)


def test_k_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        encode_top_k(torch.zeros(2, 1, 1), 3)


def test_palette_gives_ids_back():
    ids = torch.randint(0, 50, (4, 5, 3, 2), generator=torch.Generator().manual_seed(0))
    palette, index = build_palette(ids)
    assert torch.equal(palette.gather(1, index.long().flatten(1)).view(ids.shape), ids)


def test_smoothing_keeps_the_sum():
    targets = SparseTargets.from_labels(torch.tensor([2, 0]), 4).smooth(0.1)
    torch.testing.assert_close(targets.to_dense().sum(-1), torch.ones(2))
    torch.testing.assert_close(targets.to_dense()[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))
