"""Backbones of all families: a new head on what their own pooling gives, saved as ordinary classifiers."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import BitImageProcessor

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.fitting.backbone import find_heads, load_backbone, set_head
from modeling_lvvit.annotators.fitting.features import FeatureExtractor, backbone_fingerprint
from modeling_lvvit.backbones.feature_search import output_logits
from support.fitting import save_resnet
from support.models import tiny_config


NAMES = ["ant", "bee", "cat"]
SOURCE = {"revision": None, "trust_remote_code": False}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
DINO = {name: value for name, value in VIT.items() if name != "intermediate_size"}


def last(model, pixels):
    return model.base_model(pixels).last_hidden_state


def class_and_patches(model, pixels):
    tokens = last(model, pixels)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


def tower_patches(first: int):
    return lambda model, pixels: model.vision_model(pixels).last_hidden_state[:, first:].mean(dim=1)


# name: (saved model, its configuration, features by hand)
CHECKPOINTS = {
    "bare ViT": ("ViTModel", "ViTConfig", VIT, lambda model, pixels: last(model, pixels)[:, 0]),
    "bare DINOv2": ("Dinov2Model", "Dinov2Config", DINO, class_and_patches),
    "DINOv2 with registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO,
        lambda model, pixels: torch.cat([last(model, pixels)[:, 0], last(model, pixels)[:, 5:].mean(dim=1)], dim=1),
    ),
    "CLIP": ("CLIPModel", "CLIPConfig", {"vision_config": VIT, "text_config": TEXT}, tower_patches(1)),
    "CLIP tower": ("CLIPVisionModel", "CLIPVisionConfig", VIT, tower_patches(1)),
    "SigLIP": ("SiglipModel", "SiglipConfig", {"vision_config": VIT, "text_config": TEXT}, tower_patches(0)),
    "SigLIP tower": ("SiglipVisionModel", "SiglipVisionConfig", VIT, tower_patches(0)),
    "ConvNeXt": (
        "ConvNextForImageClassification", "ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        lambda model, pixels: model.convnext(pixels).pooler_output,
    ),
}  # fmt: skip


def save_checkpoint(folder: Path, model: str, config: str, settings: dict) -> Path:
    torch.manual_seed(0)
    configuration = getattr(transformers, config)(**settings)
    getattr(transformers, model)(configuration).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_timm(folder: Path, name: str, **settings) -> Path:
    torch.manual_seed(0)
    save_for_hf(timm.create_model(name, **settings), folder, safe_serialization=True)
    return folder


def check_fitted(backbone, folder: Path, features_by_hand) -> None:
    """Saves a backbone with a head, and compares features and logits of the annotator with those by hand."""
    backbone.save(folder / "start", "squash")
    annotator = load_annotator(str(folder / "start"))
    model, size = annotator.dense.model, backbone.image_size
    assert annotator.preprocessing.image_size == size and annotator.class_names == NAMES
    (name,) = find_heads(model, size)
    pixels = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = annotator.preprocessing.normalize(pixels)
    features = FeatureExtractor(model, [name], annotator.preprocessing, bf16=False)(pixels)[name]
    with torch.no_grad():
        expected = features_by_hand(model, values)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    weight, bias = torch.randn(3, features.shape[1]), torch.tensor([0.1, 0.2, -0.5])
    set_head(backbone.model, name, weight, bias)
    backbone.save(folder / "end", "squash")
    with torch.no_grad():
        logits = output_logits(load_annotator(str(folder / "end")).dense.model(values))
    torch.testing.assert_close(logits, features @ weight.T + bias, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_head_reads_what_the_pooling_of_the_backbone_gives(name, tmp_path):
    *checkpoint, features_by_hand = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path / "checkpoint", *checkpoint)
    backbone = load_backbone(str(folder), NAMES, None, SOURCE)
    assert backbone.image_size == (32, 32)
    check_fitted(backbone, tmp_path, features_by_hand)


@pytest.mark.parametrize("num_classes", [7, 3, 0])
def test_networks_of_timm_keep_their_pooling_whatever_head_they_had(num_classes, tmp_path):
    folder = save_timm(tmp_path / "checkpoint", "test_resnet", num_classes=num_classes)
    backbone = load_backbone(str(folder), NAMES, (64, 96), SOURCE)
    check_fitted(backbone, tmp_path, lambda model, pixels: model.forward_features(pixels).mean(dim=(2, 3)))
    config = json.loads((tmp_path / "end" / "config.json").read_text())
    assert config["label_names"] == NAMES and config["pretrained_cfg"]["crop_mode"] == "squash"


def test_vision_transformer_of_timm_is_saved_for_the_size_that_was_asked_for(tmp_path):
    folder = save_timm(tmp_path / "checkpoint", "test_vit", num_classes=0)
    backbone = load_backbone(str(folder), NAMES, (64, 96), SOURCE)
    check_fitted(backbone, tmp_path, lambda model, pixels: model.forward_features(pixels)[:, 0])


def test_convolution_that_classifies_is_fitted(tmp_path):
    folder = save_timm(tmp_path / "checkpoint", "test_nfnet", num_classes=7)
    model = load_backbone(str(folder), NAMES, (64, 64), SOURCE)
    fc = model.model.head.fc
    model.model.head.fc = torch.nn.Sequential(
        torch.nn.Unflatten(1, (-1, 1, 1)), torch.nn.Conv2d(fc.in_features, 3, 1), torch.nn.Flatten()
    )
    name = find_heads(model.model.eval(), (64, 64))[0]
    weight, bias = torch.randn(3, fc.in_features), torch.randn(3)
    set_head(model.model, name, weight, bias)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.model.forward_head(model.model.forward_features(pixels), pre_logits=True) @ weight.T + bias
        torch.testing.assert_close(model.model(pixels), expected, atol=1e-4, rtol=1e-3)


def test_lvvit_has_a_head_for_patch_tokens_and_one_for_the_class_token(tmp_path):
    torch.manual_seed(0)
    LVViTForImageClassification(tiny_config(image_size=32)).save_pretrained(tmp_path / "checkpoint")
    processor = BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "checkpoint")
    backbone = load_backbone(str(tmp_path / "checkpoint"), NAMES, None, SOURCE)
    heads = find_heads(backbone.model.eval(), (32, 32))
    assert heads == ["patch_classifier", "classifier"]
    backbone.save(tmp_path / "start", "squash")
    annotator = load_annotator(str(tmp_path / "start"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = FeatureExtractor(annotator.dense.model, heads, annotator.preprocessing, bf16=False)(pixels)
    with torch.no_grad():
        tokens = annotator.dense.model.lvvit(annotator.preprocessing.normalize(pixels)).last_hidden_state
    torch.testing.assert_close(features["classifier"], tokens[:, 0])
    torch.testing.assert_close(features["patch_classifier"], tokens[:, 1:].mean(dim=1))
    weight, bias = torch.randn(3, 32), torch.randn(3)
    set_head(backbone.model, "patch_classifier", weight, bias)
    backbone.save(tmp_path / "end", "squash")
    maps = load_annotator(str(tmp_path / "end")).score_map(pixels)
    torch.testing.assert_close(maps.flatten(2).mT, tokens[:, 1:] @ weight.T + bias, atol=1e-4, rtol=1e-3)


def test_weights_other_than_those_of_the_head_may_not_be_missing(tmp_path):
    folder = save_resnet(tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    del weights["resnet.encoder.stages.1.layers.0.layer.1.convolution.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights other than those of a classifier are missing.*stages.1"):
        load_backbone(str(folder), NAMES, None, SOURCE)


def test_other_refusals_say_why_and_what_to_do(tmp_path):
    folder = save_checkpoint(tmp_path / "dino", "DINOv3ViTModel", "DINOv3ViTConfig", VIT)
    with pytest.raises(ValueError, match="no image classifier of type 'dinov3_vit'; timm has DINOv3"):
        load_backbone(str(folder), NAMES, None, SOURCE)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_backbone("./nowhere", NAMES, None, SOURCE)
    deit = save_timm(tmp_path / "deit", "deit_tiny_distilled_patch16_224", num_classes=4, depth=1)
    with pytest.raises(ValueError, match="several classifiers"):
        load_backbone(str(deit), NAMES, None, SOURCE)


class AveragedHeads(torch.nn.Module):
    """Logits that are the mean of those of two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = pixel_values.mean(dim=(2, 3))
        return (self.one(features) + self.other(features)) / 2


def test_logits_that_no_single_layer_makes_are_refused():
    with pytest.raises(ValueError, match="AveragedHeads does not make its logits by one linear layer"):
        find_heads(AveragedHeads(), (8, 8))


def test_fingerprint_is_that_of_the_backbone_alone(tmp_path):
    folder = save_resnet(tmp_path / "checkpoint")
    backbone = load_backbone(str(folder), NAMES, None, SOURCE)
    heads = find_heads(backbone.model.eval(), (48, 48))
    first = backbone_fingerprint(backbone.model, heads)
    set_head(backbone.model, heads[0], torch.ones(3, 16), torch.ones(3))
    assert backbone_fingerprint(backbone.model, heads) == first
    assert find_heads(backbone.model, (48, 48)) == heads
    with torch.no_grad():
        next(backbone.model.parameters()).add_(0.1)
    assert backbone_fingerprint(backbone.model, heads) != first
