"""Weights of classes in the loss: words, numbers and files, and their scale."""

import json

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from modeling_lvvit.per_class.weights import (
    balanced_weights,
    check_class_weights,
    given_class_weights,
    note_uneven_classes,
    training_weights,
)
from modeling_lvvit.token_labeling import TokenLabelTrainingArguments
from support.trainers import trainer_for


NAMES = ["red fox", "gray wolf", "lynx"]
COUNTS = np.array([60, 30, 10])


def test_balanced_weights_are_those_of_scikit_learn_and_have_a_mean_of_one():
    labels = np.repeat([0, 1, 2], COUNTS)
    weights = balanced_weights(COUNTS)
    assert weights == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    assert weights[labels].mean() == pytest.approx(1.0)
    assert balanced_weights([900, 0, 100]).tolist() == pytest.approx([1000 / 1800, 1.0, 5.0])


def test_given_weights_are_scaled_to_a_mean_of_one():
    """0.6 * 1 + 0.3 * 2 + 0.1 * 3 = 1.5."""
    weights = training_weights(["1", "2", "3"], NAMES, COUNTS)
    assert weights.tolist() == pytest.approx([1 / 1.5, 2 / 1.5, 2.0])
    assert training_weights(["1", "2", "3"], NAMES, None).tolist() == [1.0, 2.0, 3.0]  # of a stream
    one, other = (training_weights([word], NAMES, COUNTS).tolist() for word in ("balanced", "median_frequency"))
    assert one == other


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps({"lynx": 3, "Red-Fox": 1, "gray_wolf": 2.5})),
        ("a.csv", "\ufeffclass,weight\nlynx,3\nred fox, 1\ngray wolf,2.5\n"),
        ("b.csv", "gray wolf,2.5\nlynx,3\nred fox,1e0\n"),
    ],
)
def test_files_name_classes(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert given_class_weights([str(tmp_path / name)], NAMES) == [1.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"red fix": 1, "gray wolf": 1, "lynx": 1}',
            "'red fix' is none of the 3 classes; the nearest are: 'red fox'",
        ),
        ('{"red fox": 1, "gray wolf": 1}', "weights of 2 of 3 classes; it lacks: 'lynx'"),
        ('{"red fox": 1, "Red Fox": 2, "gray wolf": 1, "lynx": 1}', "has 'red fox' twice"),
        ('{"red fox": "many", "gray wolf": 1, "lynx": 1}', "must be a number of at least 0, got 'many'"),
        ('{"red fox": -1, "gray wolf": 1, "lynx": 1}', "must be a number of at least 0, got -1"),
        ('{"red fox": 0, "gray wolf": 0, "lynx": 0}', "all weights are 0"),
        ("[1, 2, 3]", "must be a JSON object"),
        ("{", "must be a JSON object"),
    ],
)
def test_files_that_do_not_fit_are_refused(text, message, tmp_path):
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        given_class_weights([str(tmp_path / "weights.json")], NAMES)


def test_other_words_are_refused():
    for words, message in ((["fair"], "no such file"), (["1", "x"], "number for each"), (["0", "0"], "at least 0")):
        with pytest.raises(ValueError, match=message):
            check_class_weights(words)
    with pytest.raises(ValueError, match="has 2 numbers; the data has 3 classes"):
        given_class_weights(["1", "2"], NAMES)
    with pytest.raises(ValueError, match="which a stream does not"):
        training_weights(["balanced"], NAMES, None)
    with pytest.raises(ValueError, match="`class_weights` must be"):
        TokenLabelTrainingArguments("unused", report_to="none", class_weights="fair")


def test_imbalance_is_said_from_five_times_on():
    text = note_uneven_classes(np.array([900, 0, 100]), NAMES)
    assert "red fox has 9 times the training images of lynx" in text
    assert "--class_weights balanced" in text and "--train_sampling_strategy balanced" in text
    assert note_uneven_classes(np.array([49, 30, 10]), NAMES) is None
    assert note_uneven_classes(np.array([49, 0, 0]), NAMES) is None


def test_the_trainer_weighs_by_its_training_images(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, class_weights=["balanced"])
    weights, labels = trainer.objective.class_weights.numpy(), np.array(labelled_rows["label"])
    assert weights[labels].mean() == pytest.approx(1.0)
    present, counts = np.unique(labels, return_counts=True)
    assert (weights[present] * counts).tolist() == pytest.approx([12 / len(present)] * len(present))
    assert trainer_for(tiny_model, labelled_rows, tmp_path).objective.class_weights is None
