"""A trained model is evaluated as its training did, and every result says how that was."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from modeling_lvvit import LVViTConfig
from modeling_lvvit.demo.segmentation import Segmenter
from modeling_lvvit.segmentation import train as program
from modeling_lvvit.segmentation.inference import InferenceSettings, trained_inference
from support.segmentation_rows import NAMES, masked_rows


SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "stem_hidden_size": 8, "patch_size": 8,
    "neck_channels": 16, "decoder_channels": 8, "initializer_range": 0.2,
}  # fmt: skip
TRAINED = {
    "window": [40], "stride": [16], "short_side": [36], "long_side": [50], "scales": [0.5, 1.25], "horizontal_flip": [0],
    "ignore_index": [3], "mask_values": [2, 0, 1, 255], "multi_scale": ["true"],
}  # fmt: skip
RECORD = {
    "window": [40, 40], "stride": [16, 16], "short_side": 36, "long_side": 50, "scales": [0.5, 1.25], "flip": False, "ignore_index": 3,
    "reduce_labels": False, "mask_values": [2, 0, 1, 255],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Masks of the values 0 to 3 and 255."""
    folder = tmp_path_factory.mktemp("data")
    masked_rows(8).to_parquet(folder / "train.parquet")
    masked_rows(4, seed=1).to_parquet(folder / "validation.parquet")
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    return folder


def run(data: Path, output_dir: Path, **options) -> None:
    options = {
        "dataset_name": [data], "output_dir": [output_dir], "report_to": ["none"], "disable_tqdm": ["true"], "save_picture": ["false"],
        "save_strategy": ["no"], **options,
    }  # fmt: skip
    program.main([word for name, values in options.items() for word in (f"--{name}", *map(str, values))])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A model that was trained and evaluated with no setting at its default."""
    folder = tmp_path_factory.mktemp("runs") / "segmenter"
    training = {"image_size": [32], "config_overrides": [json.dumps(SHAPE)], "max_steps": [2], "learning_rate": [0.01]}
    run(data, folder, **training, **TRAINED, per_device_train_batch_size=[4], max_eval_samples=[3])
    return folder


def evaluate(model: Path, data: Path, output_dir: Path, **options) -> None:
    run(data, output_dir, model_name_or_path=[model], evaluate_only=["true"], **options)


def results(folder: Path, name: str = "eval") -> dict:
    return json.loads((folder / f"{name}_results.json").read_text())


def scores(folder: Path, name: str = "eval") -> dict[str, float]:
    return {key: value for key, value in results(folder, name).items() if key.endswith(("iou", "accuracy"))}


def test_configuration_and_results_say_how_it_was_evaluated(trained):
    assert LVViTConfig.from_pretrained(trained).segmentation_inference == RECORD
    single, several = (results(trained, name)[f"{name}_inference"] for name in ("eval", "eval_multi_scale"))
    assert several == RECORD | {"precision": "no"} and single == several | {"scales": [1.0], "flip": False}
    assert (results(trained)["eval_split"], results(trained)["eval_samples"]) == ("3 images of validation", 3)


def test_card_says_how_it_was_evaluated(trained):
    card = ModelCard.load(trained / "README.md")
    assert (
        "shorter side of 36 pixels, windows of 40 x 40 pixels every 16 x 16; multi-scale: sizes 0.5 1.25;" in card.text
    )
    assert "mask values 2, 0, 1, 255 for 4 classes, and 3, which is ignored" in card.text
    assert "| 3 images of validation | single scale |" in card.text
    assert {result.dataset_split for result in card.data.eval_results} == {"3 images of validation"}


def test_evaluation_without_options_repeats_that_of_the_training(trained, data, tmp_path, caplog):
    evaluate(trained, data, tmp_path / "again", multi_scale=["true"], max_eval_samples=[3])
    for name in ("eval", "eval_multi_scale"):
        assert scores(tmp_path / "again", name) == scores(trained, name)
        key = f"{name}_inference"
        assert results(tmp_path / "again", name)[key] == results(trained, name)[key]
    assert "Otherwise than" not in caplog.text


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"stride": [20]}, {"stride": [20, 20]}),
        ({"window": [24]}, {"window": [24, 24], "stride": [16, 16]}),  # every two thirds
        ({"image_size": [24]}, {"window": [24, 24], "stride": [16, 16]}),
        ({"short_side": [30]}, {"short_side": 30, "long_side": None}),
        ({"scales": [1], "horizontal_flip": [0.5]}, {"scales": [1.0], "flip": True}),
        ({"ignore_index": [255], "mask_values": [0, 1, 2, 3]}, {"ignore_index": 255, "mask_values": [0, 1, 2, 3]}),
    ],
)
def test_options_that_are_given_win_and_are_named(options, changed, trained, data, tmp_path, caplog):
    evaluate(trained, data, tmp_path / "other", multi_scale=["true"], **options)
    record = results(tmp_path / "other", "eval_multi_scale")["eval_multi_scale_inference"]
    assert record == RECORD | changed | {"precision": "no"}
    differing = [f"{name} {value} (not {RECORD[name]})" for name, value in changed.items() if value != RECORD[name]]
    line = next(line for line in caplog.messages if line.startswith("Otherwise than"))
    assert all(text in line for text in differing) and line.count("(not") == len(differing)


def test_folders_that_do_not_say_it_are_evaluated_as_before(trained, data, tmp_path, caplog):
    older = shutil.copytree(trained, tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["segmentation_inference"]
    (older / "config.json").write_text(json.dumps(config))
    evaluate(older, data, tmp_path / "again", mask_values=TRAINED["mask_values"], ignore_index=[3])
    expected = RECORD | {"window": [32, 32], "stride": [21, 21], "scales": [1.0], "precision": "no"}
    assert results(tmp_path / "again")["eval_inference"] == expected
    assert (
        "does not say how it was evaluated in its training" in caplog.text
        and "[32, 32] pixels every [21, 21]" in caplog.text
    )
    assert scores(tmp_path / "again") != scores(trained)


def test_demo_slides_the_windows_of_the_training(trained):
    segmenter = Segmenter(str(trained))
    assert segmenter.settings == InferenceSettings((40, 40), (16, 16), 36, 50)
    assert "windows of 40 x 40 pixels every 16 x 16" in segmenter.description
    assert trained_inference(LVViTConfig(), None) == InferenceSettings((224, 224), (149, 149))


def test_evaluating_training_images_is_named(trained, data, tmp_path, caplog):
    evaluate(trained, data / "train.parquet", tmp_path / "again", max_eval_samples=[3], class_names=NAMES)
    assert "no evaluation split: all of train is evaluated, also what was trained on" in caplog.text
