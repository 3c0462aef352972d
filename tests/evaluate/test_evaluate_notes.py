"""What a table of accuracies does not show is said: measures that are missing, parts of sets, incomplete corruptions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.evaluate.__main__ import main
from modeling_lvvit.evaluate.report import markdown_table
from modeling_lvvit.evaluate.scores import ALEXNET_ERRORS
from modeling_lvvit.evaluate.test_sets import corruption_folders
from modeling_lvvit.training.checkpoints.record import data_record
from support.models import save_tiny_lvvit


NAMES = [f"class {letter}" for letter in "abcdefgh"]
CORRUPTIONS = list(ALEXNET_ERRORS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny LV-ViT of eight classes with random weights."""
    return save_tiny_lvvit(tmp_path_factory.mktemp("models") / "lvvit", NAMES)


def fill(folder: Path, names: list[str], count: int = 1) -> Path:
    """Class folders with gray images of 8 x 8 pixels."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(folder / name / f"{index}.png")
    return folder


def fill_corruptions(folder: Path, names: list[str]) -> Path:
    for name in names:
        for severity in "12345":
            fill(folder / name / severity, NAMES[:2])
    return folder


def evaluated(model: Path, folder: Path, *options) -> dict:
    main(["--model", str(model), *map(str, options), "--output", str(folder / "results.json")])
    return json.loads((folder / "results.json").read_text())["results"][0]


def test_missing_corruptions_are_named_before_and_below(model, tmp_path, capsys):
    folder = fill_corruptions(tmp_path / "c", CORRUPTIONS[:2])
    record = evaluated(model, tmp_path, "--corruptions", folder)
    note = f"no mean corruption error (mCE): 13 of 15 are missing, {', '.join(CORRUPTIONS[2:])}"
    assert record["corruptions"]["notes"] == [note] and "mce" not in record["corruptions"]
    printed = capsys.readouterr()
    assert f"c: {note}" in printed.err and f"- corruptions: {note}" in printed.out


def test_sets_of_other_sizes_are_named(model, tmp_path):
    folder = fill_corruptions(tmp_path / "c", CORRUPTIONS[:1])
    fill(folder / CORRUPTIONS[0] / "3", NAMES[:1], 2)
    notes = evaluated(model, tmp_path, "--corruptions", folder)["corruptions"]["notes"]
    assert notes[1:] == [f"1 of 5 sets have not 2 images as the others: {CORRUPTIONS[0]}/3 3"]


def test_a_whole_set_of_corruptions_needs_no_words(tmp_path):
    folder = fill_corruptions(tmp_path, CORRUPTIONS)
    assert list(corruption_folders(folder)) == sorted(CORRUPTIONS)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("fog/1", "fog has the severities 2, 3, 4, 5; expected 1, 2, 3, 4, 5: complete it"),
        ("fog/4", "fog has the severities 1, 2, 3, 5; expected"),
        ("fog/3/class b", "1 of 75 folders of corruptions lack classes .*fog/3 has 1 of 2 and lacks class b"),
    ],
)
def test_incomplete_corruptions_are_named_before_any_work(missing, message, tmp_path):
    fill_corruptions(tmp_path, CORRUPTIONS)
    shutil.rmtree(tmp_path / missing)
    with pytest.raises(ValueError, match=message):
        corruption_folders(tmp_path)


def evaluated_notes(model: Path, tmp_path: Path, *options) -> list[str]:
    (scores,) = evaluated(model, tmp_path, "--dataset", tmp_path / "set", *options)["results"].values()
    return scores["notes"]


def test_a_whole_test_set_needs_no_words(model, tmp_path, capsys):
    fill(tmp_path / "set" / "test", NAMES)
    assert evaluated_notes(model, tmp_path) == []
    assert "\n- " not in capsys.readouterr().out


def test_missing_re_assessed_labels_are_counted(model, tmp_path, capsys):
    fill(tmp_path / "set" / "test", NAMES)
    (tmp_path / "real.json").write_text(json.dumps([[0], [2], *[[]] * 6]))
    note = "ReaL accuracy is of 2 of 8 images: the others have no such label"
    assert evaluated_notes(model, tmp_path, "--real_labels", tmp_path / "real.json") == [note]
    assert f"- set: {note}" in capsys.readouterr().out
    (tmp_path / "real.json").write_text(json.dumps([[]] * 8))
    (note,) = evaluated_notes(model, tmp_path, "--real_labels", tmp_path / "real.json")
    assert "would be of 0 of 8 images" in note


def test_fewer_classes_are_said(model, tmp_path):
    fill(tmp_path / "set" / "test", NAMES[:3])
    expected = [
        "predictions are the best of its 3 classes, of 8 of the model",
        "no top-5 accuracy, which says little of 3 classes",
    ]
    assert evaluated_notes(model, tmp_path) == expected


def test_a_part_of_a_test_set_is_said(model, tmp_path):
    fill(tmp_path / "set" / "test", NAMES, 3)
    notes = evaluated_notes(model, tmp_path, "--max_samples", 4)
    assert notes[0] == "4 of its 24 images" and len(notes) <= 2


def test_columns_without_a_value_are_left_out(model, tmp_path, capsys):
    folder = fill(tmp_path / "images" / "test", NAMES)
    evaluated(model, tmp_path, "--datasets", folder.parent)
    heading = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| model"))
    assert heading == "| model | parameters | input | test set | images | top-1 | top-5 |"
    results = [{"model": "m", "parameters": 1e6, "input_size": (8, 8), "results": {"d": {"split": "s", "images": 3}}}]
    results[0]["results"]["d"]["accuracy"] = 0.5
    assert markdown_table(results).splitlines() == [
        "| model | parameters | input | test set | images | top-1 |",
        "| --- | ---: | --- | --- | ---: | ---: |",
        "| m | 1.0M | 8 x 8 | d (s) | 3 | 50.00 |",
    ]


def test_evaluation_on_the_training_images_is_said(model, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(model, trained)
    folder = fill(tmp_path / "pets", NAMES)  # without split folders: everything is train
    (trained / "arguments.json").write_text(json.dumps({"training_data": data_record(str(folder), "train")}))
    (note,) = list(evaluated(trained, tmp_path, "--datasets", folder)["results"][str(folder)]["notes"])
    assert note.startswith("trained was trained on train of pets")
    (trained / "arguments.json").write_text(json.dumps({"training_data": data_record(str(folder), "test")}))
    assert evaluated(trained, tmp_path, "--datasets", folder)["results"][str(folder)]["notes"] == []
