"""`LVViTForSemanticSegmentation`: sizes, backbone weights from classifiers, losses, images of any size, saving and loading."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation, LVViTModel
from modeling_lvvit.modeling_lvvit import default_stages
from modeling_lvvit.variants import variant_config
from support.models import tiny_config


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


def test_backbones_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="read four layers; the backbone has 3"):
        model_of(num_hidden_layers=3)


@pytest.mark.parametrize(("head", "stride"), [("upernet", 4), ("fcn", 8)])
def test_logits_have_the_resolution_of_the_head(head, stride):
    """Patches of 16 pixels; 48 rows x 80 columns."""
    model = model_of(segmentation_head=head, patch_size=16, image_size=[48, 80])
    with torch.no_grad():
        assert model(torch.randn(2, 3, 48, 80)).logits.shape == (2, NUM_CLASSES, 48 // stride, 80 // stride)


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (33, 16), (64, 128)])
def test_images_of_any_size(size):
    model = model_of()
    labels = torch.zeros(1, *size, dtype=torch.long)
    with torch.no_grad():
        output = model(torch.randn(1, 3, *size), labels=labels)
    height, width = output.logits.shape[-2:]
    assert (height, width) == size or (4 * height // 2, 4 * width // 2) == size
    assert torch.isfinite(output.loss)


def test_a_border_does_not_move_the_image():
    """Logits of a padded image are enlarged with the border, which is then cut off."""
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


def test_a_classifier_is_loaded_as_backbone(tmp_path):
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


def test_a_backbone_alone_is_loaded_too(tmp_path):
    LVViTModel(tiny_config(num_hidden_layers=4)).save_pretrained(tmp_path)
    _, loading = LVViTForSemanticSegmentation.from_pretrained(
        tmp_path, num_labels=NUM_CLASSES, neck_channels=16, decoder_channels=8, output_loading_info=True
    )
    assert not loading["unexpected_keys"] and not any(key.startswith("lvvit.") for key in loading["missing_keys"])


def test_accumulated_batches_have_the_loss_of_the_big_one(tmp_path):
    """The Trainer divides by their number, because the model says that it gives means. Batch norm is left out."""
    model = model_of(image_size=32)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": torch.randint(0, NUM_CLASSES, (32, 32), generator=generator),
        }
        for _ in range(8)
    ]
    logged = []
    for batch_size, steps in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            tmp_path, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, max_grad_norm=1e9,
        )  # fmt: skip
        trainer = Trainer(copy.deepcopy(model), arguments, train_dataset=samples)
        trainer.model.train = lambda mode=True, own=trainer.model: own  # norms keep their statistics, dropout is off
        trainer.train()
        logged.append({name: trainer.state.log_history[0][name] for name in ("loss", "grad_norm")})
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)


def test_a_fresh_model_compiles_without_graph_breaks():
    model = model_of()
    pixel_values = torch.randn(2, 3, *model.config.image_height_width)
    expected = copy.deepcopy(model)(pixel_values).logits
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(pixel_values).logits, expected)


def test_single_images_in_training_are_refused_where_they_cannot_be_learned():
    pixel_values, labels = torch.randn(1, 3, 32, 48), torch.zeros(1, 32, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot be trained on a single image"):
        model_of().train()(pixel_values, labels=labels)
    assert torch.isfinite(model_of(segmentation_head="fcn").train()(pixel_values, labels=labels).loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segmentation_head": "psp"}, "must be upernet or fcn"),
        ({"segmentation_stages": ["stage1"]}, "must be four of stem, stage1"),
        ({"decoder_channels": 0}, "must be positive"),
        ({"pool_scales": []}, "must be positive"),
        ({"auxiliary_loss_weight": -1.0}, "must not be negative"),
        ({"semantic_loss_ignore_index": 2}, "is the id of one of the 5 classes"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        model_of(**settings)


def test_outputs_that_are_asked_for():
    model = model_of()
    pixel_values = torch.randn(2, 3, *model.config.image_height_width)
    output = model(pixel_values, output_hidden_states=True, interpolate_pos_encoding=True)
    assert len(output.hidden_states) == 5 and model(pixel_values).hidden_states is None
    logits, hidden_states = model(pixel_values, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, output.logits) and len(hidden_states) == 5


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
def test_a_fresh_process_loads_a_classifier_as_backbone(tmp_path):
    """Every saved folder has the code of all classes that its configuration names."""
    LVViTForImageClassification(tiny_config(num_hidden_layers=4)).save_pretrained(tmp_path / "model")
    code = FRESH.replace("trust_remote_code=True", "trust_remote_code=True, neck_channels=16, decoder_channels=8")
    size = tiny_config().image_height_width
    torch.save(torch.randn(2, 3, *size), tmp_path / "pixels.pt")
    paths = [str(tmp_path / name) for name in ("model", "pixels.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True, cwd=tmp_path)
    assert (tmp_path / "logits.pt").is_file()


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
