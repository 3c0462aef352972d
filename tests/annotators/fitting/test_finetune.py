"""Finetuning the last stage: what is trained, what stays, and which of both is kept."""

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from transformers import AutoModelForImageClassification

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.fitting import finetune, program
from modeling_lvvit.annotators.fitting.finetune import last_stage
from modeling_lvvit.backbones.loading import fingerprint
from support.fitting import arguments, colored_images, save_resnet, save_rows
from support.models import tiny_config


VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 8, "image_size": 32}


def vit(layers: int):
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=layers, **VIT))


def test_last_stage_is_the_last_blocks_and_all_behind_them():
    first_parts = {name.rsplit(".", 1)[0] for name in last_stage(vit(8).eval(), (32, 32))}
    blocks = {
        name.split(".")[2] if "encoder" in name else name.split(".")[1] for name in first_parts if ".layer" in name
    }
    assert {name for name in blocks if name.isdigit()} <= {"6", "7"} and {"vit.layernorm", "classifier"} <= first_parts
    assert not any("embeddings" in name for name in first_parts)
    trained = last_stage(timm.create_model("resnet18", num_classes=3).eval(), (64, 64))
    assert {name.split(".")[0] for name in trained} == {"layer4", "fc"}
    trained = last_stage(timm.create_model("convnext_atto", num_classes=3).eval(), (64, 64))
    assert (
        all(name.startswith(("stages.3", "norm_pre", "head")) for name in trained)
        and "stages.3.downsample.1.weight" in trained
    )
    trained = last_stage(LVViTForImageClassification(tiny_config(image_size=32)).eval(), (32, 32))
    assert {name.split(".")[-2] for name in trained} >= {"classifier", "patch_classifier"}
    assert not any("embeddings" in name for name in trained)


def test_network_without_stages_is_refused():
    with pytest.raises(ValueError, match="has no list of stages or blocks"):
        last_stage(torch.nn.Linear(2, 2), (2, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuning")
    classes = [0, 1, 2] * 20
    save_resnet(folder / "backbone")
    save_rows(folder / "data.parquet", colored_images(classes), classes)
    return folder


def run(folder, output):
    args = arguments(folder / "data.parquet", folder / "backbone", output, finetune_epochs=2.0, regularization=0.1)
    return program.fit_annotator(args, torch.device("cpu"))


@pytest.mark.parametrize("wanted", ["frozen", "finetuned"])
def test_better_of_both_is_kept(wanted, folder, tmp_path, monkeypatch, capsys):
    predicted = []

    def predict(model, args, images, rows, preprocessing, device):
        predicted.append(fingerprint(model))
        logits = np.eye(3)[images.classes[rows]]
        return logits if (len(predicted) == 2) == (wanted == "finetuned") else -logits

    monkeypatch.setattr(finetune, "predict", predict)
    record = run(folder, tmp_path / "a")
    assert record["finetuning"]["chosen"] == wanted and f"the {wanted} backbone is kept" in capsys.readouterr().out
    before = AutoModelForImageClassification.from_pretrained(folder / "backbone").state_dict()
    after = AutoModelForImageClassification.from_pretrained(tmp_path / "a").state_dict()
    changed = {
        name
        for name in before
        if before[name].shape == after[name].shape and not torch.equal(before[name], after[name])
    }
    assert predicted[0] != predicted[1]  # it was trained
    if wanted == "frozen":
        assert not changed
    else:
        assert changed and all(name.startswith("resnet.encoder.stages.1") for name in changed)
        assert not any("running" in name for name in changed)


def test_figures_are_those_of_the_saved_models(folder, tmp_path):
    record = run(folder, tmp_path / "a")
    figures = record["finetuning"]
    assert figures["held_out_images"] == 6 and 0 <= figures["accuracy_frozen"] <= 1
    assert figures["chosen"] == (
        "finetuned" if figures["accuracy_finetuned"] > figures["accuracy_frozen"] else "frozen"
    )
    assert (
        load_annotator(str(tmp_path / "a")).class_names
        and json.loads((tmp_path / "a" / "fit.json").read_text()) == record
    )
