"""Two classes: the ROC and its thresholds, by hand and by the program; images with several classes in the program."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.evaluate.__main__ import main
from modeling_lvvit.evaluate.classifier import InputOptions, load_classifier
from modeling_lvvit.evaluate.two_classes import RocCurve, Wish
from modeling_lvvit.token_labeling.multi_label import METRICS, multi_label_metrics
from support.models import save_tiny_lvvit


SCORES = np.array([0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4, 0.3])
POSITIVE = np.array([1, 1, 0, 1, 0, 0, 1, 0], dtype=bool)


def test_curve_and_thresholds_by_hand():
    """12 of the 16 pairs of a positive and a negative are in the right order; recall minus false-positive rate is best, 0.5, at 0.8,
    and again at 0.6."""
    curve = RocCurve(SCORES, POSITIVE)
    assert curve.area == pytest.approx(12 / 16) and np.isinf(curve.thresholds[0])
    assert curve.average_precision == pytest.approx((1 + 1 + 3 / 4 + 4 / 7) / 4)
    youden = curve.at(curve.best(Wish()))
    assert youden["threshold"] == 0.8 and youden["recall"] == 0.5 and youden["false_positive_rate"] == 0
    assert youden["accuracy"] == 6 / 8
    recall = curve.at(curve.best(Wish(min_recall=0.75)))
    assert recall["threshold"] == 0.6 and recall["precision"] == 0.75 and recall["false_positive_rate"] == 0.25
    precision = curve.at(curve.best(Wish(min_precision=0.6)))
    assert precision["threshold"] == 0.55 and precision["recall"] == 0.75 and precision["precision"] == 0.6
    worse = RocCurve(SCORES, ~POSITIVE)
    record = worse.record("eel", Wish(min_precision=0.9), "all")
    assert record["threshold"] is None and record["at_threshold"] is None and record["curve"]["threshold"][0] is None


def test_record_has_the_corners_of_the_curve():
    curve = RocCurve(np.array([0.9, 0.8, 0.7, 0.2, 0.1]), np.array([1, 1, 0, 0, 1], dtype=bool))
    corners = curve.record("eel", Wish(), "all")["curve"]
    points = list(zip(corners["false_positive_rate"], corners["recall"]))
    assert points == [(0, 0), (0, pytest.approx(2 / 3)), (1, pytest.approx(2 / 3)), (1, 1)]


def test_wishes_are_checked():
    with pytest.raises(ValueError, match=r"`min_recall` must lie in \(0, 1\], got 2"):
        Wish(min_recall=2)
    with pytest.raises(ValueError, match="Give `min_recall` or `min_precision`, not both"):
        Wish(0.5, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight images in two class folders, five of them eels."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "pond"
    for index, name in enumerate(["eel"] * 5 + ["carp"] * 3):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (36, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_lvvit(tmp_path_factory.mktemp("models") / "tiny", ["carp", "eel"])


def test_program_writes_curve_and_threshold(data, model, tmp_path, capsys):
    output = tmp_path / "new" / "results.json"
    main(["--model", str(model), "--dataset", str(data), "--output", str(output), "--min_recall", "0.6"])
    printed = capsys.readouterr().out
    assert "positive class eel (the second one; --positive_class names another)" in printed
    table = output.with_name("results_tiny_pond_roc.json")
    assert f"lvvit predict --threshold {table}" in printed and table.with_suffix(".png").stat().st_size > 1000
    record, scores = json.loads(table.read_text()), json.loads(output.read_text())["results"][0]["results"][str(data)]
    classifier = load_classifier(str(model), InputOptions())
    pixels = [classifier.transform(Image.open(path))[None] for path in sorted(data.rglob("*.png"))]
    expected = np.array([classifier.logits(one).softmax(-1)[0, 1].item() for one in pixels])
    is_eel = np.array([0] * 3 + [1] * 5)  # by path
    assert record["roc_auc"] == scores["roc_auc"] == pytest.approx(roc_auc_score(is_eel, expected))
    assert record["average_precision"] == pytest.approx(average_precision_score(is_eel, expected))
    assert record["positive_class"] == "eel" and record["at_threshold"]["recall"] >= 0.6
    assert record["threshold"] == pytest.approx(np.sort(expected[is_eel == 1])[2])  # three of five eels have it
    main(["--model", str(model), "--dataset", str(data), "--positive_class", "carp"])
    # of two classes one is as far above the threshold as the other is below
    assert f"positive class carp: ROC AUC {100 * record['roc_auc']:.2f} %" in capsys.readouterr().out


def test_program_refuses_options_for_two_classes(data, model, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--model", str(model), "--dataset", str(data), "--positive_class", "pike"])
    assert "--positive_class must be carp or eel, got pike" in str(end.value)


@pytest.fixture
def several(data, tmp_path) -> Path:
    """The images in a Parquet file; eels alternate with a carp, and the last has none."""
    rows = [{"image": str(path)} for path in sorted(data.rglob("*.png"))]
    labels = [["eel"], ["carp", "eel"]] * 4
    labels[-1] = []
    features = {"image": datasets.Image(), "label": datasets.List(datasets.Value("string"))}
    table = [{**row, "label": label} for row, label in zip(rows, labels)]
    datasets.Dataset.from_list(table, features=datasets.Features(features)).to_parquet(tmp_path / "several.parquet")
    return tmp_path / "several.parquet"


def test_program_measures_images_with_several_classes(data, model, several, tmp_path, capsys):
    classifier = LVViTForImageClassification.from_pretrained(model)
    classifier.config.problem_type = "multi_label_classification"
    classifier.save_pretrained(tmp_path / "multi")
    (tmp_path / "multi" / "preprocessor_config.json").write_bytes((model / "preprocessor_config.json").read_bytes())
    output = tmp_path / "results.json"
    main(["--model", str(tmp_path / "multi"), "--dataset", str(several), "--output", str(output)])
    assert "| mAP | micro F1 | macro F1 | all classes right |" in capsys.readouterr().out
    scores = json.loads(output.read_text())["results"][0]["results"][str(several)]
    loaded = load_classifier(str(tmp_path / "multi"), InputOptions())
    pixels = [loaded.transform(Image.open(path))[None] for path in sorted(data.rglob("*.png"))]
    probabilities = np.concatenate([loaded.logits(one).sigmoid().numpy() for one in pixels])
    labels = np.array([[0, 1], [1, 1]] * 3 + [[0, 1], [0, 0]])
    assert {name: scores[name] for name in METRICS} == pytest.approx(multi_label_metrics(probabilities, labels))
    assert scores["images"] == 8 and scores["average_precisions"].keys() == {"carp", "eel"}
    for pair in (
        (model, several, "was not trained on such labels"),
        (tmp_path / "multi", data, "have one class each"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["--model", str(pair[0]), "--dataset", str(pair[1])])
        assert pair[2] in str(end.value)
