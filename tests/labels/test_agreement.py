"""How often label maps agree with the human labels of their images, and what is said of it."""

import datasets
import numpy as np
import pytest

from modeling_lvvit.labels.checks.agreement import Agreement, compare, compare_with_labels
from modeling_lvvit.labels.label_crops import top_classes
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.labels.reader import LabelMapReader
from support.label_sets import layout_of, random_maps, table_of, write_label_set


NAMES = ["ant", "bee", "cat"]


def test_agreement_is_a_share_of_the_maps():
    classes = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    agreement = Agreement(np.array([0, 1, 2, 0, 1, 2, 1, 0]), classes, named=0.875)
    assert agreement.lines(NAMES) == ["75.0 % of maps have the human label as their first class, 87.5 % name it"]


def test_rare_agreement_and_a_preferred_class_are_warned_of():
    classes, first = np.repeat([0, 1, 2], [20, 20, 60]), np.repeat([1, 2], [80, 20])
    share, rare, preferred = Agreement(first, classes).lines(NAMES, "100 maps")
    assert share == "40.0 % of 100 maps have the human label as their first class"
    assert rare.startswith("WARNING: most maps have another first class")
    assert "bee is the first class of 80 % of the maps, and the label of 20 % of the images, 4.0 times" in preferred


def test_crops_that_an_annotator_sees_otherwise_get_advice():
    *_, preferred = Agreement(np.repeat(1, 9), np.arange(9) % 3, are_crops=True).lines(NAMES, "9 crops")
    assert "bee is the first class of 100 % of the crops" in preferred and "labels of whole images" in preferred
    assert len(Agreement(np.arange(9) % 3, np.arange(9) % 3, are_crops=True).lines(NAMES, "9 crops")) == 1


def test_a_class_preferred_by_chance_is_not_warned_of():
    assert Agreement(np.array([0, 0, 2, 1, 2]), np.array([0, 1, 2, 1, 2])).warnings(NAMES) == []


def test_names_of_wordnet_ids_are_written_out():
    assert Agreement(np.zeros(9, int), np.ones(9, int)).warnings(["n02123045", "n01440764"])[1].startswith("tabby is")


@pytest.mark.parametrize(("k", "says"), [(2, "name it"), (7, "first class")])
def test_sets_of_all_classes_say_nothing_of_naming(k, says, tmp_path):
    maps = random_maps(6, shape=(k, 3, 3))
    layout = layout_of(maps)
    folder = write_label_set(tmp_path / "set", table_of(maps, layout), layout)
    reader = LabelMapReader(LabelSet.open(str(folder), "train").rows)
    agreement = compare(reader, top_classes(reader.fetch(range(6)), 7))
    assert agreement.share == 1 and agreement.summary().endswith(says)


def test_maps_are_compared_with_the_labels_of_their_images(tmp_path):
    maps = random_maps(10)
    layout = layout_of(maps)
    is_empty = [False] * 8 + [True, False]
    folder = write_label_set(tmp_path / "set", table_of(maps, layout, is_empty=is_empty), layout)
    with_map = [*range(8), 9]
    labels = np.zeros(10, dtype=int)
    labels[with_map] = top_classes(LabelMapReader(LabelSet.open(str(folder), "train").rows).fetch(with_map), 7)
    labels[:3] = (labels[:3] + 1) % 7
    feature = datasets.Features({"label": datasets.ClassLabel(names=list(layout.class_names))})
    rows = datasets.Dataset.from_dict({"label": labels}, features=feature)
    assert compare_with_labels(folder, rows, "data", "train", "label")[0].startswith("66.7 % of 9 maps")
    assert compare_with_labels(folder, rows, "data", "train", "no such column") == []
    some = datasets.Dataset.from_dict({"label": [*labels[:8], None, None]}, features=feature)
    assert compare_with_labels(folder, some, "data", "train", "label")[0].startswith("62.5 % of 8 maps")
    texts = [*(layout.class_names[index] for index in labels[:8]), None, ""]
    some = datasets.Dataset.from_dict({"image": ["x.jpg"] * 10, "label": texts})
    assert compare_with_labels(folder, some, "data", "train", "label")[0].startswith("62.5 % of 8 maps")
    names = datasets.Dataset.from_dict({"label": ["elsewhere"] * 10})
    assert "not compared" in compare_with_labels(folder, names, "data", "train", "label")[0]
