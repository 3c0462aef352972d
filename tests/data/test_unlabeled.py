"""Images without human labels: opened, added behind labeled rows, chosen by their label maps."""

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.data.classes.class_labels import class_ids, describe_classes, with_class_ids
from modeling_lvvit.data.classes.unlabeled import add_unlabeled, select_confident
from modeling_lvvit.data.image_keys import read_keys
from modeling_lvvit.data.sources import open_splits
from modeling_lvvit.data.splits import hold_out


def write_images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    return folder


def rows_of(labels):
    return datasets.Dataset.from_dict({"image": [f"{row}.jpg" for row in range(len(labels))], "label": labels})


@pytest.mark.parametrize(
    ("labels", "names", "ids"),
    [
        (["dog", None, "cat", "", " "], ["cat", "dog"], [1, -1, 0, -1, -1]),
        ([2, -1, 0, None], ["0", "1", "2"], [2, -1, 0, -1]),
    ],
)
def test_rows_without_a_label_get_the_class_minus_one_where_they_may(labels, names, ids):
    rows = with_class_ids(rows_of(labels), "zoo", "label", may_be_missing=True)
    assert rows["label"][:] == ids
    assert rows.features["label"].names == names
    missing = sum(index < 0 for index in ids)
    assert f"{missing} images without label" in describe_classes(rows, "training", "label")
    with pytest.raises(
        ValueError, match=r"has no label in column 'label', like \d of \d rows.*`token_labels`|count from 0"
    ):
        with_class_ids(rows_of(labels), "zoo", "label")


def test_missing_values_of_a_class_label_column_become_minus_one_too():
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": ["1", "2", "3"], "label": [1, None, -1]}, features=features)
    assert with_class_ids(rows, "zoo", "label", may_be_missing=True)["label"][:] == [1, -1, -1]


def test_a_folder_is_added_whole_behind_the_labeled_rows(tmp_path):
    labeled = write_images(tmp_path / "labeled", "cat/1.jpg", "dog/2.jpg")
    more = write_images(tmp_path / "more", "b/3.png", "4.jpg", "a/deep/5.jpeg")
    rows = add_unlabeled(open_splits(str(labeled))["train"], str(more), "image", "label")
    rows = with_class_ids(rows, "zoo", "label", may_be_missing=True)
    assert class_ids(rows, "label").tolist() == [0, 1, -1, -1, -1]
    assert read_keys(rows, "image").to_pylist() == ["cat/1.jpg", "dog/2.jpg", "more/4.jpg", "deep/5.jpeg", "b/3.png"]
    assert rows[4]["image"].size == (8, 6)


def test_columns_of_keys_are_kept_and_labels_of_the_added_data_are_not(tmp_path):
    image = datasets.Image()
    features = datasets.Features(
        {"photo": image, "species": datasets.Value("string"), "name": datasets.Value("string")}
    )
    pixels = Image.new("RGB", (4, 4))
    labeled = datasets.Dataset.from_dict({"photo": [pixels], "species": ["eel"], "name": ["a"]}, features=features)
    more = datasets.Dataset.from_dict({"photo": [pixels], "species": ["fox"], "name": ["b"]}, features=features)
    more.to_parquet(tmp_path / "train.parquet")
    rows = add_unlabeled(labeled, str(tmp_path), "photo", "species", other_columns=["name"])
    assert rows["species"][:] == ["eel", None]
    assert rows["name"][:] == ["a", "b"]


def test_only_labeled_rows_are_held_out_for_evaluation():
    classes = np.array([-1] * 50 + [0, 1] * 10)
    training, held_out, name = hold_out(70, 0.2, 0, "zoo", "train", classes, classes < 0)
    assert sorted([*training, *held_out]) == list(range(70))
    assert len(held_out) == 4  # a fifth of the 20 labeled ones
    assert (classes[held_out] >= 0).all()
    assert name == "20 % of train, held out"
    _, held_out, _ = hold_out(70, 0.2, 0, "zoo", "train", np.full(70, -1), np.ones(70, bool))
    assert len(held_out) == 14


def test_unlabeled_rows_are_chosen_by_confidence_and_number():
    is_unlabeled = np.array([False, True, True, True, True, True, False])
    classes = np.array([0, 1, 1, 1, 0, 0, 1])
    confidence = np.array([0.1, 0.6, 0.9, 0.8, 0.3, 0.7, 0.2])
    select = lambda *limits: select_confident(is_unlabeled, classes, confidence, *limits).tolist()  # noqa: E731
    assert select() == [0, 1, 2, 3, 4, 5, 6]
    assert select(0.65) == [0, 2, 3, 5, 6]
    assert select(0.0, 1) == [0, 2, 5, 6]
    assert select(0.0, 2) == [0, 2, 3, 4, 5, 6]
    assert select(0.95, 2) == [0, 6]
