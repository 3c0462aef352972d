"""Training on images with several classes from the command line: data, model, card; and what is refused before training."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from pyarrow import parquet
from transformers import AutoConfig, pipeline

import train_tl
from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.cli.build_model import build_model
from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.open_data import open_datasets
from modeling_lvvit.data.classes.multi_label import MULTI_LABEL
from modeling_lvvit.token_labeling.multi_label import METRICS
from support.images import labelled_table
from support.models import tiny_config
from support.programs import TINY, options


LABELS = [["cat", "dog"], ["dog"], [], ["eel"], ["cat"], ["dog", "eel"]]


@pytest.fixture
def data(tmp_path) -> Path:
    """Twelve images with lists of classes in their metadata; every sixth has none."""
    rng, folder = np.random.default_rng(0), tmp_path / "pets"
    folder.mkdir()
    lines = []
    for row in range(12):
        Image.fromarray(rng.integers(0, 256, (36, 32, 3), dtype=np.uint8)).save(folder / f"{row}.png")
        lines.append(
            json.dumps({"file_name": f"{row}.png", "label": LABELS[row % 6], "cat": row % 2, "dog": 1 - row % 2})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def opened(data: Path, **options):
    return open_datasets(DataArguments(dataset_name=str(data), **options), seed=0)


def test_lists_are_recognized_and_said(data):
    result = opened(data, eval_fraction=0.3)
    text = "\n".join(result.describe("label"))
    assert "training: 8 images, multi-label:" in text and "without any class" in text
    assert result.train.features["label"].feature.names == ["cat", "dog", "eel"]
    columns = opened(data, label_column_names=["cat", "dog"], max_train_samples=4)
    assert columns.train.features["label"].feature.names == ["cat", "dog"] and len(columns.train) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"annotator": "timm/resnet18"},
            "Leave out `annotator`: images with several classes are trained on with plain",
        ),
        ({"require_token_labels": True}, "Leave out `require_token_labels`"),
        ({"label_separator": ";"}, "`label_separator` ';' divides text"),
    ],
)
def test_data_options_that_do_not_fit_are_refused(data, given, message):
    with pytest.raises(ValueError, match=message):
        opened(data, **given)


def test_options_of_labels_exclude_each_other():
    for given, message in (
        ({"label_separator": ";", "label_column_names": ["cat", "dog"]}, "give one of them"),
        ({"label_column_name": "species", "label_column_names": ["cat", "dog"]}, "`label_column_name` species or"),
        ({"label_column_names": ["cat", "cat"]}, "at least two different columns, got cat, cat"),
    ):
        with pytest.raises(ValueError, match=message):
            DataArguments(dataset_name="pets", **given)


def test_dense_labels_of_the_data_and_models_for_several_classes_as_annotators_are_refused(tmp_path):
    table = labelled_table()
    lists = pa.array([[0, 2], [1]] * 6)
    table = table.set_column(table.column_names.index("label"), "label", lists).replace_schema_metadata(None)
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"several classes .*and dense labels .*`use_token_labels` false"):
        opened(tmp_path / "train.parquet")
    assert opened(tmp_path / "train.parquet", use_token_labels=False).label_maps is None
    parquet.write_table(table, tmp_path / "test.parquet")
    for given in ({}, {"label_column_names": ["cat", "dog"]}):
        with pytest.raises(ValueError, match="no stream is trained"):
            opened(tmp_path, streaming=True, **given)
    LVViTForImageClassification(tiny_config(problem_type=MULTI_LABEL)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be loaded: it gives an image several classes"):
        load_annotator(str(tmp_path / "model"))


@pytest.mark.parametrize("more", [{}, {"architecture": "resnet"}])
def test_the_problem_type_follows_from_the_data(tmp_path, more):
    small = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    fields = small if more else TINY
    model, processor = build_model(ModelArguments(image_size=[32], config_overrides=fields, **more), ["a", "b"], True)
    assert model.config.problem_type == MULTI_LABEL
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    assert build_model(again, ["a", "b"], True)[0].config.problem_type == MULTI_LABEL
    assert build_model(again, ["a", "b"])[0].config.problem_type == "single_label_classification"
    overrides = ModelArguments(image_size=[32], config_overrides={"problem_type": MULTI_LABEL})
    with pytest.raises(ValueError, match="images of the data have one class each. Leave it out"):
        build_model(overrides, ["a", "b"])


@pytest.mark.slow
def test_program_trains_and_describes_a_model_for_several_classes(data, tmp_path, capsys):
    output = tmp_path / "run"
    train_tl.main(options(data, output, "--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"))
    printed = capsys.readouterr().out
    assert "plain multi-label labels" in printed and "multi-label: " in printed
    assert "on 2 evaluation images: mean average precision" in printed
    results = json.loads((output / "eval_results.json").read_text())
    assert {f"eval_{name}" for name in METRICS} <= results.keys() and "eval_accuracy" not in results
    assert AutoConfig.from_pretrained(output, trust_remote_code=True).problem_type == MULTI_LABEL
    card = ModelCard.load(output / "README.md")
    assert "with any of the 3 classes" in card.text and "It names one of them" not in card.text
    assert {result.metric_name for result in card.data.eval_results} <= set(METRICS)
    scores = pipeline("image-classification", model=str(output), trust_remote_code=True)(str(data / "0.png"), top_k=3)
    assert sum(score["score"] for score in scores) == pytest.approx(1.5, abs=0.4)  # each near 0.5, not together 1
