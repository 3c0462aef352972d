"""Fitting an annotator as a user does: figures, files, folds, runs that were killed, refusals."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification

from modeling_lvvit.annotators import annotate
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.fitting import features as features_module
from modeling_lvvit.annotators.fitting import program
from modeling_lvvit.annotators.fitting.features import FeatureStore
from modeling_lvvit.annotators.online import AnnotatorArguments, describe_heads, open_annotator
from modeling_lvvit.data.images import content_hash, decode_image
from modeling_lvvit.evaluate.classifier import InputOptions, load_classifier
from modeling_lvvit.labels.storage import read_maps
from support.fitting import NAMES, arguments, colored_images, save_resnet, save_rows
from support.models import save_tiny_lvvit


CPU = torch.device("cpu")
CLASSES = [0, 1, 2] * 16 + [0, 1] * 6  # 22, 22 and 16 images


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    return colored_images(CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory, images) -> Path:
    return save_rows(tmp_path_factory.mktemp("data") / "train.parquet", images, CLASSES)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_resnet(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, data, backbone) -> Path:
    """An annotator with the heads of 4 folds."""
    folder = tmp_path_factory.mktemp("fitted") / "annotator"
    program.fit_annotator(arguments(data, backbone, folder, folds=4), CPU)
    return folder


def features_by_hand(annotator, images: list[bytes]) -> np.ndarray:
    """Mean of the last feature map of the residual network."""
    pixels = torch.stack([annotator.preprocessing(decode_image({"bytes": one, "path": None}))[0] for one in images])
    with torch.no_grad():
        maps = annotator.dense.model.resnet(annotator.preprocessing.normalize(pixels)).last_hidden_state
    return maps.mean(dim=(2, 3)).numpy()


def test_annotator_is_the_regression_on_the_features_with_the_classes_of_the_data(fitted, images):
    record = json.loads((fitted / "fit.json").read_text())
    annotator = load_annotator(str(fitted))
    assert annotator.class_names == NAMES and annotator.dense.grid_size == (6, 6)
    (figures,) = record["heads"].values()
    features = features_by_hand(annotator, images).astype(np.float64)
    regression = make_pipeline(
        StandardScaler(), LogisticRegression(C=figures["regularization"], tol=1e-8, max_iter=9999)
    )
    logits = regression.fit(features, CLASSES).decision_function(features) / figures["temperature"]
    model = AutoModelForImageClassification.from_pretrained(fitted)
    weight, bias = (getattr(model.classifier[-1], part).detach().numpy() for part in ("weight", "bias"))
    np.testing.assert_allclose(features @ weight.T + bias, logits, atol=0.02)
    assert 0.5 < figures["held_out_accuracy"] < 1 and figures["log_loss"] <= figures["log_loss_before_temperature"]
    scores = json.loads((fitted / "class_scores.json").read_text())
    recalls = [scores["classes"][name]["recall"] * CLASSES.count(index) for index, name in enumerate(NAMES)]
    assert sum(recalls) / len(CLASSES) == pytest.approx(figures["held_out_accuracy"])
    assert (fitted / "confusion_matrix.png").stat().st_size > 5000


@pytest.mark.parametrize("fit", ["squash", "center_crop"])
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_evaluation_sees_the_images_as_the_fit_did(library, fit, tmp_path, images, data, backbone):
    if library == "timm":
        torch.manual_seed(0)
        backbone = tmp_path / "timm"
        save_for_hf(timm.create_model("test_resnet", num_classes=9), backbone, safe_serialization=True)
    args = arguments(data, backbone, tmp_path / "a", fit=fit, annotator_image_size=[64], regularization=1.0)
    program.fit_annotator(args, CPU)
    annotator = load_annotator(str(tmp_path / "a"), fit=fit)
    classifier = load_classifier(str(tmp_path / "a"), InputOptions())
    decoded = [decode_image({"bytes": one, "path": None}) for one in images]
    with torch.no_grad():
        evaluated = classifier.logits(torch.stack([classifier.transform(image) for image in decoded]))
        pixels = torch.stack([annotator.preprocessing(image)[0] for image in decoded])
        output = annotator.dense.model(annotator.preprocessing.normalize(pixels))
    expected = getattr(output, "logits", output)
    assert (expected.argmax(dim=1) == evaluated.argmax(dim=1)).float().mean() > 0.98
    # a center crop begins at a whole pixel there, which noise shows
    assert (expected - evaluated).abs().mean() < (0.02 if fit == "squash" else 0.05) * expected.std()


def test_map_of_an_image_is_that_of_the_head_that_has_not_seen_it(fitted, images, tmp_path, capsys):
    new = colored_images([2, 0], seed=7)
    save_rows(tmp_path / "data" / "train.parquet", [*images, *new], [*CLASSES, 2, 0])
    words = [
        str(tmp_path / "data"),
        "--annotator",
        str(fitted),
        "--output_dir",
        str(tmp_path / "labels"),
        "--batch_size",
        "7",
    ]
    annotate.main(words)
    assert "60 images by the head of their fold, 2 by the head of all" in capsys.readouterr().out
    heads, annotator = load_file(fitted / "fold_heads.safetensors"), load_annotator(str(fitted))
    folds = dict(zip(heads["hashes"].tolist(), heads["folds"].tolist()))
    main = annotator.fold_heads.head
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "labels/data/*.parquet"), cache_dir=str(tmp_path)
    )["train"]
    maps = read_maps(table.data.table, 3)
    scores = np.take_along_axis(maps.scores, maps.ids.argsort(axis=1), axis=1)  # by class id
    for row in (0, 1, 17, 59, 60, 61):
        content = [*images, *new][row]
        pixels = annotator.preprocessing(decode_image({"bytes": content, "path": None}))[0][None]
        with torch.no_grad():
            cells = annotator.dense.model.resnet(annotator.preprocessing.normalize(pixels)).last_hidden_state
        fold = folds.get(content_hash(content))
        weight, bias = (main.weight, main.bias) if fold is None else (heads["weight"][fold], heads["bias"][fold])
        expected = torch.einsum("dhw,cd->chw", cells[0], weight) + bias[:, None, None]
        np.testing.assert_allclose(scores[row], expected.detach(), atol=0.02, rtol=0.01)
    assert (heads["weight"].std(dim=0) > 1e-3).any() and sorted(set(folds.values())) == [0, 1, 2, 3]
    record = json.loads((tmp_path / "labels" / "token_labels.json").read_text())
    assert record["settings"]["fold_heads"] == 4 and len(record["settings"]["fold_heads_sha256"]) == 64


def test_copies_of_an_image_are_computed_once_and_lie_in_one_fold(tmp_path, images, backbone, capsys):
    classes = [*CLASSES, CLASSES[5], CLASSES[5]]
    data = save_rows(tmp_path / "train.parquet", [*images, images[5], images[5]], classes)
    program.fit_annotator(arguments(data, backbone, tmp_path / "a", folds=3, regularization=0.1), CPU)
    out = capsys.readouterr().out
    assert "2 images are copies of others" in out and "computed of 60 images" in out and "; 2 were there" in out
    assert len(load_file(tmp_path / "a" / "fold_heads.safetensors")["hashes"]) == 60


def test_killed_run_goes_on_and_gives_the_same(tmp_path, data, backbone, monkeypatch, capsys):
    monkeypatch.setattr(features_module, "ROWS_PER_SHARD", 16)
    args = [arguments(data, backbone, tmp_path / name, folds=3) for name in ("whole", "killed")]
    expected = program.fit_annotator(args[0], CPU)
    write, written = FeatureStore.write, []

    def killed(store, hashes, features):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(len(hashes))
        write(store, hashes, features)

    monkeypatch.setattr(FeatureStore, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        program.fit_annotator(args[1], CPU)
    monkeypatch.setattr(FeatureStore, "write", write)
    capsys.readouterr()
    result = program.fit_annotator(args[1], CPU)
    assert written == [16, 16] and "computed of 28 images" in capsys.readouterr().out
    assert result["heads"] == expected["heads"]
    for name in ("model.safetensors", "fold_heads.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_second_run_uses_the_features_and_leaves_nothing_of_the_first(tmp_path, data, backbone, capsys):
    program.fit_annotator(arguments(data, backbone, tmp_path / "a", folds=3, regularization=0.1), CPU)
    next((tmp_path / "a" / "features").glob("*/*.safetensors")).write_bytes(b"damaged")
    program.fit_annotator(arguments(data, backbone, tmp_path / "a", folds=3, regularization=0.1), CPU)
    assert capsys.readouterr().out.count("computed of 60 images") == 2  # what is damaged is made again
    record = program.fit_annotator(arguments(data, backbone, tmp_path / "a", class_weights=["balanced"]), CPU)
    assert "computed of 0 images" in capsys.readouterr().out
    assert not (tmp_path / "a" / "fold_heads.safetensors").exists()
    assert record["class_weights"] == ["balanced"] and load_annotator(str(tmp_path / "a")).fold_heads is None
    program.fit_annotator(
        arguments(data, backbone, tmp_path / "a", annotator_image_size=[64], regularization=0.1), CPU
    )
    assert "computed of 60 images" in capsys.readouterr().out  # those of another size are other features


def test_other_fit_than_that_of_the_head_is_said(fitted, caplog):
    load_annotator(str(fitted), fit="pad")
    assert "was fitted on images brought to shape by squash, and sees them by pad" in caplog.text


def test_crops_in_training_get_the_head_of_all_which_is_said(fitted):
    args = SimpleNamespace(**vars(AnnotatorArguments(annotator=str(fitted))), random_erasing=0.0)
    annotator = open_annotator(args, NAMES, [0.5] * 3, [0.25] * 3, CPU)
    labels = annotator.score_map(torch.zeros(2, 3, 48, 48))
    assert "crops in training are labeled by the head that has seen them all" in describe_heads(annotator)
    assert labels.shape == (2, 3, 6, 6)


def refuse(match: str, *args, **more) -> None:
    with pytest.raises(ValueError, match=match):
        program.fit_annotator(arguments(*args, **more), CPU)


def test_refusals_come_before_features(tmp_path, images, data, backbone, monkeypatch):
    monkeypatch.setattr(program, "compute_features", None)
    plain = tmp_path / "plain.parquet"
    datasets.load_dataset("parquet", data_files=str(data), cache_dir=str(tmp_path / "c"))["train"].remove_columns(
        "label"
    ).to_parquet(plain)
    refuse("has no column 'label'", plain, backbone, tmp_path / "a")
    one = save_rows(tmp_path / "one.parquet", images[:3], [1, 1, 1])
    refuse("of 1 class \\(bee\\); a classifier needs at least two", one, backbone, tmp_path / "a")
    single = save_rows(tmp_path / "single.parquet", images[:5], [0, 0, 1, 1, 2])
    refuse("1 classes have a single one of the images: cat", single, backbone, tmp_path / "a")
    copies = save_rows(tmp_path / "copies.parquet", [*images[:4], images[4], images[4]], [0, 0, 1, 1, 2, 2])
    refuse("a single one of the different images: cat", copies, backbone, tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refuse("holds other files \\(notes.txt\\)", data, backbone, tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    refuse("cannot become an annotator.*cannot label cells", data, backbone, tmp_path / "b", annotator_image_size=[4])
    assert not list((tmp_path / "b").glob(".partial*"))


def test_damaged_image_stops_by_its_key(tmp_path, images, backbone):
    broken = save_rows(tmp_path / "train.parquet", [*images[:8], b"no image", *images[9:]], CLASSES)
    refuse("Image 8.png is unreadable: cannot identify", broken, backbone, tmp_path / "a")


def test_options_that_exclude_each_other_are_refused(tmp_path):
    for more, match in (
        ({"folds": 1}, "--folds must be 0"),
        ({"regularization": 0.0}, "--regularization must be above 0"),
        ({"folds": 3, "finetune_epochs": 1.0}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=match):
            arguments(tmp_path, "b", tmp_path, **more)


def test_images_without_a_label_are_left_out(tmp_path, images, data, backbone, capsys):
    labels = [-1 if row % 10 == 3 else index for row, index in enumerate(CLASSES)]
    program.fit_annotator(
        arguments(save_rows(tmp_path / "train.parquet", images, labels), backbone, tmp_path / "a"), CPU
    )
    assert "6 of 60 images have no label and are left out" in capsys.readouterr().out
    rows = [row for row, index in enumerate(labels) if index >= 0]
    some = save_rows(tmp_path / "some.parquet", [images[row] for row in rows], [labels[row] for row in rows])
    program.fit_annotator(arguments(some, backbone, tmp_path / "b"), CPU)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_lvvit_annotates_by_the_head_of_its_patch_tokens(tmp_path, images, data, capsys):
    backbone = save_tiny_lvvit(tmp_path / "lvvit", ["x", "y"])
    record = program.fit_annotator(arguments(data, backbone, tmp_path / "a", fit="pad", folds=3), CPU)
    assert list(record["heads"]) == ["patch_classifier", "classifier"]
    out = capsys.readouterr().out
    assert "patch_classifier: regularization" in out and "image processors cannot pad" in out and "--fit pad" in out
    annotator = load_annotator(str(tmp_path / "a"), fit="pad")
    heads = load_file(tmp_path / "a" / "fold_heads.safetensors")
    pixels = torch.stack(
        [annotator.preprocessing(decode_image({"bytes": one, "path": None}))[0] for one in images[:3]]
    )
    with torch.no_grad():
        tokens = annotator.dense.model.lvvit(annotator.preprocessing.normalize(pixels)).last_hidden_state[:, 1:]
        annotator.fold_heads.choose([int(heads["hashes"][0]), None, int(heads["hashes"][1])])
        maps = annotator.score_map(pixels).flatten(2).mT
        again = annotator.score_map(pixels).flatten(2).mT  # without a choice: the head of all
        annotator.fold_heads.choose([int(heads["hashes"][0]), None, int(heads["hashes"][1])], passes=2)
        twice = [annotator.score_map(pixels).flatten(2).mT for _ in range(3)]
        for one, expected in zip(twice, (maps, maps, again)):
            torch.testing.assert_close(one, expected)
    for place, number in ((0, 0), (2, 1)):
        fold = heads["folds"][number]
        expected = tokens[place] @ heads["weight"][fold].T + heads["bias"][fold]
        torch.testing.assert_close(maps[place], expected, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(maps[place], again[place], atol=1e-4)
    torch.testing.assert_close(maps[1], again[1])


def test_small_class_is_told_and_fitted(tmp_path, images, backbone, caplog):
    classes = [0] * 30 + [1] * 28 + [2] * 2
    data = save_rows(tmp_path / "train.parquet", images, classes)
    record = program.fit_annotator(arguments(data, backbone, tmp_path / "a", class_weights=["balanced"]), CPU)
    assert "1 classes have fewer images than the 5 folds" in caplog.text and record["images"] == 60


def test_class_without_images_is_told_and_keeps_its_place(tmp_path, images, backbone, caplog):
    names = ["ant", "auk", "bee", "cat"]
    data = save_rows(tmp_path / "train.parquet", images, [index + (index > 0) for index in CLASSES], names)
    program.fit_annotator(arguments(data, backbone, tmp_path / "a", regularization=0.1), CPU)
    assert "1 of 4 classes have no training image: auk" in caplog.text
    annotator = load_annotator(str(tmp_path / "a"))
    assert (
        annotator.class_names == names
        and "auk" not in json.loads((tmp_path / "a/class_scores.json").read_text())["classes"]["ant"]["predicted_as"]
    )
