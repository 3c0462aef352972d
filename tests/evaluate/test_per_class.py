"""Scores of each class in the evaluation program."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, recall_score

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.data.images import decode_image
from modeling_lvvit.evaluate.__main__ import main
from modeling_lvvit.evaluate.class_reports import MAX_CLASSES, PerClassReports
from modeling_lvvit.variants import evaluation_image_processor
from support.models import save_tiny_lvvit


NAMES = ["ash", "oak", "yew"]


@pytest.fixture
def data(tmp_path) -> Path:
    """2, 4 and 6 random images of three classes."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(NAMES):
        folder = tmp_path / "trees" / "test" / name
        folder.mkdir(parents=True)
        for number in range(2 * index + 2):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "trees"


def predictions(model: Path, data: Path) -> tuple[list[int], list[int]]:
    network, processor = (
        LVViTForImageClassification.from_pretrained(model).eval(),
        evaluation_image_processor((32, 32), 0.8),
    )
    paths = sorted(data.rglob("*.png"))
    images = [decode_image({"path": str(path), "bytes": None}) for path in paths]
    with torch.no_grad():
        logits = network(**processor(images, return_tensors="pt")).logits
    return [NAMES.index(path.parent.name) for path in paths], logits.argmax(-1).tolist()


def test_program_writes_scores_and_confusions_next_to_the_results(data, tmp_path, capsys):
    model = save_tiny_lvvit(tmp_path / "model", NAMES)
    output = tmp_path / "new" / "results.json"
    main(["--model", str(model), "--dataset", str(data), "--output", str(output)])
    true, predicted = predictions(model, data)
    (found,) = json.loads(output.read_text())["results"][0]["results"].values()
    expected = recall_score(true, predicted, average=None)
    assert found["balanced_accuracy"] == pytest.approx(expected.mean())
    assert found["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    record = json.loads((output.parent / "results_model_trees_class_scores.json").read_text())
    assert [record["classes"][name]["recall"] for name in NAMES] == pytest.approx(expected)
    assert [record["classes"][name]["support"] for name in NAMES] == [2, 4, 6]
    assert (output.parent / "results_model_trees_confusion_matrix.png").is_file()
    text = capsys.readouterr().out
    assert "model on 12 images of trees (test): balanced accuracy" in text and "| ash |" in text


def test_without_an_output_nothing_is_written(data, tmp_path, capsys):
    model = save_tiny_lvvit(tmp_path / "model", NAMES)
    before = sorted(tmp_path.rglob("*"))
    main(["--model", str(model), "--dataset", str(data)])
    assert "--output_file FILE.json writes the confusion matrix" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_more_classes_than_can_be_counted_are_named():
    reports = PerClassReports(None)
    assert reports.matrix_for(["x"] * (MAX_CLASSES + 1)) is None
    assert reports.texts == ["no scores of each class: 3,001 classes are more than 3,000"]
