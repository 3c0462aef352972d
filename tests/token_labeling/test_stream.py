"""Training samples from streams, with label maps joined by key."""

import itertools

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import SkipBatchSampler

from modeling_lvvit.annotators.pipeline import spread_to_borders
from modeling_lvvit.data.image_keys import find_keys, hash_keys
from modeling_lvvit.data.images import SampleError
from modeling_lvvit.data.steps import EndlessSampler, StepBatchSampler, StepDivision, StreamOrder
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.token_labeling import TokenLabelStream
from support.images import encode_image
from support.label_sets import layout_of, random_maps


CLASSES = ("cat", "dog", "eel")


def image_stream(numbers: list[int], labels: list[int | None] | None = None) -> datasets.IterableDataset:
    """Images called `x/NUMBER.png`, as high as 4 and their number."""
    contents = [encode_image(np.zeros((4 + number, 8, 3), dtype=np.uint8), "PNG") for number in numbers]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = pa.array(
        [{"bytes": content, "path": f"x/{number}.png"} for content, number in zip(contents, numbers)],
        datasets.Image().pa_type,
    )
    labels = pa.array(labels if labels is not None else [number % 3 for number in numbers], pa.int64())
    table = pa.Table.from_arrays([images, labels], schema=features.arrow_schema)
    return datasets.Dataset(table).to_iterable_dataset(num_shards=min(2, len(numbers)))


def label_set(keys: list[str], is_empty: list[bool] | None = None) -> tuple[LabelSet, np.ndarray]:
    """A label set of random maps, and their ids."""
    maps = random_maps(len(keys))
    unknown = [None] * len(keys)
    empty = is_empty or [False] * len(keys)
    table = layout_of(maps).table(keys, unknown, maps, unknown, [""] * len(keys), empty)
    return LabelSet(datasets.Dataset(table)), maps.ids


def stream_of(numbers: list[int], labels: LabelSet | None, **options) -> TokenLabelStream:
    def transform(image, index=None, scores=None, box=None):
        sample = {"height": image.height}
        return sample if index is None else {**sample, "index": index, "box": box}

    rows = image_stream(numbers, options.pop("human", None))
    return TokenLabelStream(rows, transform, "image", "label", labels, **options)


def sorted_ids(sample: dict) -> np.ndarray:
    return np.sort(sample["token_label_palette"].numpy()[sample["index"]], axis=0)


def take(stream: TokenLabelStream, count: int) -> list[dict]:
    return list(itertools.islice(iter(stream), count))


def test_every_image_gets_its_own_map_again_and_again():
    labels, ids = label_set([f"x/{number}.png" for number in (3, 1, 0, 2)])
    for sample in take(stream_of([0, 1, 2, 3], labels), 12):
        row = [3, 1, 0, 2].index(sample["height"] - 4)
        assert np.array_equal(sorted_ids(sample), np.sort(ids[row], axis=0))
        assert sample["labels"] == (sample["height"] - 4) % 3


def test_shuffled_stream_differs_between_passes_but_not_between_runs():
    numbers = list(range(12))
    first, again = (
        [sample["height"] for sample in take(stream_of(numbers, None, shuffle_buffer=12, seed=1), 24)]
        for _ in range(2)
    )
    assert first == again
    assert first[:12] != first[12:]
    assert sorted(first[:12]) == sorted(first[12:]) == [4 + number for number in numbers]


def test_processes_and_workers_divide_the_stream():
    numbers = list(range(8))
    parts = [stream_of(numbers, None, process_index=rank, num_processes=2) for rank in range(2)]
    seen = [{sample["height"] for sample in take(part, 4)} for part in parts]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 8
    steps = steps_of(8, StreamOrder(1, 2, 2), StepDivision(2, 1, 1), workers=2)[:4]
    assert sorted(itertools.chain(*steps)) == numbers


