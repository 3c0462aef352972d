"""Fine-tuning from a checkpoint of another resolution or class count."""

import copy
import logging

import pytest
import torch

from modeling_lvvit import LVViTBackbone, LVViTForImageClassification
from modeling_lvvit.cli.build_model import build_model
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.variants import evaluation_image_processor
from support.models import NUM_CLASSES, tiny_config


NAMES = [f"class {index}" for index in range(NUM_CLASSES)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """32 x 48 pixels, classes 0 to 6, evaluation crop of three quarters."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = LVViTForImageClassification(tiny_config(id2label=dict(enumerate(NAMES))))
    model.save_pretrained(folder)
    evaluation_image_processor((32, 48), 0.75).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def warnings(caplog):
    for name in ("modeling_lvvit.cli.build_model", "transformers"):
        logging.getLogger(name).addHandler(caplog.handler)
    return caplog


def build(checkpoint: str, names: list[str] = NAMES, **options):
    return build_model(ModelArguments(model_name_or_path=checkpoint, **options), names)


def test_nothing_is_said_of_an_unchanged_model(checkpoint, warnings):
    model, processor = build(checkpoint)
    assert not [record for record in warnings.records if record.name == "modeling_lvvit.cli.build_model"]
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (64, 32)
    assert model.config.image_height_width == (32, 48)


def test_other_resolution_resizes_the_position_table_and_the_processor(checkpoint, warnings):
    model, processor = build(checkpoint, image_size=[64, 48])
    original = LVViTForImageClassification.from_pretrained(checkpoint)
    images = torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = original.eval()(images, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(model.eval()(images).logits, expected)
    assert "position table resized from (4, 6) to (8, 6) tokens" in warnings.text
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.crop_size["width"]) == (
        85,
        64,
        48,
    )


def test_resized_model_saves_and_loads(checkpoint, tmp_path):
    model, _ = build(checkpoint, image_size=[64])
    model.save_pretrained(tmp_path)
    again = LVViTForImageClassification.from_pretrained(tmp_path)
    assert again.config.image_height_width == (64, 64)
    assert torch.equal(again.get_position_embeddings(), model.get_position_embeddings())
    assert again.get_position_embeddings().shape == (1, 1 + 64, 32)
    assert LVViTBackbone.from_pretrained(tmp_path).get_position_embeddings().shape == (1, 1 + 64, 32)


def test_crop_fraction_replaces_that_of_the_checkpoint(checkpoint):
    _, processor = build(checkpoint, crop_pct=1.0)
    assert processor.size["shortest_edge"] == 48


def test_new_heads_are_listed_and_the_backbone_is_kept(checkpoint, warnings):
    with pytest.raises(ValueError, match="has 7 classes, the data has 2"):
        build(checkpoint, ["cat", "dog"])
    model, _ = build(checkpoint, ["cat", "dog"], ignore_mismatched_sizes=True)
    original = LVViTForImageClassification.from_pretrained(checkpoint)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    assert model.classifier.out_features == model.patch_classifier.out_features == 2
    for name in ("classifier", "patch_classifier"):
        assert f"{name}.weight" in warnings.text
    for name, weight in model.lvvit.state_dict().items():
        assert torch.equal(weight, original.lvvit.state_dict()[name])


def test_other_names_for_the_same_number_of_classes_make_new_heads(checkpoint, warnings):
    model, _ = build(checkpoint, [f"animal {index}" for index in range(NUM_CLASSES)])
    assert "none of its 7 classes ('class 0', ...) has the name of one of the data ('animal 0', ...)" in warnings.text
    assert not torch.equal(model.classifier.weight, build(checkpoint)[0].classifier.weight)


@pytest.mark.parametrize(
    ("name", "message"), [("./nowhere", "no model folder"), ("runs/mine", "neither a model folder")]
)
def test_missing_models_are_named(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        build(name)


def test_impossible_size_leaves_the_model_as_it_is(tiny_model):
    before = copy.deepcopy(tiny_model.state_dict())
    with pytest.raises(ValueError, match="multiples of `patch_size`"):
        tiny_model.resize_position_embeddings(50)
    assert tiny_model.config.image_height_width == (32, 48)
    assert all(torch.equal(weight, before[name]) for name, weight in tiny_model.state_dict().items())


def test_trained_tables_keep_their_optimizer_when_nothing_changes(tiny_model):
    table = tiny_model.get_position_embeddings()
    tiny_model.resize_position_embeddings((32, 48))
    assert tiny_model.get_position_embeddings() is table


def test_patches_without_stem_are_linear_in_the_pixels():
    torch.manual_seed(0)
    model = LVViTForImageClassification(tiny_config(conv_stem=False, patch_size=4)).eval()
    embed = model.lvvit.embeddings.patch_embeddings
    first, second = torch.randn(2, 1, 3, 32, 48)
    bias = embed.projection.bias
    with torch.no_grad():
        torch.testing.assert_close(
            embed(first + second) - bias, embed(first) + embed(second) - 2 * bias, rtol=1e-4, atol=1e-5
        )
    assert embed(first).shape == (1, 8 * 12, 32)
    assert not [name for name in model.state_dict() if "norm1.running_mean" in name]
    LVViTForImageClassification(tiny_config(conv_stem=False, patch_size=1, image_size=8))  # odd patches need no stem


def test_fused_models_are_not_trained(checkpoint, tmp_path):
    LVViTForImageClassification.from_pretrained(checkpoint).fuse().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was fused for inference and has no batch norms left"):
        build(str(tmp_path))
