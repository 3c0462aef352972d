"""Labels that are lists: which columns are understood, and what is refused."""

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.data.classes.class_labels import names_in_data, with_class_ids
from modeling_lvvit.data.classes.multi_label import (
    class_names,
    describe_labels,
    label_counts,
    labelled,
    multi_hot,
    with_labels,
)
from modeling_lvvit.data.sources import open_splits
from modeling_lvvit.data.splits import classes_of_rows, draw_subset, hold_out


NAMED = [["cat", "dog"], [], ["dog"], ["eel", "dog"]]


def rows_of(labels: list, feature=None, **columns: list) -> datasets.Dataset:
    table = {"image": list(range(len(labels))), "label": labels, **columns}
    features = None
    if feature is not None:
        features = datasets.Features({"image": datasets.Value("int64"), "label": feature})
    return datasets.Dataset.from_dict(table, features=features)


def lists_of(rows: datasets.Dataset) -> list[list[str]]:
    names = class_names(rows, "label")
    return [[names[index] for index in ids] for ids in rows["label"]]


@pytest.fixture
def train() -> datasets.Dataset:
    return with_labels(rows_of(NAMED), "zoo", "label")


def test_names_ids_and_class_labels_become_lists_of_ids(train):
    assert train.features["label"] == datasets.List(datasets.ClassLabel(names=["cat", "dog", "eel"]))
    assert train["label"][:] == [[0, 1], [], [1], [1, 2]] and label_counts(train, "label").tolist() == [1, 3, 1]
    numbered = with_labels(rows_of([[2, 0], [], [3]]), "zoo", "label")
    assert class_names(numbered, "label") == ["0", "1", "2", "3"] and numbered["label"][:] == [[0, 2], [], [3]]
    feature = datasets.List(datasets.ClassLabel(names=["eel", "cat"]))  # in another order, and without one class
    test = with_labels(rows_of([[0], [], [1, 0]], feature), "zoo", "label", like=train)
    assert lists_of(test) == [["eel"], [], ["cat", "eel"]] and test.features["label"] == train.features["label"]
    hot = multi_hot(train.with_format("arrow")[:]["label"], 3)
    assert hot.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_a_part_of_the_rows_keeps_its_labels(train):
    part = train.select([3, 1]).with_format("arrow")
    assert multi_hot(part[:]["label"], 3).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert multi_hot(part[[0]]["label"], 3).tolist() == [[0, 1, 1]]


def test_text_with_a_separator_and_columns_of_0_and_1():
    texts = labelled(rows_of(["cat; dog", "", None, "eel"]), "zoo", "label", ";", None)
    assert lists_of(with_labels(texts, "zoo", "label")) == [["cat", "dog"], [], [], ["eel"]]
    columns = rows_of([7, 7, 7], cat=[1, 0, 1], dog=[0.0, 0.0, 1.0])
    joined = with_labels(labelled(columns, "zoo", "label", None, ["dog", "cat"]), "zoo", "label")
    assert lists_of(joined) == [["cat"], [], ["dog", "cat"]]
    with pytest.raises(ValueError, match=r"Column 'cat' of zoo.* must hold 0 and 1 .*got 2 in row 1"):
        labelled(rows_of([7, 7], cat=[1, 2], dog=[0, 0]), "zoo", "label", None, ["dog", "cat"])
    with pytest.raises(ValueError, match=r"`label_separator` ';' divides text, and column 'label' of zoo holds int64"):
        labelled(rows_of([7, 7]), "zoo", "label", ";", None)


def test_texts_that_look_like_several_names_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        with_labels(rows_of(["cat;dog", "cat", "dog", "eel"]), "zoo", "label")
        assert "like 'cat;dog' look like several names" in caplog.text
        caplog.clear()
        with_labels(rows_of(["tench, Tinca tinca", "goldfish, Carassius auratus"]), "zoo", "label")
        assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1, 0], [1, 1, 0]], "holds 3 values of 0 and 1 in every list, as if there were one for each class"),
        ([["a", "b"], None], "Row 1 of zoo.* has no label .* has an empty list"),
        ([["a", "b"], ["c", None]], "has an empty value in the list of row 1"),
        ([[0.5], [1.0]], "must hold lists of class names or of class ids, got lists of double"),
        ([[], []], "No image of zoo.* has a class"),
        ([[-1], [2]], "ids from -1 to 2"),
    ],
)
def test_lists_that_are_no_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        with_labels(rows_of(labels), "zoo", "label")


def test_evaluation_that_does_not_fit_is_refused(train):
    with pytest.raises(ValueError, match=r"classes that training lacks: \['fox'\]"):
        with_labels(rows_of([["fox"]]), "zoo", "label", like=train)
    with pytest.raises(ValueError, match="training has several classes of each image, it a single one"):
        with_labels(rows_of(["cat", "dog"]), "zoo", "label", like=train)


def test_programs_for_single_classes_refuse_lists():
    for function in (with_class_ids, names_in_data):
        with pytest.raises(ValueError, match=r"Column 'label' of zoo holds several values of each image .*one class"):
            function(rows_of(NAMED), "zoo", "label")


def test_a_class_named_twice_counts_once(caplog):
    rows = with_labels(rows_of([["cat", "cat"], ["dog"]]), "zoo", "label")
    assert rows["label"][:] == [[0], [1]] and "more than once (1 times)" in caplog.text


def test_description_counts_classes_and_images_without_any(train):
    text = describe_labels(train, "training", "label")
    assert "4 images, multi-label: 1.25 of 3 classes an image (0 to 2), from 1 (cat) to 3 (dog)" in text
    assert "cat 1, dog 3, eel 1; 1 without any class" in text


def test_subsets_and_held_out_rows_go_by_the_rarest_class():
    labels = [["common"] for _ in range(60)] + [["common", "rare"]] * 4 + [["common", "odd", "rare"]] * 2 + [[]] * 4
    rows = with_labels(rows_of(labels), "zoo", "label")  # common 0, odd 1, rare 2
    classes = classes_of_rows(rows, "label")
    assert np.array_equal(classes, [0] * 60 + [2] * 4 + [1] * 2 + [-1] * 4)
    assert np.array_equal(classes_of_rows(rows_of(labels), "label"), classes)  # of names, before they are ids
    assert len(set(classes[draw_subset(rows, 4, "label")])) == 4
    for seed in range(5):
        training, held_out, _ = hold_out(len(rows), 0.5, seed, "zoo", "train", classes)
        assert {-1, 0, 1, 2} <= set(classes[training]) and len(held_out) == 35


def save_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(folder / name)


def test_image_folders_with_lists_in_their_metadata(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    records = [{"file_name": name, "label": labels} for name, labels in zip(names, NAMED)]
    save_images(tmp_path / "jsonl", names)
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    save_images(tmp_path / "parquet", names)
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "parquet" / "metadata.parquet")
    save_images(tmp_path / "csv", names)
    (tmp_path / "csv" / "metadata.csv").write_text("file_name,label\na.png,cat|dog\nb.png,\nc.png,dog\n")
    for kind, separator in (("jsonl", None), ("parquet", None), ("csv", "|")):
        rows = labelled(open_splits(str(tmp_path / kind))["train"], kind, "label", separator, None)
        assert lists_of(with_labels(rows, kind, "label")) == [["cat", "dog"], [], ["dog"]]
