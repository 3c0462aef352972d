"""Probabilities of images as a CSV file: any folder, thresholds, damaged images."""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.evaluate.predict import main
from modeling_lvvit.evaluate.prediction_table import Decision
from support.models import save_tiny_lvvit


NAMES = ["carp", "eel", "tench, Tinca tinca"]
PATHS = ["b.png", "train/cat/a.png", "train/x/y/c.png", "val.png"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_lvvit(tmp_path_factory.mktemp("models") / "tiny", NAMES)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Images at all depths, in folders that would be splits and classes elsewhere, next to a file that is none."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    for path in PATHS:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / path)
    (folder / "notes.txt").write_text("of a walk")
    return folder


@pytest.fixture
def predict(tmp_path, capsys):
    """Runs the program: rows of its table, or the message with which it ends."""

    def run(*words: object) -> list[dict[str, str]] | str:
        output = tmp_path / "table.csv"
        try:
            main([*map(str, words), "--output_file", str(output)])
        except SystemExit as end:
            assert not output.exists()
            return str(end.code)
        with output.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    return run


def with_several_classes(model: Path, folder: Path) -> Path:
    classifier = LVViTForImageClassification.from_pretrained(model)
    classifier.config.problem_type = "multi_label_classification"
    classifier.classifier.bias.data = torch.tensor([3.0, 2.0, -3.0])
    classifier.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_bytes((model / "preprocessor_config.json").read_bytes())
    return folder


def test_every_image_of_a_folder_has_a_row(model, photos, predict, capsys):
    rows = predict(model, photos, "--batch_size", "3")
    assert [row["path"] for row in rows] == [str(photos / path) for path in PATHS]
    assert list(rows[0]) == ["path", "predicted_class", "probability", *NAMES]
    classify = pipeline("image-classification", model=str(model))
    for row in rows:
        expected = {result["label"]: result["score"] for result in classify(row["path"])}
        assert {name: float(row[name]) for name in NAMES} == pytest.approx(expected, abs=1e-5)
        assert row["predicted_class"] == max(expected, key=expected.get)
        assert row["probability"] == row[row["predicted_class"]]
    printed = capsys.readouterr().out
    assert "4 images of" in printed and "saved" in printed


def test_one_image_and_the_best_classes(model, photos, predict):
    (row,) = predict(model, photos / "val.png", "--top_k", 2)
    assert list(row)[3:] == ["class_1", "probability_1", "class_2", "probability_2"]
    assert row["class_1"] == row["predicted_class"] and float(row["probability_1"]) >= float(row["probability_2"])


def test_rows_of_a_parquet_file_without_labels(model, photos, predict, tmp_path):
    files = [
        {"image": {"bytes": (photos / path).read_bytes(), "path": name}}
        for path, name in ((PATHS[3], "1.png"), (PATHS[0], None))
    ]
    datasets.Dataset.from_list(files, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "d.parquet"
    )
    rows, of_files = predict(model, tmp_path / "d.parquet"), predict(model, photos)
    assert [row["path"] for row in rows] == ["1.png", "row 1"]
    assert [row["eel"] for row in rows] == [of_files[3]["eel"], of_files[0]["eel"]]


def test_damaged_images_are_named_before_the_work_or_in_their_rows(model, photos, predict):
    (photos / PATHS[1]).write_bytes((photos / PATHS[1]).read_bytes()[:600])
    (photos / PATHS[2]).write_text("no image")
    message = predict(model, photos)
    assert "train/cat/a.png): the image cannot be decoded" in message and "train/x/y/c.png" in message
    assert "--on_error empty gives such images a row" in message
    rows = predict(model, photos, "--on_error", "empty", "--dataloader_num_workers", 1)
    assert [row["predicted_class"] == "" for row in rows] == [False, True, True, False]
    assert [row["error"][:27] for row in rows] == ["", *["the image cannot be decoded"] * 2, ""]
    assert rows[1]["eel"] == rows[1]["probability"] == ""


def test_several_classes_have_probabilities_of_their_own(model, photos, predict, tmp_path, capsys):
    several = with_several_classes(model, tmp_path / "several")
    rows = predict(several, photos)
    classify = pipeline("image-classification", model=str(several))
    for row in rows:
        assert row["predicted_class"] == "carp;eel"  # the bias decides
        expected = {result["label"]: result["score"] for result in classify(row["path"])}
        assert {name: float(row[name]) for name in NAMES} == pytest.approx(expected, abs=1e-5)
    assert "of no image, at the threshold 0.5: tench, Tinca tinca" in capsys.readouterr().out
    assert {row["predicted_class"] for row in predict(several, photos, "--threshold", "0.999")} == {""}
    assert "4 of 4 images have no class with a probability of 0.999 or more" in capsys.readouterr().out


def test_threshold_of_two_classes_comes_from_a_file(photos, predict, tmp_path):
    model = save_tiny_lvvit(tmp_path / "two", ["carp", "eel"])
    carps = [float(row["carp"]) for row in predict(model, photos)]
    file, threshold = tmp_path / "roc.json", sorted(carps)[2]
    file.write_text(json.dumps({"positive_class": "carp", "threshold": threshold - 1e-6}))
    rows = predict(model, photos, "--threshold", file)
    assert [row["predicted_class"] for row in rows] == ["carp" if value >= threshold else "eel" for value in carps]
    assert all(row["probability"] == row[row["predicted_class"]] for row in rows)


def test_decisions_by_hand():
    two = torch.tensor([[0.7, 0.3], [0.8, 0.2]])
    assert Decision(["a", "b"]).classes(two) == [[0], [0]]
    assert Decision(["a", "b"], threshold=0.3, positive=1).classes(two) == [[1], [0]]
    assert Decision(["a", "b"], threshold=0.75, positive=0).classes(two) == [[1], [0]]
    three = torch.tensor([[0.5, 0.2, 0.3], [0.3, 0.3, 0.4]])
    assert Decision(["a", "b", "c"], threshold=0.45).classes(three) == [[0], []]
    several = torch.tensor([[0.6, 0.1, 0.9], [0.2, 0.5, 0.1]])
    assert Decision(["a", "b", "c"], True, 0.5).classes(several) == [[2, 0], [1]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", "1.5"], "--threshold must lie in [0, 1], got 1.5"),
        (["--threshold", "gone.json"], "there is no file gone.json"),
        (["--threshold", "0.5", "--positive_class", "eel"], "--positive_class is one of two classes, and there are 3"),
        (["--positive_class", "eel"], "--positive_class says what --threshold is about: give both"),
        (["--top_k", "4"], "--top_k 4 is more than the 3 classes"),
        (["--eval_split", "test"], "all of which are taken: leave out --eval_split"),
    ],
)
def test_what_does_not_fit_is_refused(model, photos, predict, words, message):
    assert message in predict(model, photos, *words)
