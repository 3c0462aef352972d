"""The segmentation Trainer and its program: training, evaluation of whole images, resuming, saving, errors before training."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix as independent_confusion_matrix
from torch import nn
from transformers import AutoModelForSemanticSegmentation, pipeline

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.cli.parser import parse, recipe_names
from modeling_lvvit.data.sampling import ShardedEvalSampler
from modeling_lvvit.segmentation import train as program
from modeling_lvvit.segmentation.arguments import SegmentationDataArguments
from modeling_lvvit.segmentation.build_model import set_class_weights
from modeling_lvvit.segmentation.dataset import ClassCounts
from modeling_lvvit.segmentation.inference import InferenceSettings, best_classes, predict_classes
from modeling_lvvit.training.schedule import polynomial_factor
from modeling_lvvit.variants import variant_config
from modeling_lvvit.visualization import save_segmentation_figure
from support.models import tiny_config
from support.programs import ROOT, environment_of
from support.segmentation_rows import (
    NAMES,
    SETTINGS,
    mask_bytes,
    masked_rows,
    rows_of,
    samples_of,
    scene,
    segmenter,
    trainer_of,
)
from support.trainers import StopAfter, assert_same_weights


def test_schedule_of_the_published_runs():
    factors = [polynomial_factor(step, 160_000, 1500) for step in (0, 750, 1500, 80_000, 160_000)]
    assert factors == pytest.approx([1e-6, 0.49766, 0.990625, 0.5, 0.0], rel=1e-5)
    assert polynomial_factor(5, 10, 0, power=0.9) == pytest.approx(0.5**0.9)


def test_one_step_changes_every_parameter(tmp_path):
    model = segmenter()
    before = copy.deepcopy(model.state_dict())
    trainer_of(model, tmp_path, masked_rows(), max_steps=1, warmup_steps=0, weight_decay=0.0).train()
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []


def test_training_learns_the_colors(tmp_path):
    model = segmenter(initializer_range=0.1)
    rows = masked_rows(16)
    trainer = trainer_of(model, tmp_path, rows, rows, max_steps=60, per_device_train_batch_size=8)
    before = trainer.evaluate()["eval_pixel_accuracy"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_pixel_accuracy"] > max(0.8, before + 0.1)
    assert set(after) >= {"eval_mean_iou", "eval_mean_accuracy", "eval_runtime"}


def independent_scores(model, samples, settings: InferenceSettings) -> tuple[float, float, np.ndarray]:
    """Mean IoU, pixel accuracy and the IoU of the classes, image by image, counted by scikit-learn."""
    total = 0
    for sample in (samples[index] for index in range(len(samples))):
        pixel_values = sample["normalization"](sample["pixel_values"][None])
        predicted = predict_classes(lambda pixels: model(pixels).logits, pixel_values, settings)[0]
        counted = sample["labels"] != 255
        total = total + independent_confusion_matrix(
            sample["labels"][counted], predicted[counted], labels=range(len(NAMES))
        )
    hits = np.diag(total)
    iou = hits / (total.sum(0) + total.sum(1) - hits)
    return np.nanmean(iou), hits.sum() / total.sum(), iou


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.5)])
def test_evaluation_equals_an_independent_computation(batch_size, scales, tmp_path):
    """11 images of three sizes: batches hold several sizes, the last one is smaller."""
    model, rows = segmenter(initializer_range=0.1).eval(), masked_rows(11)
    trainer = trainer_of(model, tmp_path, None, rows, per_device_eval_batch_size=batch_size)
    trainer.inference = InferenceSettings((32, 48), (20, 30), scales=scales, flip=len(scales) > 1)
    metrics = trainer.evaluate()
    mean_iou, pixel_accuracy, iou = independent_scores(model, samples_of(rows), trainer.inference)
    assert metrics["eval_mean_iou"] == pytest.approx(mean_iou, abs=1e-9)
    assert metrics["eval_pixel_accuracy"] == pytest.approx(pixel_accuracy, abs=1e-9)
    assert trainer.class_scores["iou"] == pytest.approx(iou.tolist(), abs=1e-9, nan_ok=True)


def test_evaluation_does_not_change_training(tmp_path):
    """Dropout and drop path draw the same numbers with evaluations in between as without."""
    models = [segmenter(drop_path_rate=0.3), segmenter(drop_path_rate=0.3)]
    rows = masked_rows()
    trainer_of(models[0], tmp_path / "a", rows, max_steps=4).train()
    trainer_of(models[1], tmp_path / "b", rows, rows, max_steps=4, eval_strategy="steps", eval_steps=1).train()
    assert_same_weights(*models)
    assert models[1].training


@pytest.mark.parametrize(("rows", "processes"), [(11, 3), (2, 4), (6, 2)])
def test_every_row_is_evaluated_once(rows, processes):
    shares = [ShardedEvalSampler(rows, index, processes) for index in range(processes)]
    assert sorted(row for share in shares for row in share) == list(range(rows))
    assert sum(map(len, shares)) == rows


def test_best_classes_are_those_of_argmax():
    maps = torch.randn(2, 19, 5, 7)
    maps[:, 13] = maps[:, 3]  # equal values: the first class
    assert torch.equal(best_classes(maps, (5, 7)), maps.argmax(1))
    wide = nn.functional.interpolate(maps, (10, 9), mode="bilinear", align_corners=False)
    assert torch.equal(best_classes(maps, (10, 9)), wide.argmax(1))


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (400, 2), (4000, 16), (33, 49)])
def test_images_of_any_size_are_segmented(size):
    model = segmenter().eval()
    pixel_values = torch.rand(1, 3, *size)
    settings = InferenceSettings((32, 48), (20, 30), scales=(0.5, 1.0), flip=True)
    for found in (settings, InferenceSettings((32, 48), (20, 30), short_side=40, long_side=80)):
        predicted = predict_classes(lambda pixels: model(pixels).logits, pixel_values, found)
        assert predicted.shape == (1, *size) and predicted.max() < len(NAMES)


def test_class_weights_are_those_of_torch():
    weights = [0.5, 2.0, 0.0, 1.0]
    model = segmenter(semantic_loss_class_weights=weights, auxiliary_loss_weight=0).eval()
    labels = torch.randint(0, 4, (2, 32, 48))
    labels[0, :5] = 255
    output = model(torch.rand(2, 3, 32, 48), labels=labels)
    wide = nn.functional.interpolate(output.logits, (32, 48), mode="bilinear", align_corners=False)
    expected = nn.functional.cross_entropy(wide, labels, torch.tensor(weights), ignore_index=255)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    ignored = model(torch.rand(2, 3, 32, 48), labels=torch.full((2, 32, 48), 255)).loss
    assert ignored.item() == 0.0


def test_weights_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="must be 4 numbers"):
        segmenter(semantic_loss_class_weights=[1.0, 2.0])


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    """Stopped within an epoch, with everything random on."""
    rows = masked_rows()
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    models = [segmenter(drop_path_rate=0.3) for _ in range(3)]
    trainer_of(models[0], tmp_path / "whole", rows, **options).train()
    stopped = trainer_of(models[1], tmp_path / "parts", rows, **options)
    stopped.add_callback(StopAfter(2))
    stopped.train()
    torch.manual_seed(9)
    trainer_of(models[2], tmp_path / "parts", rows, **options).train(str(tmp_path / "parts" / "checkpoint-2"))
    assert_same_weights(models[0], models[2])


def test_training_sets_smaller_than_a_batch_are_refused(tmp_path):
    with pytest.raises(ValueError, match="3 training images, fewer than a step"):
        trainer_of(segmenter(), tmp_path, masked_rows(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 1}, "UperNet cannot be trained on one image at a time"),
        ({"per_device_train_batch_size": 11, "dataloader_drop_last": False}, "The last batch of 12 images .* a single one"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` has no meaning"),
        ({"lr_scheduler_type": "constant"}, "needs `lr_schedule` library"),
        ({"metric_for_best_model": "miou"}, "must be one of mean_iou, pixel_accuracy, mean_accuracy, got miou"),
        ({"lr_power": 0.0}, "`lr_power` must be positive"),
    ],
)  # fmt: skip
def test_unfit_options_are_refused_at_once(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(segmenter(), tmp_path, masked_rows(), **options)


def test_the_best_model_is_that_of_the_mean_iou(tmp_path):
    rows = masked_rows()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = trainer_of(segmenter(), tmp_path, rows, rows, load_best_model_at_end=True, **options)
    trainer.train()
    found = [entry["eval_mean_iou"] for entry in trainer.state.log_history if "eval_mean_iou" in entry]
    assert trainer.state.best_metric == max(found) == pytest.approx(trainer.evaluate()["eval_mean_iou"])


@pytest.mark.parametrize(("head", "auxiliary"), [("upernet", 0.4), ("upernet", 0.0), ("fcn", 0.4), ("fcn", 0.0)])
def test_every_parameter_receives_a_gradient(head, auxiliary):
    """Or processes that train together would wait for the others."""
    model = segmenter(segmentation_head=head, auxiliary_loss_weight=auxiliary)
    model(torch.rand(2, 3, 32, 48), labels=torch.randint(0, 4, (2, 32, 48))).loss.backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_sharding_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is not supported here"):
        trainer_of(segmenter(), tmp_path, masked_rows())


# the program


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    masked_rows(12).to_parquet(folder / "train-00000-of-00001.parquet")
    masked_rows(5, seed=1).to_parquet(folder / "validation-00000-of-00001.parquet")
    masked_rows(3, seed=2).to_parquet(folder / "test-00000-of-00001.parquet")
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


def options_of(data: Path, output_dir: Path, **overrides) -> list[str]:
    shape = {**tiny_config().to_diff_dict(), **SETTINGS}
    names = ("hidden_size", "num_attention_heads", "intermediate_size", "stem_hidden_size", "patch_size")
    names += ("num_hidden_layers", "neck_channels", "decoder_channels")
    options = {
        "dataset_name": data, "output_dir": output_dir, "max_steps": 3, "learning_rate": 0.01, "per_device_train_batch_size": 4,
        "report_to": "none", "disable_tqdm": "true", "save_strategy": "no", "image_size": "32 48",
        "config_overrides": json.dumps({name: shape[name] for name in names}), **overrides,
    }  # fmt: skip
    words = [
        [f"--{name}", *str(value).split(" ")]
        for name, value in options.items()
        if name != "config_overrides" and value is not None
    ]
    if options["config_overrides"] is not None:
        words.append(["--config_overrides", options["config_overrides"]])
    return [word for option in words for word in option]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A finished run with several scales and a test split."""
    folder = tmp_path_factory.mktemp("runs") / "segmenter"
    program.main(options_of(data, folder, multi_scale="true", scales="0.5 1.0", test_split="test"))
    return folder


