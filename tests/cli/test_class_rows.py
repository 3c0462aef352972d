"""Heads of a checkpoint follow the names of the classes, not their positions."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.backbones.class_rows import ClassRows
from modeling_lvvit.cli.build_model import build_model
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.token_labeling import add_patch_head
from modeling_lvvit.variants import evaluation_image_processor
from support.classifiers import TRANSFORMERS
from support.models import tiny_config


ANIMALS = ["bird", "cat", "dog"]
SIZE = (64, 64)
ARCHITECTURES = {
    "lvvit": {},
    "vit": {"architecture": "vit", "config_overrides": TRANSFORMERS["vit"][0]},
    "mobilenet_v2": {"architecture": "mobilenet_v2", "config_overrides": {"depth_multiplier": 0.35}},
    "timm vit": {"architecture": "timm/test_vit"},
    "timm convnext": {"architecture": "timm/test_convnext"},
}


@pytest.fixture
def warnings(caplog):
    logging.getLogger("modeling_lvvit.cli.build_model").addHandler(caplog.handler)
    return caplog


def write_checkpoint(folder, architecture: str, names: list[str]) -> str:
    """A model whose heads have random rows and biases."""
    torch.manual_seed(0)
    options = ARCHITECTURES[architecture]
    if options:
        options = {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}
        options.get("config_overrides", {}).pop("image_size", None)
        model, _ = build_model(ModelArguments(image_size=[64], **options), names)
    else:
        model = LVViTForImageClassification(
            tiny_config(id2label=dict(enumerate(names)), num_labels=len(names), image_size=64)
        )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    evaluation_image_processor(SIZE, 1.0).save_pretrained(folder)
    return str(folder)


def build(checkpoint: str, names: list[str], **options) -> torch.nn.Module:
    return build_model(ModelArguments(model_name_or_path=checkpoint, **options), names)[0].eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of class token and patches, classes last."""
    output = model(torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)))
    return output.cls_logits, output.patch_logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_both_heads_follow_the_names(architecture, tmp_path, warnings):
    checkpoint = write_checkpoint(tmp_path / "a", architecture, ANIMALS)
    before = logits_of(build(checkpoint, ANIMALS))
    assert not [record for record in warnings.records if record.name == "modeling_lvvit.cli.build_model"]
    model = build(checkpoint, ["dog", "cat", "bird"])
    for old, new in zip(before, logits_of(model)):
        torch.testing.assert_close(new, old.flip(-1))
    assert model.config.id2label == {0: "dog", 1: "cat", 2: "bird"}
    assert "the rows of the heads follow the class names ('dog' was class 2, ...)" in warnings.text
    # and once more, from the saved model
    model.save_pretrained(tmp_path / "b")
    evaluation_image_processor(SIZE, 1.0).save_pretrained(tmp_path / "b")
    for old, new in zip(before, logits_of(build(str(tmp_path / "b"), ANIMALS))):
        torch.testing.assert_close(new, old)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("names", [["fox", "dog", "cat", "eel"], ["dog", "fox", "bird"], ["dog", "bird"]])
def test_classes_of_equal_names_keep_their_rows(architecture, names, tmp_path, warnings):
    checkpoint = write_checkpoint(tmp_path, architecture, ANIMALS)
    before = logits_of(build(checkpoint, ANIMALS))
    model = build(checkpoint, names, ignore_mismatched_sizes=True)
    for old, new in zip(before, logits_of(model)):
        assert new.shape[-1] == len(names)
        for index, name in enumerate(names):
            if name in ANIMALS:
                torch.testing.assert_close(new[..., index], old[..., ANIMALS.index(name)])
            else:
                assert (new[..., index].unsqueeze(-1) - old).abs().amax(dim=tuple(range(old.ndim - 1))).min() > 1e-3
    if "fox" in names:
        new_names = [name for name in names if name not in ANIMALS]
        shown = "are kept for 2 of 4 classes, by their names: 'dog', 'cat'; new for 2: 'fox', 'eel'"
        assert (shown if len(new_names) == 2 else "new for 1: 'fox'") in warnings.text
    else:
        assert "; left out: 'cat'." in warnings.text
    messages = [record.getMessage() for record in warnings.records if record.name == "modeling_lvvit.cli.build_model"]
    assert not any("another shape" in message for message in messages)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_without_a_class_of_the_data_are_new(architecture, tmp_path, warnings):
    checkpoint = write_checkpoint(tmp_path, architecture, ANIMALS)
    before = build(checkpoint, ANIMALS)
    model = build(checkpoint, ["eel", "fox", "gnu"])
    for old, new in zip(logits_of(before), logits_of(model)):
        assert (new.unsqueeze(-1) - old.unsqueeze(-2)).abs().amax(dim=tuple(range(old.ndim - 1))).min() > 1e-3
    assert "the heads are new, because none of its 3 classes ('bird', ...)" in warnings.text
    kept = [name for name, value in model.state_dict().items() if torch.equal(value, before.state_dict()[name])]
    assert len(kept) >= len(model.state_dict()) - 6


@pytest.mark.parametrize(
    ("old", "new", "sources", "text"),
    [
        (ANIMALS, ["Dog", "CAT", "bird_"], (2, 1, 0), "follow the class names"),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["n01443537", "n01440764"], (1, 0), "follow"),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], (None, None), "its own have no names, `id2label`"),
        (["0", "1"], ["cat", "dog"], (None, None), "its own have no names"),
        (["LABEL_0", "LABEL_1"], ["0", "1"], (0, 1), "taken over by the position"),
        (["cat", "dog"], ["0", "1"], (0, 1), "the data only numbers its own: 'cat' is now '0'"),
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], (0, 1, 3, 2), "follow the class names"),
        (["0", "1"], ["0", "1"], (0, 1), None),
        (["cat", "dog", "eel"], ["0", "1"], (None, None), "the heads are new"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1"], (None, None), "the heads are new"),
    ],
)
def test_names_and_numbers(old, new, sources, text):
    rows = ClassRows.match(old, new)
    assert rows.sources == sources
    assert rows.describe() is None if text is None else text in rows.describe()


def test_a_model_without_heads_says_nothing_of_rows(tmp_path, warnings):
    config = AutoConfig.for_model("vit", architectures=[], **TRANSFORMERS["vit"][0])
    AutoModelForImageClassification.from_config(config).vit.save_pretrained(tmp_path)
    evaluation_image_processor(SIZE, 1.0).save_pretrained(tmp_path)
    build(str(tmp_path), ["cat", "dog"])
    assert "new because the checkpoint lacks them: classifier.bias, classifier.weight." in warnings.text


def test_plain_models_of_the_library_have_their_rows_sorted_too(tmp_path):
    """Without a patch head in the checkpoint, and with two heads (distilled DeiT has one of each teacher)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "deit", architectures=[], id2label=dict(enumerate(ANIMALS)), **TRANSFORMERS["deit"][0]
    )
    plain = AutoModelForImageClassification.from_config(config).eval()
    torch.nn.init.normal_(plain.classifier.bias)
    plain.save_pretrained(tmp_path)
    evaluation_image_processor(SIZE, 1.0).save_pretrained(tmp_path)
    model = build(str(tmp_path), ["dog", "cat", "bird"])
    before, _ = logits_of(add_patch_head(plain, SIZE).eval())
    torch.testing.assert_close(logits_of(model)[0], before.flip(-1))
