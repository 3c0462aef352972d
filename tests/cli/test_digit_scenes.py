"""The embedded data: reproducible, disjoint, and labelled by what is there."""

import datasets
import numpy as np
import pytest
import torch

from modeling_lvvit.cli import digit_scenes


def test_digits_of_the_splits_are_disjoint_and_complete():
    parts = digit_scenes.split_digits(seed=0)
    train, test = (set(map(bytes, images)) for images, _ in parts.values())
    assert not train & test
    assert sum(len(labels) for _, labels in parts.values()) == 1797
    assert set(parts["test"][1]) == set(range(10))


def test_scenes_follow_from_the_seed():
    first, again, other = (digit_scenes.draw_split("test", 3, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_the_label_is_the_largest_digit_of_the_mask():
    images, masks, labels = digit_scenes.draw_split("train", 40, seed=0)
    assert images.shape == (40, 64, 64, 3)
    for mask, label in zip(masks, labels):
        counts = np.bincount(mask[mask < 10], minlength=10)
        assert counts[label] >= 0.25 * counts.sum()
        assert (mask == 10).mean() > 0.3


def test_annotator_gives_one_score_per_cell():
    scores = digit_scenes.DigitAnnotator()(torch.zeros(2, 3, 64, 64))
    assert scores.shape == (2, 10, 16, 16)


@pytest.mark.slow
def test_small_set_is_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_scenes, "SPLITS", {"train": 128, "test": 16})
    digit_scenes.build(tmp_path / "scenes", annotator_epochs=1)
    splits = datasets.load_dataset(str(tmp_path / "scenes"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 128, "test": 16}
    row = splits["train"][5]
    assert row["image"].size == row["mask"].size == (64, 64)
    assert np.array(row["token_label_ids"]).shape == (5, 16, 16)
    with pytest.raises(FileExistsError, match="exists"):
        digit_scenes.build(tmp_path / "scenes")
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