def steps_of(
    images: int, order: StreamOrder, division: StepDivision, workers: int = 0, first: int = 0
) -> list[list[int]]:
    """Images of twelve steps, all processes together in the order of their micro-batches, from a step on."""
    steps = [[] for _ in range(12 - first)]
    for process in range(division.num_processes):
        stream = stream_of(list(range(images)), None, shuffle_buffer=3, seed=1)
        stream.order = order
        batches = SkipBatchSampler(
            StepBatchSampler(EndlessSampler(), division, process), first * division.accumulation_steps
        )
        loader = torch.utils.data.DataLoader(stream, batch_sampler=batches, num_workers=workers)
        for number, batch in enumerate(itertools.islice(loader, len(steps) * division.accumulation_steps)):
            place = number % division.accumulation_steps * division.num_processes + process
            steps[number // division.accumulation_steps].append((place, (batch["height"] - 4).tolist(), batch["seed"]))
    return [[image for _, part, _ in sorted(parts, key=lambda part: part[0]) for image in part] for parts in steps]


@pytest.mark.parametrize("begun", [(1, 1, 4), (1, 2, 4), (2, 1, 2), (4, 1, 1)], ids=str)
@pytest.mark.parametrize(
    ("division", "workers"),
    [((4, 1, 1), 0), ((2, 2, 1), 0), ((1, 4, 1), 0), ((1, 2, 2), 2), ((2, 1, 2), 1), ((1, 1, 4), 3)],
    ids=str,
)
def test_other_processes_and_workers_go_on_in_the_order_of_a_stream(begun, division, workers):
    """From a step in the middle: the same images in the same steps, in the same places."""
    order = StreamOrder(*begun)
    whole = steps_of(9, order, StepDivision(begun[2], begun[0], 4 // (begun[0] * begun[2])), max(0, begun[1] - 1))
    assert all(len(step) == 4 for step in whole)
    assert steps_of(9, order, StepDivision(*division), workers, first=5) == whole[5:]


def test_the_order_of_a_stream_is_that_of_the_workers_that_began_it():
    """As PyTorch takes batches of its workers in turn, and processes take theirs."""
    assert [StreamOrder(2, 2, 3).place(number) for number in range(14)] == [
        *((0, 0, number) for number in (0, 1, 2)), *((1, 0, number) for number in (0, 1, 2)),
        *((0, 1, number) for number in (0, 1, 2)), *((1, 1, number) for number in (0, 1, 2)),
        (0, 0, 3), (0, 0, 4),
    ]  # fmt: skip


def test_no_more_workers_begin_a_stream_than_it_has_files():
    stream = stream_of(list(range(8)), None)
    assert stream.begin_order(1, 5, 4) == StreamOrder(1, 2, 4)
    assert stream.begin_order(2, 0, 4) == StreamOrder(2, 0, 4)  # as former versions read without workers


def test_key_pattern_cuts_both_sides():
    labels, ids = label_set(["all/n2.jpg", "all/n0.jpg", "all/n1.jpg"])
    (sample,) = take(stream_of([1, 2, 0], labels, key_pattern=r"(\d+)\."), 1)
    assert np.array_equal(sorted_ids(sample), np.sort(ids[2], axis=0))


def test_images_with_empty_labels_are_passed_over():
    labels, _ = label_set(["x/0.png", "x/1.png", "x/2.png"], [False, True, False])
    assert {sample["height"] for sample in take(stream_of([0, 1, 2], labels), 6)} == {4, 6}
    with pytest.raises(ValueError, match="All images have an empty label"):
        stream_of([0, 1], label_set(["x/0.png", "x/1.png"], [True, True])[0])
    lonely, _ = label_set(["x/0.png", "x/1.png"], [True, False])
    with pytest.raises(SampleError, match="No image of the stream"):
        take(stream_of([0], lonely), 1)


def test_images_without_a_map_or_a_label_are_named():
    labels, _ = label_set(["x/0.png", "x/1.png"])
    with pytest.raises(SampleError, match="'x/7.png' has no label map"):
        take(stream_of([0, 7], labels), 2)
    for human in ([0, None], [0, -1], [0, 3]):
        with pytest.raises(SampleError, match=f"x/1.png of the stream has the label {human[1]}"):
            take(stream_of([0, 1], None, human=human), 2)


def test_row_numbers_are_no_keys_of_a_stream():
    with pytest.raises(ValueError, match="row number, which a stream does not tell"):
        stream_of([0], label_set(["row:0"])[0])


def test_accents_may_be_written_in_two_ways():
    assert find_keys(pa.array(["K\u00e4fer/1.jpg"]), pa.array(["a.jpg", "Ka\u0308fer/1.jpg"])) == [1]
    assert hash_keys(pa.array(["K\u00e4fer/1.jpg"])) == hash_keys(pa.array(["Ka\u0308fer/1.jpg"]))
    assert hash_keys(pa.array(["Kafer/1.jpg"])) != hash_keys(pa.array(["Ka\u0308fer/1.jpg"]))


def test_cells_on_added_borders_take_those_of_the_image():
    values = np.arange(2 * 4 * 3).reshape(1, 2, 4, 3)
    spread = spread_to_borders(values, [(0.0, -0.5, 1.0, 1.5)])  # the middle two of four rows show the image
    assert np.array_equal(spread[0, :, 0], values[0, :, 1])
    assert np.array_equal(spread[0, :, 1:3], values[0, :, 1:3])
    assert np.array_equal(spread[0, :, 3], values[0, :, 2])
    assert np.array_equal(spread_to_borders(values, [(0.1, 0.2, 0.9, 0.8)]), values)
