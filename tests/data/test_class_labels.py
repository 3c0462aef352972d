"""Class ids of evaluation rows are those of training, whatever numbers their own `ClassLabel` gives them."""

import logging

import datasets
import pytest

from modeling_lvvit.data.classes.class_labels import with_class_ids


def rows_of(names: list[str], labels: list[int], split: str) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    content = {"image": [f"{number}.jpg" for number in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(content, features=features, split=datasets.Split(split))


TRAIN = rows_of(["bird", "cat", "dog"], [0, 1, 2], "train")


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["dog", "cat", "bird"], [0, 1, 2, -1], [2, 1, 0, -1]),
        (["dog", "cat"], [1, 0, 1], [1, 2, 1]),
        (["eel", "Dog", "Bird", "cat"], [3, 2, 1], [1, 0, 2]),  # no image of an eel
        (["bird", "cat", "dog"], [2, 0, 1], [2, 0, 1]),
        (["0", "1", "2"], [2, 0, 1], [2, 0, 1]),  # numbers count the classes of training
    ],
)
def test_evaluation_classes_are_paired_by_name(names, labels, expected, caplog):
    logging.getLogger("modeling_lvvit.data.classes.class_labels").addHandler(caplog.handler)
    rows = with_class_ids(rows_of(names, labels, "test"), "zoo", "label", like=TRAIN)
    assert rows["label"][:] == expected
    assert rows["image"][:] == [f"{number}.jpg" for number in range(len(labels))]
    assert rows.features["label"] == TRAIN.features["label"]
    is_other_order = labels != expected
    assert ("Split test of zoo counts its classes in another order" in caplog.text) == is_other_order


def test_classes_that_training_lacks_are_named():
    with pytest.raises(ValueError, match=r"Split test of zoo has classes that training lacks: \['eel'\]"):
        with_class_ids(rows_of(["eel", "dog"], [1, 0], "test"), "zoo", "label", like=TRAIN)
