"""`LVViTForSemanticSegmentation`: sizes, trunk weights from classifiers, losses, pictures of any size, saving and loading."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_config
from torch import nn
from transformers import AutoModelForSemanticSegmentation

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.modeling_lvvit_segmentation import default_stages
from modeling_lvvit.variants import variant_config


NUM_CLASSES = 5
SMALL = {"num_hidden_layers": 4, "neck_channels": 16, "decoder_channels": 8, "num_labels": NUM_CLASSES}


def model_of(**settings) -> LVViTForSemanticSegmentation:
    torch.manual_seed(0)
    return LVViTForSemanticSegmentation(tiny_config(**{**SMALL, **settings})).eval()


@pytest.mark.parametrize(
    ("variant", "settings", "millions"),
    [
        ("lvvit_s_224", {"segmentation_head": "fcn", "neck_channels": 768, "image_size": 512}, 30),
        ("lvvit_s_224", {"image_size": 512}, 44),
        ("lvvit_m_224", {"image_size": 512}, 77),
        ("lvvit_l_288", {"image_size": 448, "decoder_channels": 512}, 209),
    ],
)
def test_published_parameter_counts(variant, settings, millions):
    """S with FCN, S, M and L with UperNet, 150 classes; within 2 %."""
    with torch.device("meta"):
        model = LVViTForSemanticSegmentation(variant_config(variant, num_labels=150, **settings))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("layers", "stages"), [(16, [7, 10, 13, 16]), (20, [11, 14, 17, 20]), (24, [15, 18, 21, 24]), (4, [1, 2, 3, 4])]
)
def test_published_layers_are_read(layers, stages):
    """Counted from 0 theirs are 6, 9, 12, 15 for S, 10, 13, 16, 19 for M and 14, 17, 20, 23 for L."""
    assert default_stages(layers) == [f"stage{stage}" for stage in stages]


def test_trunks_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="read four layers; the trunk has 3"):
        model_of(num_hidden_layers=3)


@pytest.mark.parametrize(("head", "stride"), [("upernet", 4), ("fcn", 8)])
def test_logits_have_the_resolution_of_the_head(head, stride):
    """Patches of 16 pixels; 48 rows x 80 columns."""
    model = model_of(segmentation_head=head, patch_size=16, image_size=[48, 80])
    with torch.no_grad():
        assert model(torch.randn(2, 3, 48, 80)).logits.shape == (2, NUM_CLASSES, 48 // stride, 80 // stride)


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (33, 16), (64, 128)])
def test_pictures_of_any_size(size):
    model = model_of()
    labels = torch.zeros(1, *size, dtype=torch.long)
    with torch.no_grad():
        output = model(torch.randn(1, 3, *size), labels=labels)
    height, width = output.logits.shape[-2:]
    assert (height, width) == size or (4 * height // 2, 4 * width // 2) == size
    assert torch.isfinite(output.loss)


def test_a_border_does_not_move_the_picture():
    """Logits of a padded picture are enlarged with the border, which is then cut off."""
    logits = torch.arange(16.0).view(1, 1, 4, 4)
    whole = nn.functional.interpolate(logits, (16, 16), mode="bilinear")
    assert torch.equal(model_of()._cropped(logits, (16, 16), (10, 7)), whole[..., :10, :7])


def test_loss_by_hand():
    """Cross-entropy over the pixels that count, and 0.4 times that of the auxiliary head."""
    model = model_of()
    pixel_values = torch.randn(2, 3, *model.config.image_height_width)
    labels = torch.randint(0, NUM_CLASSES, (2, *model.config.image_height_width))
    labels[0, :5] = 255
    kept = []
    model.auxiliary_decoder.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with torch.no_grad():
        output = model(pixel_values, labels=labels)
    losses = []
    for logits in (output.logits, kept[0]):
        wide = nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear")
        entropies = -wide.log_softmax(1).gather(1, labels.clamp(max=NUM_CLASSES - 1).unsqueeze(1))[:, 0]
        losses.append(entropies[labels != 255].mean())
    torch.testing.assert_close(output.loss, losses[0] + 0.4 * losses[1])
    with torch.no_grad():
        assert model(pixel_values, labels=torch.full_like(labels, 255)).loss == 0


@pytest.mark.parametrize("head", ["upernet", "fcn"])
def test_one_step_changes_every_parameter(head):
    model = model_of(segmentation_head=head).train()
    size = model.config.image_height_width
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(4, 3, *size), labels=torch.randint(0, NUM_CLASSES, (4, *size))).loss.backward()
    optimizer.step()
    unused = {"neck.levels.0", "neck.levels.1"} if head == "fcn" else set()
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert [name for name in still if not name.startswith(tuple(unused) or "-")] == []


def test_a_classifier_is_loaded_as_trunk(tmp_path):
    """Of another class count; its heads and final norm are left out without a warning about them."""
    classifier = LVViTForImageClassification(tiny_config(num_hidden_layers=4, num_labels=9))
    classifier.save_pretrained(tmp_path)
    model, loading = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=NUM_CLASSES, neck_channels=16, decoder_channels=8, output_loading_info=True
    )
    assert isinstance(model, LVViTForSemanticSegmentation) and not loading["unexpected_keys"]
    assert all(key.startswith(("neck.", "decoder.", "auxiliary_decoder.")) for key in loading["missing_keys"])
    expected = classifier.lvvit.state_dict()
    for key, value in model.lvvit.state_dict().items():
        assert torch.equal(value, expected[key]), key


FRESH = """
import sys
import torch
from transformers import AutoModelForSemanticSegmentation
model = AutoModelForSemanticSegmentation.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert "modeling_lvvit" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("head", ["upernet", "fcn"])
def test_a_fresh_process_loads_the_saved_folder(head, tmp_path):
    model = model_of(segmentation_head=head)
    model.save_pretrained(tmp_path / "model")
    pixel_values = torch.randn(2, 3, *model.config.image_height_width)
    torch.save(pixel_values, tmp_path / "pixels.pt")
    paths = [str(tmp_path / name) for name in ("model", "pixels.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", FRESH, *paths], check=True, capture_output=True, cwd=tmp_path)
    with torch.no_grad():
        expected = model(pixel_values).logits
    torch.testing.assert_close(torch.load(paths[2], weights_only=True), expected)