def figures(folder: Path, name: str) -> dict[str, float]:
    found = json.loads((folder / f"{name}_results.json").read_text())
    return {key: value for key, value in found.items() if key.endswith(("iou", "accuracy"))}


def test_program_writes_what_a_run_gives(trained):
    for name in ("eval", "eval_multi_scale", "test", "test_multi_scale"):
        assert set(figures(trained, name)) == {f"{name}_{score}" for score in program_scores()}
    scores = json.loads((trained / "class_scores.json").read_text())
    assert list(scores) == ["validation", "validation, multi-scale", "test", "test, multi-scale"]
    assert list(scores["test"]) == NAMES and set(scores["test"]["car"]) == {"iou", "accuracy"}
    with Image.open(trained / "predictions.png") as image:
        assert image.width > 300 and image.height > 300
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "| car |" in card and "multi-scale mean_iou" in card
    config = json.loads((trained / "config.json").read_text())
    assert list(config["id2label"].values()) == NAMES and config["image_size"] == [32, 48]


def program_scores() -> tuple[str, ...]:
    return ("mean_iou", "pixel_accuracy", "mean_accuracy")


def test_saved_model_works_in_a_fresh_process(trained, data):
    code = (
        "import sys, torch; from transformers import AutoModelForSemanticSegmentation, pipeline; from PIL import Image;"
        f"path = {str(trained)!r}; model = AutoModelForSemanticSegmentation.from_pretrained(path, trust_remote_code=True);"
        "segment = pipeline('image-segmentation', model=path, trust_remote_code=True);"
        "found = segment(Image.new('RGB', (70, 50), 'red'));"
        "print(type(model).__name__, sorted({part['mask'].size for part in found}), 'modeling_lvvit' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=trained, env=environment_of(trained)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "LVViTForSemanticSegmentation [(70, 50)] False"


def test_pipeline_is_close_to_the_evaluation(trained, data):
    """Whole images of the size of a window: the same classes but where two are nearly equal."""
    model = AutoModelForSemanticSegmentation.from_pretrained(trained).eval()
    image, _ = scene(32, 48, np.random.default_rng(5))
    found = pipeline("image-segmentation", model=str(trained))(Image.fromarray(image))
    names = np.full(image.shape[:2], "", dtype=object)
    for part in found:
        names[np.asarray(part["mask"]) > 0] = part["label"]
    sample = samples_of(rows_of([image], [mask_bytes(np.zeros((32, 48), np.uint8))]))[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixel_values = (sample["pixel_values"] / 255 - mean) / std
    predicted = predict_classes(
        lambda pixels: model(pixels).logits, pixel_values[None], InferenceSettings((32, 48), (20, 30))
    )
    expected = np.array(NAMES, dtype=object)[predicted[0].numpy()]
    assert (names == expected).mean() > 0.99


def test_a_trained_model_is_evaluated_without_training(trained, data, tmp_path):
    options = {"model_name_or_path": trained, "evaluate_only": "true", "config_overrides": None, "image_size": None}
    program.main(options_of(data, tmp_path / "again", **options, test_split="test", save_picture="false"))
    for name in ("eval", "test"):
        assert figures(tmp_path / "again", name) == figures(trained, name)
    assert not (tmp_path / "again" / "model.safetensors").exists()


def test_a_classifier_becomes_the_backbone(data, tmp_path, caplog):
    torch.manual_seed(1)
    classifier = LVViTForImageClassification(tiny_config(num_hidden_layers=4))
    classifier.save_pretrained(tmp_path / "classifier")
    overrides = json.dumps({"neck_channels": 16, "decoder_channels": 8})
    options = {"model_name_or_path": tmp_path / "classifier", "config_overrides": overrides, "learning_rate": 1e-12}
    program.main(options_of(data, tmp_path / "run", **options, save_picture="false"))
    model = LVViTForSemanticSegmentation.from_pretrained(tmp_path / "run")
    weights = model.lvvit.state_dict()
    backbone = {
        k: v
        for k, v in classifier.lvvit.state_dict().items()
        if k in weights and "running" not in k and "num_" not in k
    }
    assert len(backbone) > 40 and all(
        torch.allclose(weights[name], value, atol=1e-6) for name, value in backbone.items()
    )
    assert model.config.id2label == dict(enumerate(NAMES))
    with pytest.raises(SystemExit, match="evaluation|trained model|classes") as caught:
        program.main(options_of(data, tmp_path / "b", evaluate_only="true"))
    assert "--model_name_or_path" in str(caught.value)


def test_a_backbone_keeps_its_shape_whatever_a_recipe_says(data, tmp_path):
    classifier = LVViTForImageClassification(tiny_config(num_hidden_layers=4, residual_divisor=2.0))
    classifier.save_pretrained(tmp_path / "classifier")
    overrides = {
        "neck_channels": 16,
        "decoder_channels": 8,
        "hidden_size": 96,
        "residual_divisor": 1.0,
        "drop_path_rate": 0.2,
    }
    options = {
        "model_name_or_path": tmp_path / "classifier",
        "config_overrides": json.dumps(overrides),
        "max_steps": 1,
    }
    program.main(options_of(data, tmp_path / "run", **options, save_picture="false"))
    config = LVViTForSemanticSegmentation.from_pretrained(tmp_path / "run").config
    assert (config.hidden_size, config.residual_divisor, config.drop_path_rate) == (32, 2.0, 0.2)


def test_models_without_trained_heads_are_not_evaluated(data, tmp_path):
    LVViTForImageClassification(tiny_config(num_hidden_layers=4)).save_pretrained(tmp_path / "classifier")
    overrides = {"evaluate_only": "true", "model_name_or_path": tmp_path / "classifier", "config_overrides": None}
    with pytest.raises(SystemExit, match="no trained segmentation heads"):
        program.main(options_of(data, tmp_path / "run", **overrides))


def test_models_are_evaluated_as_they_were_trained(data, tmp_path):
    """Without the options again: the size of images is kept, other mask values are refused."""
    names = {"class_names": "a b c", "reduce_labels": "true"}
    program.main(options_of(data, tmp_path / "run", **names, short_side=40, long_side=70, save_picture="false"))
    again = {
        "model_name_or_path": tmp_path / "run",
        "evaluate_only": "true",
        "config_overrides": None,
        "image_size": None,
    }
    again |= {"save_picture": "false", "class_names": names["class_names"]}
    with pytest.raises(SystemExit, match="trained with --reduce_labels true"):
        program.main(options_of(data, tmp_path / "a", **again))
    program.main(options_of(data, tmp_path / "b", **again, reduce_labels="true"))
    assert figures(tmp_path / "b", "eval") == figures(tmp_path / "run", "eval")


def test_weights_of_the_classes_of_an_earlier_run_are_dropped(data, tmp_path):
    program.main(options_of(data, tmp_path / "a", class_weights="1 2 3 4", save_picture="false"))
    options = {"model_name_or_path": tmp_path / "a", "config_overrides": None, "class_names": "a b c d e"}
    options |= {"ignore_mismatched_sizes": "true", "save_picture": "false", "image_size": None}
    program.main(options_of(data, tmp_path / "b", **options))
    assert LVViTForSemanticSegmentation.from_pretrained(tmp_path / "b").config.semantic_loss_class_weights is None


def test_checkpoints_of_evaluated_models_stay(data, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "save_picture": "false"}
    program.main(options_of(data, tmp_path / "run", **options))
    again = {"evaluate_only": "true", "config_overrides": None, "image_size": None, "overwrite_output_dir": "true"}
    inside = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(SystemExit, match="lies in --output_dir .* Choose another"):
        program.main(options_of(data, tmp_path / "run", model_name_or_path=inside, **again, save_picture="false"))
    program.main(
        options_of(data, tmp_path / "run", model_name_or_path=tmp_path / "run", **again, save_picture="false")
    )
    assert (inside / "model.safetensors").is_file()


def test_median_frequency_weights_enter_the_loss(data, tmp_path):
    program.main(options_of(data, tmp_path / "run", class_weights="median_frequency", save_picture="false"))
    weights = LVViTForSemanticSegmentation.from_pretrained(tmp_path / "run").config.semantic_loss_class_weights
    assert len(weights) == 4 and sorted(weights)[1] < 1.0 < max(weights)


def test_words_and_files_of_class_weights_mean_what_they_do_in_classification(tmp_path):
    """10 pixels of class 0 and 30 of class 2: 40 / (2 * 10) and 40 / (2 * 30)."""
    counts, model = ClassCounts(np.array([10, 0, 30, 0])), segmenter()
    set_class_weights(model, SegmentationDataArguments(class_weights=["balanced"]), counts)
    assert model.config.semantic_loss_class_weights == pytest.approx([2.0, 1.0, 2 / 3, 1.0])
    names = [model.config.id2label[index] for index in range(4)]
    (tmp_path / "weights.json").write_text(json.dumps({name: place for place, name in enumerate(reversed(names))}))
    set_class_weights(model, SegmentationDataArguments(class_weights=[str(tmp_path / "weights.json")]), None)
    assert model.config.semantic_loss_class_weights == [3.0, 2.0, 1.0, 0.0]


def test_early_stopping_keeps_the_best_by_mean_iou(data, tmp_path, capsys):
    """No mean IoU is better than another by more than 1."""
    stopping = {"early_stopping_patience": 1, "early_stopping_threshold": 1, "eval_steps": 1, "save_strategy": "steps"}
    program.main(options_of(data, tmp_path / "run", save_picture="false", max_steps=5, **stopping))
    said = capsys.readouterr().out
    assert "without a better mean_iou" in said and "ended after step 2 of 5" in said
    best = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["best_global_step"]
    weights = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}")
    )
    assert_same_weights(*weights)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset_name": "./nowhere"}, "There is no dataset at"),
        ({"model_name_or_path": "./nowhere", "config_overrides": None}, "There is no model folder"),
        ({"class_weights": "1 2 3"}, "--class_weights has 3 numbers; the data has 4 classes"),
        (
            {"class_weights": "many"},
            "--class_weights must be balanced, median_frequency, a JSON or CSV file, or a number",
        ),
        ({"class_weights": "median_frequency", "check_data": "false"}, "leave --check_data on"),
        ({"class_names": "a b"}, "has the values"),
        ({"stride": "40 60"}, "larger than the windows"),
        ({"per_device_train_batch_size": 16}, "fewer than a step"),
        ({"segmentation_head": "fcn", "config_overrides": '{"decoder_chanels": 8}'}, "did you mean decoder_channels"),
        ({"long_side": 100}, "needs a --short_side"),
        (
            {"model_name_or_path": "x", "evaluate_only": "true", "resume_from_checkpoint": "last"},
            "leave out --resume_from",
        ),
        ({"image_size": "30"}, "multiple"),
        ({"mask_colum_name": "annotation"}, "did you mean --mask_column_name"),
    ],
)
def test_errors_come_before_training_and_leave_nothing(changed, message, data, tmp_path):
    with pytest.raises(SystemExit) as caught:
        program.main(options_of(data, tmp_path / "run", **changed))
    assert message in str(caught.value) and str(caught.value).startswith("lvvit segment: ")
    assert not (tmp_path / "run" / "config.json").exists()


