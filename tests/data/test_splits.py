"""Subsets and held-out rows."""

from itertools import pairwise

import datasets
import numpy as np
import pytest

from modeling_lvvit.data.splits import find_eval_split, hold_out, select_subset, take_subset


SORTED = np.repeat([0, 1, 2], [50, 40, 10])


@pytest.mark.parametrize(
    ("count", "expected"), [(3, [1, 1, 1]), (10, [5, 4, 1]), (30, [15, 12, 3]), (100, [50, 40, 10])]
)
def test_a_subset_has_its_share_of_every_class(count, expected):
    rows = select_subset(100, count, SORTED)
    assert np.all(np.diff(rows) > 0)
    assert np.abs(np.bincount(SORTED[rows], minlength=3) - expected).max() <= 1
    assert len(rows) == count


def test_subsets_are_nested_the_same_everywhere_and_drawn(tmp_path):
    subsets = [set(select_subset(100, count, SORTED).tolist()) for count in range(0, 101, 10)]
    assert all(small < large for small, large in pairwise(subsets))
    assert subsets[1] != set(range(10))
    names = np.array(["bird", "cat", "dog"])[SORTED].tolist()
    by_name = datasets.Dataset.from_dict({"row": range(100), "label": names})
    assert set(take_subset(by_name, 20, "label")["row"][:]) == subsets[2]  # names as well as ids
    assert len(take_subset(by_name, 20)) == 20  # without classes
    assert take_subset(by_name, None, "label") is by_name
    assert len(take_subset(by_name, 0, "label")) == 0
    assert len(take_subset(by_name, 1000, "label")) == 100


def test_each_class_is_in_a_subset_that_is_large_enough():
    classes = np.repeat(np.arange(20), [1000, *[1] * 19])
    assert len(np.unique(classes[select_subset(len(classes), 20, classes)])) == 20


@pytest.mark.parametrize("seed", range(5))
def test_no_class_is_held_out_wholly(seed):
    classes = np.repeat(np.arange(12), [100, *[1] * 6, *[2] * 5])
    train, held_out, _ = hold_out(len(classes), 0.4, seed, "data", "train", classes)
    assert sorted([*train, *held_out]) == list(range(len(classes)))
    assert set(classes[train]) == set(range(12))
    plain = hold_out(len(classes), 0.4, seed, "data", "train")[1]
    assert len(held_out) == len(plain)
    assert len(set(held_out) & set(plain)) >= len(plain) - 11  # only single rows of the 11 small classes are exchanged
    assert np.array_equal(
        hold_out(len(SORTED), 0.4, seed, "data", "train", SORTED)[1], hold_out(100, 0.4, seed, "", "")[1]
    )
    hidden = hold_out(4, 0.5, seed, "data", "train", np.array([-1, 0, -1, 0]))  # are refused later, by their rows
    assert sorted([*hidden[0], *hidden[1]]) == [0, 1, 2, 3]
    singles = hold_out(4, 0.5, seed, "data", "train", np.arange(4))
    assert len(singles[0]) == len(singles[1]) == 2


@pytest.mark.parametrize("label", [None, -1])
def test_splits_with_hidden_labels_are_not_evaluated_on(label, caplog):
    hidden = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    splits = {name: datasets.Dataset.from_dict({"label": [0, 1]}, features=hidden) for name in ("train", "test")}
    splits["validation"] = datasets.Dataset.from_dict({"label": [label, label]}, features=hidden)
    assert find_eval_split(splits, "data", "train", None, "label") == "test"
    assert "Split validation of data has no labels" in caplog.text
    assert find_eval_split(splits, "data", "train", "validation", "label") == "validation"  # as was asked for
