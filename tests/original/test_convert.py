"""The converter, on files in the authors' layouts."""

import argparse
import pickle

import pytest
import torch

from modeling_lvvit import LVViTConfig, LVViTForImageClassification
from modeling_lvvit.original.checkpoint import load_original_checkpoint
from modeling_lvvit.original.convert import convert_checkpoint
from modeling_lvvit.variants import variant_config
from support.original_layout import original_shapes, original_state_dict, recipe_images


@pytest.fixture(scope="module")
def tiny_original():
    """LV-ViT-T for 32-pixel images and 5 classes, the smallest file that is recognized as a published size."""
    config = variant_config("lvvit_t_224", image_size=32, num_labels=5)
    return config, original_state_dict(config)


LAYOUTS = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "module prefix": lambda weights: {"state_dict": {f"module.{k}": v for k, v in weights.items()}},
    "averaged": lambda weights: {
        "state_dict": {k: torch.zeros_like(v) for k, v in weights.items()},
        "state_dict_ema": weights,
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_converts(layout, tiny_original, tmp_path):
    config, weights = tiny_original
    torch.save(LAYOUTS[layout](weights), tmp_path / "model.pth.tar")
    assert convert_checkpoint(tmp_path / "model.pth.tar", tmp_path / "out") < 1e-4
    model = LVViTForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_attention_heads == 4
    assert model.config.residual_divisor == 1.0
    assert torch.equal(model.classifier.weight, weights["head.weight"])
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_unpublished_size_needs_its_constants(tiny_original, tmp_path):
    config = LVViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, stem_hidden_size=8,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    torch.save(original_state_dict(config), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="--num_attention_heads and --residual_divisor"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "out")
    assert convert_checkpoint(tmp_path / "model.pth", tmp_path / "out", True, 3, 2.0) < 1e-4


def test_original_names_are_complete(tiny_original):
    """The recipe's list of names and shapes fits the model exactly (published count of T: 8,534,720 and 387 buffers)."""
    shapes = original_shapes(variant_config("lvvit_t_224"))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_534_720 + 387


class Harmful:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_pickled_code_never_runs(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match="never loaded"):
        load_original_checkpoint(tmp_path / "harmful.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="raw.pth"):
        load_original_checkpoint(tmp_path / "raw.pth")
    assert "must not run" not in capsys.readouterr().out


def test_damaged_and_foreign_files_are_refused(tiny_original, tmp_path):
    _, weights = tiny_original
    path = tmp_path / "model.pth"
    with pytest.raises(FileNotFoundError, match="model.pth"):
        convert_checkpoint(path, tmp_path / "out")
    torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read"):
        convert_checkpoint(path, tmp_path / "out")
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="not an LV-ViT checkpoint"):
        convert_checkpoint(path, tmp_path / "out")
    torch.save({name: value for name, value in weights.items() if name != "norm.bias"}, path)
    with pytest.raises(ValueError, match=r"lvvit.layernorm.bias"):
        convert_checkpoint(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pth"]


def test_weights_that_are_not_finite_are_refused_by_name(tiny_original, tmp_path):
    path = tmp_path / "model.pth"
    torch.save({**tiny_original[1], "head.bias": torch.tensor([0.0, torch.nan, 0.0, 0.0, 0.0])}, path)
    with pytest.raises(ValueError, match=r"model.pth: the weights hold NaN or infinite values, in head.bias"):
        convert_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_output_is_left_alone(tiny_original, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_images_of_the_recipe_are_those_of_the_reference():
    assert recipe_images(1, 224).flatten()[:4].tolist() == pytest.approx(
        [0.342481, 0.06326137, -0.9256287, 0.19838516]
    )