def test_models_of_other_classes_are_refused_or_changed(trained, data, tmp_path):
    options = {"model_name_or_path": trained, "config_overrides": None, "class_names": "a b c d e", "image_size": None}
    with pytest.raises(SystemExit, match="has 4 classes, the data has 5"):
        program.main(options_of(data, tmp_path / "run", **options))
    program.main(options_of(data, tmp_path / "run", **options, ignore_mismatched_sizes="true", save_picture="false"))
    model = LVViTForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert model.config.num_labels == 5 and model.decoder.classifier[1].out_channels == 5


def test_another_run_is_not_written_over(trained, data):
    with pytest.raises(SystemExit, match="holds another run"):
        program.main(options_of(data, trained))


def test_the_image_of_predictions_shows_wide_images(tmp_path):
    """4000 x 30 pixels; 70 classes, of which two have dollar signs."""
    mask = np.tile(np.arange(4000) // 60, (30, 1))
    mask[:, :50] = 255
    names = [f"${index}$" for index in range(70)]
    save_segmentation_figure(tmp_path / "a.png", [Image.new("RGB", (4000, 30))], [mask], [mask % 70], names, 255)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width < 2000


@pytest.mark.slow
def test_two_processes_evaluate_like_one(trained, data, tmp_path):
    """5 and 3 images over two processes, through accelerate."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    options = {"model_name_or_path": trained, "evaluate_only": "true", "config_overrides": None, "image_size": None}
    words = options_of(data, tmp_path / "two", **options, test_split="test", save_picture="false")
    done = subprocess.run(
        [*launch, "-m", program.MODULE, *words], capture_output=True, text=True, cwd=ROOT, env=environment_of(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    for name in ("eval", "test"):
        assert figures(tmp_path / "two", name) == figures(trained, name)


# recipes

PARTS = ("ade20k_base", "try_out")
PUBLISHED = {"upernet_s": 44, "upernet_m": 77, "upernet_l": 209, "fcn_s": 30, "fcn_m": None, "fcn_l": None}


@pytest.mark.parametrize("name", [name for name in recipe_names(program.PROGRAM) if name not in PARTS])
def test_recipe_headers_say_what_to_expect(name):
    head = [
        line for line in (program.PROGRAM.recipes / f"{name}.yaml").read_text().splitlines() if line.startswith("#")
    ]
    for field in ("command:", "expected:", "duration:"):
        assert any(field in line for line in head), field
    assert any("devices:" in line or "hardware:" in line for line in head)
    assert any(f"lvvit segment {name}" in line for line in head) or name == "digit_scenes"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_have_the_published_settings(name, monkeypatch):
    model_args, data_args, training_args = parse([name, "--bf16", "false", "--batch_norm", "local"], program.PROGRAM)
    assert (training_args.max_steps, training_args.warmup_steps, training_args.weight_decay) == (160_000, 1500, 0.01)
    assert training_args.base_learning_rate == 6e-5 and training_args.lr_power == 1.0
    assert 8 * training_args.per_device_train_batch_size == 16
    single, multi = data_args.inference(model_args.image_height_width)
    assert (single.window, single.stride, single.short_side) == ((512, 512), (341, 341), 512)
    assert multi.scales == (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) and multi.flip
    assert data_args.augmentation().scale == (0.5, 2.0) and data_args.reduce_labels
    variant = Path(model_args.model_name_or_path).name
    with torch.device("meta"):
        config = variant_config(
            variant, num_labels=150, segmentation_head=model_args.segmentation_head, **model_args.config_overrides
        )
        model = LVViTForSemanticSegmentation(config)
    if PUBLISHED[name] is not None:
        assert model.num_parameters() / 1e6 == pytest.approx(PUBLISHED[name], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_run(name, tmp_path, monkeypatch):
    program.main(
        [name, "try_out", "--report_to", "none", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")]
    )
    assert (tmp_path / "run" / "README.md").is_file()


def test_run_is_published_with_its_card(hub, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    program.main(
        options_of(data, tmp_path / "run", push_to_hub="true", hub_model_id="segmenter", hub_private_repo="true")
    )
    files = hub.files("user/segmenter")
    assert hub.is_private("user/segmenter")
    assert {
        "model.safetensors",
        "modeling_lvvit.py",
        "preprocessor_config.json",
        "class_scores.json",
    } <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt")) or name.startswith("checkpoint-")]
    card = ModelCard(files["README.md"].decode())
    assert 'model="user/segmenter"' in card.text and card.data.pipeline_tag == "image-segmentation"
    assert {result.metric_name for result in card.data.eval_results} == {"mean_iou", "pixel_accuracy", "mean_accuracy"}
