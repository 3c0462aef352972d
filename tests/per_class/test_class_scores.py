"""Scores of each class, and what is written of them."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support
from transformers import EvalPrediction

from modeling_lvvit.per_class.report import (
    class_table,
    describe_classes,
    figure_classes,
    short_names,
    write_class_report,
)
from modeling_lvvit.per_class.scores import ComputeClassMetrics, ConfusionMatrix, Confusions


def example() -> Confusions:
    """3 images of class 0, of which 1 is taken for class 1, and 1 of class 1; none of class 2."""
    return Confusions.from_classes([0, 0, 0, 1], [0, 1, 0, 1], 3)


def test_scores_by_hand():
    scores = example().scores()
    assert scores["precision"][:2].tolist() == [1.0, 0.5] and scores["recall"][:2].tolist() == [2 / 3, 1.0]
    assert scores["f1"][:2].tolist() == pytest.approx([0.8, 2 / 3]) and scores["support"].tolist() == [3, 1, 0]
    assert all(np.isnan(scores[name][2]) for name in ("precision", "recall", "f1"))
    assert example().averages() == pytest.approx(
        {"balanced_accuracy": 5 / 6, "macro_precision": 0.75, "macro_f1": 11 / 15}
    )
    assert example().matrix([1, 0]).tolist() == [[1, 0], [1, 2]] and example().mistakes() == [(0, 1, 1)]


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 6, 200), rng.integers(0, 9, 200)  # classes 6 to 8 are never true
    confusions = Confusions.from_classes(true, predicted, 9)
    expected = precision_recall_fscore_support(true, predicted, labels=range(6), zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "support"), expected):
        assert confusions.scores()[name][:6] == pytest.approx(values)
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score(true, predicted)
    assert confusions.averages()["balanced_accuracy"] == pytest.approx(expected)
    metric = ConfusionMatrix(9)
    for part in np.split(np.arange(200), 4):
        metric.add_batch(predictions=predicted[part], references=true[part])
    assert metric.compute()["confusions"].matrix(range(9)).tolist() == confusions.matrix(range(9)).tolist()


def test_evaluations_of_the_trainer_have_averages():
    compute = ComputeClassMetrics(3)
    ranked = np.array([[0, 1, 2], [1, 0, 2], [0, 2, 1], [1, 2, 0]])
    metrics = compute(EvalPrediction(ranked, np.array([0, 0, 0, 1])))
    assert metrics["accuracy"] == 0.75 and metrics["balanced_accuracy"] == pytest.approx(5 / 6)
    assert compute.confusions.mistakes() == [(0, 1, 1)]
    nothing = Confusions.from_classes([], [], 3)
    assert np.isnan(nothing.averages()["macro_f1"])


def test_few_classes_are_tabled_and_of_many_the_worst():
    names = ["cat", "dog", "owl"]
    table = class_table(names, example())
    assert "| cat | 100.0 | 66.7 | 80.0 | 3 |" in table and "| owl | - | - | - | 0 |" in table
    assert "most frequent mistake: cat taken for dog, 1 times" in describe_classes(names, example())
    many = Confusions.from_classes(np.arange(40), np.r_[np.arange(39), 0], 40)
    text = describe_classes([f"class {index}" for index in range(40)], many)
    assert class_table([str(index) for index in range(40)], many) is None
    assert "of 40 classes those of the lowest F1" in text
    assert text.index("| class 39 | 0.0") < text.index("| class 0 | 50.0") and text.count("| class") == 6


def test_a_figure_of_many_classes_shows_the_confused_ones():
    true = np.r_[np.arange(1000), [700] * 5, [3] * 4]
    predicted = np.r_[np.arange(1000), [800] * 5, [999] * 4]
    shown = figure_classes(Confusions.from_classes(true, predicted, 1000))
    assert len(shown) == 25 and {700, 800, 3, 999} <= set(shown)
    assert figure_classes(example()) == [0, 1, 2]


@pytest.mark.parametrize("num_classes", [2, 26])
def test_files_hold_what_was_confused(num_classes, tmp_path):
    confusions = Confusions.from_classes([0, 0, 1], [0, 1, 1], num_classes)
    names = [f"kind {index}" for index in range(num_classes)]
    text = write_class_report(tmp_path, names, confusions, "3 images of test")
    record = json.loads((tmp_path / "class_scores.json").read_text())
    assert record["classes"]["kind 0"] == {
        "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2, "predicted_as": {"kind 0": 1, "kind 1": 1}
    }  # fmt: skip
    assert record["balanced_accuracy"] == 0.75 and record["evaluated"] == "3 images of test"
    assert num_classes == 2 or record["classes"]["kind 7"]["recall"] is None
    assert min(Image.open(tmp_path / "confusion_matrix.png").size) > 300
    assert str(tmp_path / "confusion_matrix.png") in text and str(tmp_path / "class_scores.json") in text


def test_names_are_shown_as_people_read_them():
    names = short_names(["n01440764", "fox, red", "bat, animal", "bat, club", "a" * 40])
    assert names[:4] == ["tench", "fox", "bat, animal", "bat, club"]
    assert len(names[4]) == 24
