"""Maps of an image put together from six views of it, against a computation pixel by pixel."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit.annotators.five_crop import FiveCrop
from modeling_lvvit.backbones.preprocessing import Preprocessing


SIZE, ENLARGED = (48, 24), (80, 40)  # height and width of the input; of the frame from which windows of 0.6 are cut
GRID = (3, 2)
TOPS_AND_LEFTS = [(0, 0), (0, 16), (32, 0), (32, 16), (16, 8)]


def annotator(score_map, fit="squash"):
    preprocessing = Preprocessing(SIZE, (1.0,) * 3, (0.0,) * 3, fit=fit)
    return SimpleNamespace(preprocessing=preprocessing, score_map=score_map, dense=SimpleNamespace(grid_size=GRID))


def cell_means(pixels: torch.Tensor) -> torch.Tensor:
    """Scores of two classes: mean red and green of the pixels of each cell."""
    return pixels[:, :2].float().unflatten(2, (3, 16)).unflatten(4, (2, 12)).mean((3, 5))


def test_cells_are_means_of_what_all_views_say_there():
    """Random scores of each view; each pixel of a frame that all borders divide takes those of the cells above it."""
    scores = torch.randn(6, 5, 4, *GRID, generator=torch.Generator().manual_seed(0))  # views, images, classes
    calls = iter(scores)
    result = FiveCrop(annotator(lambda view: next(calls))).score_map(torch.zeros(5, 6, 3, *SIZE))
    total, count = np.zeros((5, 4, 240, 240)), np.zeros((240, 240))
    places = [(0, 0, 240, 240)] + [(3 * top, 6 * left, 144, 144) for top, left in TOPS_AND_LEFTS]
    for view, (top, left, height, width) in zip(scores.numpy(), places):
        region = (slice(top, top + height), slice(left, left + width))
        total[(..., *region)] += np.kron(view, np.ones((height // 3, width // 2)))
        count[region] += 1
    expected = total.reshape(5, 4, 3, 80, 2, 120).sum((3, 5)) / count.reshape(3, 80, 2, 120).sum((1, 3))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("fit", "shape"), [("squash", (80, 40)), ("pad", (80, 20)), ("center_crop", (100, 40))])
def test_views_show_the_image_and_its_windows(fit, shape):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    views = FiveCrop(annotator(cell_means, fit))
    pixels, box = views.prepare(image)
    assert pixels.shape == (6, 3, *SIZE) and pixels.dtype == torch.uint8
    whole, expected_box = annotator(cell_means, fit).preprocessing(image)
    assert torch.equal(pixels[0], whole) and box == expected_box
    frame = Preprocessing(ENLARGED, (1.0,) * 3, (0.0,) * 3, fit=fit)(image)[0]
    for view, (top, left) in zip(pixels[1:], TOPS_AND_LEFTS):
        assert torch.equal(view, frame[:, top : top + 48, left : left + 24])


@pytest.mark.parametrize(("changed", "words"), [(1, "windows change"), (2, "WARNING: windows change")])
def test_images_whose_class_the_windows_change_are_counted(changed, words):
    scores = torch.zeros(6, 6, 4, *GRID)  # views, images, classes
    scores[0, :, 2], scores[1:, :changed, 3], scores[1:, changed:, 2] = 1, 5, 5
    calls = iter(scores)
    views = FiveCrop(annotator(lambda view: next(calls)))
    views.score_map(torch.zeros(6, 6, 3, *SIZE))
    assert (views.num_changed, views.num_images) == (changed, 6)
    assert views.describe().startswith(f"{words} the first class of {100 * changed / 6:.0f} % of 6 images")


def test_what_lies_at_a_place_stays_there():
    """A red and a green half: the map says so, as that of the whole image does."""
    array = np.zeros((96, 48, 3), np.uint8)
    array[:48, :, 0], array[48:, :, 1] = 200, 100
    pixels, _ = FiveCrop(annotator(cell_means)).prepare(Image.fromarray(array))
    scores = FiveCrop(annotator(cell_means)).score_map(pixels[None])[0]
    assert scores[0, 0].min() > 150 and scores[0, 2].max() < 50
    assert scores[1, 0].max() < 25 and scores[1, 2].min() > 75
    torch.testing.assert_close(scores, scores.flip(2), atol=1.0, rtol=0)
