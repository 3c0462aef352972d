"""The evaluation program: measures, class subsets, re-assessed labels, corruptions, several processes."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.backbones.image_processors import read_settings
from modeling_lvvit.evaluate import ClassificationScores, mean_corruption_error, read_real_labels
from modeling_lvvit.evaluate.__main__ import MODULE, main
from modeling_lvvit.evaluate.classifier import Classifier, InputOptions, load_classifier
from modeling_lvvit.evaluate.scores import ALEXNET_ERRORS, find_real_labels, imagenet_real_labels
from modeling_lvvit.evaluate.test_sets import corruption_folders, model_class_map, open_test_set, reassessed_labels
from modeling_lvvit.variants import evaluation_image_processor
from support.images import encode_image
from support.models import save_tiny_lvvit
from support.programs import ROOT, environment_of


NAMES = [f"class {letter}" for letter in "abcdefgh"]


def test_scores_by_hand():
    """The first is right, the second among the five, the third neither; people see class 1 or 2, nothing, class 7."""
    scores = ClassificationScores(8)
    ranked = [[0, 1, 2, 3, 4], [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]]
    scores.add_batch(predictions=ranked, references=[0, 1, 6], real=[{1, 2}, None, {1, 7}])
    assert scores.compute() == {
        "accuracy": 1 / 3, "top5_accuracy": 2 / 3, "real_accuracy": 1 / 2, "real_images": 2, "images": 3
    }  # fmt: skip
    assert scores.compute(predictions=ranked, references=[0, 5, 1]) == {
        "accuracy": 1.0,
        "top5_accuracy": 1.0,
        "images": 3,
    }
    assert "top5_accuracy" not in ClassificationScores(5).compute(predictions=ranked, references=[0, 4, 1])
    scores.add(prediction=[3, 1, 2, 4, 5], reference=3, real={3})
    assert scores.compute()["images"] == 1
    with pytest.raises(ValueError, match=r"True classes lie in \[0, 8\), got -1 to 2: a split without labels"):
        scores.add_batch(predictions=ranked, references=[0, -1, 2])
    with pytest.raises(ValueError, match="Expected ranked classes"):
        scores.add_batch(predictions=[1, 2], references=[1, 2])


def test_mean_corruption_error_by_hand():
    assert mean_corruption_error({"fog": [0.4, 0.5], "unknown": [1.0]}) == {"ce_fog": pytest.approx(0.45 / 0.819324)}
    alexnet = mean_corruption_error({name: [error] * 5 for name, error in ALEXNET_ERRORS.items()})
    assert len(ALEXNET_ERRORS) == 15 and alexnet["mce"] == pytest.approx(1.0)
    half = mean_corruption_error({name: [error / 2] * 5 for name, error in ALEXNET_ERRORS.items()})
    assert half["mce"] == pytest.approx(0.5) and half["ce_snow"] == pytest.approx(0.5)


def test_shipped_real_labels_are_those_of_imagenet():
    labels = imagenet_real_labels()
    assert len(labels) == 50_000 and labels[1] == [970, 795]
    assert 0 < sum(not classes for classes in labels) < 5_000 and max(max(c, default=0) for c in labels) == 999


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny LV-ViT of eight classes with random weights, of 32 x 32 pixels."""
    return save_tiny_lvvit(tmp_path_factory.mktemp("models") / "lvvit", NAMES)


