"""Training samples from streams, with label maps joined by key."""

import itertools

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch

from modeling_lvvit.annotators.pipeline import spread_to_borders
from modeling_lvvit.data.image_keys import find_keys, hash_keys
from modeling_lvvit.data.images import SampleError
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
    loader = torch.utils.data.DataLoader(stream_of(numbers, None), batch_size=2, num_workers=2)
    heights = torch.cat([batch["height"] for batch in itertools.islice(loader, 4)])
    assert sorted(heights.tolist()) == [4 + number for number in numbers]


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
