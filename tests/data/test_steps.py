"""Which process takes which images of an optimizer step."""

import pytest
from torch.utils.data import SequentialSampler

from modeling_lvvit.data.steps import StepBatchSampler, StepDivision


def samplers(images: int, division: StepDivision, drop_last: bool = False) -> list[StepBatchSampler]:
    rows = SequentialSampler(range(images))
    return [StepBatchSampler(rows, division, process, drop_last) for process in range(division.num_processes)]


def counted_images(images: int, division: StepDivision, drop_last: bool = False) -> list[list[int]]:
    """Images of each step that count, in the order of the micro-batches."""
    parts = samplers(images, division, drop_last)
    rounds = list(zip(*map(list, parts), strict=True))
    steps = []
    for step in range(parts[0].num_steps):
        weights = [part.weights(step) for part in parts]
        first, number = step * division.accumulation_steps, len(weights[0])
        micro_batches = [
            (batch, weights[process][turn])
            for turn in range(number)
            for process, batch in enumerate(rounds[first + turn])
        ]
        steps.append([row for batch, weight in micro_batches if weight for row in batch])
        # of the mean over micro-batches and processes every image is the same share
        shares = [weight / number / division.num_processes / len(batch) for batch, weight in micro_batches if weight]
        assert shares == pytest.approx([1 / len(steps[-1])] * len(shares))
    return steps


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("images", [1, 3, 7, 8, 9, 17, 24, 41])
@pytest.mark.parametrize(
    "division", [(8, 1, 1), (4, 2, 1), (2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 1, 8), (1, 4, 2)], ids=str
)
def test_steps_take_the_same_images_however_they_are_divided(division, images, drop_last):
    """Each once."""
    steps = [list(range(first, min(first + 8, images))) for first in range(0, images, 8)]
    if drop_last and images % 8:
        steps.pop()
    assert counted_images(images, StepDivision(*division), drop_last) == steps


def test_whole_steps_are_not_weighted():
    for part in samplers(16, StepDivision(2, 2, 2)):
        assert part.weights(0) == part.weights(1) == [1.0, 1.0]


def test_processes_without_images_get_others_that_count_nothing():
    """9 images in steps of 8: of the second step the second process has none."""
    first, second = samplers(9, StepDivision(4, 2, 1))
    assert list(first) == [[0, 1, 2, 3], [8]] and list(second) == [[4, 5, 6, 7], [8]]
    assert first.weights(1) == [2.0] and second.weights(1) == [0.0]
    assert first.images(1) == 1 and first.images(3) == 1  # steps of the next epoch are counted on