def save_vit(folder: Path) -> None:
    """A tiny ViT of eight classes whose processor squashes images to 32 x 32 pixels."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**shape, image_size=32, patch_size=8, num_labels=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def rows_of(names: list[str], number: int = 11, seed: int = 0, paths: list[str] | None = None) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    arrays = [
        rng.integers(0, 256, (rng.integers(30, 60), rng.integers(30, 60), 3), dtype=np.uint8) for _ in range(number)
    ]
    paths = paths or [f"{index}.png" for index in range(number)]
    images = [{"bytes": encode_image(array, "PNG"), "path": path} for array, path in zip(arrays, paths)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict(
        {"image": images, "label": rng.integers(0, len(names), number).tolist()}, features
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows_of(NAMES).to_parquet(folder / "test.parquet")
    return folder


def output_logits(model: Path, rows: datasets.Dataset) -> torch.Tensor:
    """Image by image, by the standard classes of transformers."""
    network = LVViTForImageClassification.from_pretrained(model).eval()
    processor = evaluation_image_processor((32, 32), 0.8)
    with torch.no_grad():
        return torch.cat([network(**processor(row["image"], return_tensors="pt")).logits for row in rows])


def results_of(tmp_path: Path, *arguments) -> list[dict]:
    main([*map(str, arguments), "--output", str(tmp_path / "results.json")])
    return json.loads((tmp_path / "results.json").read_text())["results"]


def test_program_equals_an_independent_computation(model, data, tmp_path, capsys):
    rows = datasets.load_dataset("parquet", data_files=str(data / "test.parquet"), split="train")
    logits, labels = output_logits(model, rows), np.array(rows["label"])
    rng = np.random.default_rng(3)
    real = [sorted(set(rng.integers(0, 8, rng.integers(0, 4)).tolist())) for _ in rows]
    (tmp_path / "real.json").write_text(json.dumps(real))
    options = ("--model", model, "--dataset", data, "--batch_size", 4, "--real_labels", tmp_path / "real.json")
    (record,) = results_of(tmp_path, *options)
    (found,) = record["results"].values()
    best = logits.argmax(1).tolist()
    seen = [index in classes for index, classes in zip(best, real) if classes]
    assert found["accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1, labels=range(8)))
    assert found["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(8)))
    assert found["real_accuracy"] == pytest.approx(np.mean(seen)) and found["real_images"] == len(seen) < 11
    assert (record["input_size"], record["preprocessing"]["size"], found["images"]) == (
        [32, 32],
        {"shortest_edge": 40},
        11,
    )
    table = capsys.readouterr().out
    assert f"| {100 * found['accuracy']:.2f} | {100 * found['top5_accuracy']:.2f} |" in table


def test_fewer_classes_are_decided_among_themselves(model, tmp_path):
    """ImageNet-A and -R have 200 of the 1000 classes, in an order of their own."""
    names = [NAMES[index] for index in (6, 1, 3)]
    rows_of(names).to_parquet(tmp_path / "test.parquet")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "test.parquet"), split="train")
    (record,) = results_of(tmp_path, "--model", model, "--dataset", tmp_path / "test.parquet")
    (found,) = record["results"].values()
    expected = output_logits(model, rows)[:, [6, 1, 3]].argmax(1).numpy() == np.array(rows["label"])
    assert found["accuracy"] == pytest.approx(expected.mean()) and found["classes"] == 3


def test_folders_called_by_numbers_name_class_ids(tmp_path):
    """ImageNet-V2: as text 10 comes before 2."""
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    test_set = open_test_set(str(tmp_path))
    assert test_set.class_names == ["0", "10", "2"]
    found = model_class_map([f"thing {index}" for index in range(11)], test_set)
    assert found.groups == ((0,), (10,), (2,))
    assert (
        model_class_map(["0", "10", "2"], test_set) is None
    )  # a model that was trained on such folders has their names
    assert model_class_map(["10", "2", "5", "0"], test_set).groups == ((3,), (0,), (1,))
    with pytest.raises(ValueError, match="class folder 10; the model has the classes 0 to 9"):
        model_class_map([f"thing {index}" for index in range(10)], test_set)


def test_real_labels_follow_the_numbers_of_the_files(tmp_path):
    paths = [f"val/ILSVRC2012_val_{number:08d}_n01440764.JPEG" for number in (3, 1)]
    rows_of(NAMES, 2, paths=paths).to_parquet(tmp_path / "validation.parquet")
    test_set = open_test_set(str(tmp_path))
    assert reassessed_labels(test_set, "image", "label", [[1, 2], [3], []]) == [None, frozenset({1, 2})]
    with pytest.raises(ValueError, match="images up to 3 and 8 classes"):
        reassessed_labels(test_set, "image", "label", [[1], [2]])
    with pytest.raises(ValueError, match="at least 9 classes"):
        reassessed_labels(test_set, "image", "label", [[1], [2], [8]])
    rows_of(NAMES, 2).to_parquet(tmp_path / "validation.parquet")
    test_set = open_test_set(str(tmp_path))
    assert reassessed_labels(test_set, "image", "label", [[1], [2, 3]]) == [
        frozenset({1}),
        frozenset({2, 3}),
    ]  # as many: by their place
    with pytest.raises(ValueError, match="no one can tell which label is whose"):
        reassessed_labels(test_set, "image", "label", [[1], [2], [3]])


def test_real_labels_of_other_images_are_refused(tmp_path):
    rows_of(NAMES, 60).to_parquet(tmp_path / "validation.parquet")
    test_set = open_test_set(str(tmp_path))
    human = test_set.rows["label"]
    assert len(reassessed_labels(test_set, "image", "label", [[label] for label in human])) == 60
    with pytest.raises(ValueError, match="Only 0 % of the re-assessed labels hold the label of their image"):
        reassessed_labels(test_set, "image", "label", [[(label + 1) % 8] for label in human])
    one = open_test_set(str(tmp_path), max_samples=1)
    number = one.row_numbers[0]
    assert number > 0
    real = reassessed_labels(one, "image", "label", [[row % 8] for row in range(60)])
    assert real == [frozenset([number % 8])]
    subset = open_test_set(str(tmp_path), max_samples=5)
    assert subset.rows["label"][:] != human[:5]
    assert reassessed_labels(subset, "image", "label", [[label] for label in human]) == [
        frozenset({label}) for label in subset.rows["label"]
    ]


def test_real_labels_are_found_by_name_path_and_url(tmp_path, monkeypatch):
    (tmp_path / "real.json").write_text("[[1], []]")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_real_labels("~/real.json") == [[1], []] and len(find_real_labels("imagenet")) == 50_000
    asked = []
    monkeypatch.setattr(
        datasets.DownloadManager, "download", lambda self, url: asked.append(url) or str(tmp_path / "real.json")
    )
    assert find_real_labels("https://example.org/real.json") == [[1], []] and asked == [
        "https://example.org/real.json"
    ]


@pytest.mark.parametrize("content", ["{", "{}", '[["a"]]', "[1]", "[[-1]]"])
def test_other_files_are_no_real_labels(content, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match="real.json"):
        read_real_labels(tmp_path / "real.json")


def make_corruptions(folder: Path, names: tuple[str, ...], severities: str = "12345") -> None:
    for name in names:
        for severity in severities:
            for index in (1, 4):
                target = folder / name / severity / NAMES[index]
                target.mkdir(parents=True)
                rng = np.random.default_rng(index)
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(target / "a.png")


def test_corruptions_are_evaluated(model, tmp_path, capsys):
    make_corruptions(tmp_path / "c", ("fog", "noise/shot_noise"))
    renamed = rows_of(NAMES).rename_columns({"image": "photo", "label": "kind"})
    renamed.to_parquet(tmp_path / "test.parquet")
    columns = ("--dataset", tmp_path / "test.parquet", "--image_column", "photo", "--label_column", "kind")
    (record,) = results_of(tmp_path, "--model", model, *columns, "--corruptions", tmp_path / "c")
    errors = record["corruptions"]["errors"]
    assert set(errors) == {"fog", "shot_noise"} and all(len(values) == 5 for values in errors.values())
    assert record["corruptions"]["ce_fog"] == pytest.approx(np.mean(errors["fog"]) / ALEXNET_ERRORS["fog"])
    assert "mce" not in record["corruptions"] and "| 2 corruptions |" in capsys.readouterr().out


def test_unfit_folders_of_corruptions_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of corruptions"):
        corruption_folders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folders CORRUPTION/SEVERITY/CLASS"):
        corruption_folders(tmp_path)
    make_corruptions(tmp_path, ("fog",), "134")
    with pytest.raises(ValueError, match="fog has the severities 1, 3, 4; expected 1, 2, 3, 4, 5"):
        corruption_folders(tmp_path)


def test_other_sizes_and_crops(model, tmp_path):
    """LV-ViT, a ViT of transformers and a timm model on images of 48 x 48; the crop keeps half."""
    save_vit(tmp_path / "vit")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    for name, random in ((str(model), False), (str(tmp_path / "vit"), False), ("timm/test_vit", True)):
        classifier = load_classifier(name, InputOptions((48, 48), 0.5), random_weights=random)
        pixels = classifier.transform(image)
        assert pixels.shape == (3, 48, 48) and classifier.facts["input_size"] == [48, 48]
        assert classifier.logits(pixels[None]).shape == (1, len(classifier.class_names))
        # the shorter side becomes 96, of which the middle is kept: 30 x 30 pixels of the image
        middle = image.crop((30, 15, 60, 45)).resize((48, 48), Image.Resampling.BICUBIC)
        shown = torch.from_numpy(np.array(middle)).permute(2, 0, 1).float()
        assert np.corrcoef(pixels.flatten().numpy(), shown.flatten().numpy())[0, 1] > 0.9
        assert (
            pickle.loads(pickle.dumps(classifier.transform))(image).shape == pixels.shape
        )  # for workers that are spawned
    own = load_classifier("timm/resnet18", InputOptions(), random_weights=True)
    settings = timm.data.resolve_model_data_config(own.model, use_test_size=True)
    assert own.facts["input_size"] == list(settings["input_size"][1:]) and len(own.class_names) == 1000


def test_models_keep_their_view_of_images_at_other_sizes(model, tmp_path):
    """A processor that squashes images squashes them at another size too; that of LV-ViT keeps its crop of 0.8."""
    save_vit(tmp_path / "vit")
    for size in (None, (32, 32), (48, 48)):
        assert load_classifier(str(tmp_path / "vit"), InputOptions(size)).view == pytest.approx((1, 1), abs=0.01)
    own, other = (load_classifier(str(model), InputOptions(size)) for size in (None, (64, 64)))
    assert own.view[1] == pytest.approx(0.8, abs=0.02) and other.facts["preprocessing"]["size"] == {
        "shortest_edge": 80
    }


@pytest.mark.parametrize(
    ("side", "fraction", "shortest"), [(224, 0.9, 248), (224, 0.875, 256), (384, 1.0, 384), (32, 0.8, 40)]
)
def test_crop_fractions_are_read_exactly(side, fraction, shortest):
    processor = evaluation_image_processor((side, side), fraction)
    assert processor.size["shortest_edge"] == shortest and read_settings(processor).crop_pct == fraction


def test_what_was_measured_is_kept_when_a_later_image_is_broken(model, data, tmp_path):
    table = rows_of(NAMES, 3).cast_column("image", datasets.Image(decode=False)).to_list()
    table[1]["image"]["bytes"] = b"no image"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_list(table, features=features).to_parquet(tmp_path / "broken.parquet")
    with pytest.raises(SystemExit, match="Row 1 of the .*broken.parquet data.*cannot be decoded"):
        results_of(tmp_path, "--model", model, "--dataset", data, tmp_path / "broken.parquet")
    (record,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [found["images"] for found in record["results"].values()] == [11]


def test_scores_that_are_not_finite_name_the_row(model, data, monkeypatch):
    original = Classifier.logits

    def logits(self, pixel_values):
        scores = original(self, pixel_values)
        if len(scores) > 2:  # else it is the trial
            scores[2, 0] = float("nan")
        return scores

    monkeypatch.setattr(Classifier, "logits", logits)
    with pytest.raises(SystemExit, match=r"gives scores that are NaN or infinite for row 2\. Look at these images"):
        main(["--model", str(model), "--dataset", str(data), "--batch_size", "4"])


def test_models_that_do_not_take_their_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"on images of \[100, 100\] pixels|cannot be evaluated"):
        load_classifier("timm/test_vit", InputOptions((100, 100)), random_weights=True)


def test_models_are_compared_on_several_sets(model, data, tmp_path, capsys):
    rows_of(NAMES, 5, seed=4).to_parquet(tmp_path / "other.parquet")
    records = results_of(
        tmp_path, "--model", model, model, "--dataset", data, tmp_path / "other.parquet", "--bf16", "true"
    )
    assert [len(record["results"]) for record in records] == [2, 2] and records[0]["results"] == records[1]["results"]
    assert capsys.readouterr().out.count("| lvvit |") == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "./nowhere"}, "There is no model folder ./nowhere"),
        ({"--dataset": "./nowhere"}, "There is no dataset at"),
        ({"--dataset": None}, "Give test sets"),
        ({"--split": "dev"}, "no split 'dev'; it has"),
        ({"--label_column": "target"}, "Name it with --label_column"),
        ({"--real_labels": "nowhere.json"}, "no file of re-assessed labels"),
        ({"--real_labels": "imagenet"}, "no one can tell"),
        ({"--corruptions": "./nowhere"}, "no folder of corruptions"),
        ({"--crop_pct": "2"}, "must lie in"),
        ({"--image_size": "31"}, "cannot be evaluated"),
        ({"--batch_size": "0"}, "at least 1"),
    ],
)
def test_errors_come_before_any_work(changes, message, model, data):
    options = {"--model": str(model), "--dataset": str(data), **changes}
    with pytest.raises(SystemExit) as caught:
        main([word for option, value in options.items() if value is not None for word in (option, value)])
    assert message in str(caught.value) and str(caught.value).startswith("lvvit evaluate: ")


def test_other_classes_are_refused(model, tmp_path):
    rows_of(["class a", "something else"]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SystemExit, match="only in the dataset: 'something else'"):
        main(["--model", str(model), "--dataset", str(tmp_path / "test.parquet")])


@pytest.mark.slow
def test_two_processes_find_what_one_does(model, data, tmp_path):
    """11 images in batches of 4: the last batches are uneven."""
    options = ["--model", str(model), "--dataset", str(data), "--batch_size", "4"]
    (single,) = results_of(tmp_path, *options)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", MODULE]
    command = [*launch, *options, "--output", str(tmp_path / "two.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment_of(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two.json").read_text())["results"] == [single]
    assert done.stdout.count("| lvvit |") == 1
