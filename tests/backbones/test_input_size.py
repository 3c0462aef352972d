"""Classifiers of transformers and timm made for images of another size."""

import copy

import pytest
import torch
from timm.models import swin_transformer
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from modeling_lvvit.token_labeling import add_patch_head, resize_classifier
from support.classifiers import REGISTERED, VIT, WINDOWS
from support.models import NUM_CLASSES


PLAIN, INTERPOLATING = {}, {"interpolate_pos_encoding": True}
RELATIVE = {**VIT, "use_relative_position_bias": True}
SHARED = {**VIT, "use_shared_relative_position_bias": True, "use_relative_position_bias": False}
MODELS = {
    "vit": ("vit", VIT, INTERPOLATING),
    "deit, two prefix tokens": ("deit", VIT, INTERPOLATING),
    "dinov2": ("dinov2", REGISTERED, PLAIN),
    "clip, an embedding as table": ("clip", {"vision_config": VIT}, PLAIN),
    "siglip, no prefix": ("siglip", {"vision_config": VIT}, PLAIN),
    "swin, no table": ("swin", WINDOWS, INTERPOLATING),
    "beit, relative tables": ("beit", RELATIVE, INTERPOLATING),
    "beit, one relative table": ("beit", SHARED, INTERPOLATING),
}


def random_model(kind: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, num_labels=NUM_CLASSES, architectures=[], **fields)
    model = AutoModelForImageClassification.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():  # tables that are zero at first would hide a wrong place
            value.add_(0.1 * torch.randn(value.shape))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_size", [(96, 96), (96, 64)])
def test_resized_models_are_plain_models_of_the_new_size(name, image_size, tmp_path):
    """They give what the old one gives when it resizes its table itself, and need no option for it."""
    kind, fields, options = MODELS[name]
    model = random_model(kind, fields)
    resized = resize_classifier(model, image_size)
    if kind in ("clip", "siglip", "dinov2", "beit") and image_size[0] != image_size[1]:
        assert (
            resized is model
        )  # transformers has no rectangles for them, or mixes up the rows and columns of their tables
        return
    assert resized is not model
    pixel_values = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(1))
    resized.save_pretrained(tmp_path)
    again, loading = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        logits = again.eval()(pixel_values).logits
        torch.testing.assert_close(logits, resized(pixel_values).logits)
        if kind not in ("clip", "siglip"):  # these have no such option
            torch.testing.assert_close(logits, model(pixel_values, **options).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_models_that_fit_stay_as_they_are(kind):
    fields = VIT if kind == "vit" else {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = random_model(kind, fields)
    assert resize_classifier(model, (64, 64)) is model


def test_tables_of_rectangles_are_resized_in_rows_and_columns():
    """A table that grows by one in each row, from 4 rows x 2 columns to 8 x 4: rows still differ, columns do not."""
    model = random_model("vit", {**VIT, "image_size": [64, 32]})
    table = model.vit.embeddings.position_embeddings
    with torch.no_grad():
        table[0, 1:] = torch.arange(4.0).repeat_interleave(2)[:, None]
        table[0, 0] = 9.0
        resized = resize_classifier(model, (128, 64)).vit.embeddings.position_embeddings[0, :, 0]
    assert resized[0] == 9.0
    cells = resized[1:].view(8, 4)
    torch.testing.assert_close(cells, cells[:, :1].expand(-1, 4))
    assert (cells[1:, 0] > cells[:-1, 0]).all()


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_sizes_that_patches_do_not_fill(kind):
    """60 pixels and patches of 8 are 7 x 7 cells and a class token, not 6 x 6 and 14 others."""
    vision = {**VIT, "patch_size": 8}
    model = random_model(kind, vision if kind == "vit" else {"vision_config": vision})
    resized = resize_classifier(model, (60, 60))
    pixel_values = torch.randn(2, 3, 60, 60)
    with torch.no_grad():
        logits = resized(pixel_values).logits
        if kind == "vit":
            torch.testing.assert_close(logits, model(pixel_values, **INTERPOLATING).logits, rtol=1e-3, atol=1e-4)
    assert resized is not model and logits.shape == (2, NUM_CLASSES)


def test_what_was_set_on_a_model_stays():
    model = random_model("vit", VIT).half().train()
    model.vit.requires_grad_(False)
    model.gradient_checkpointing_enable()
    resized = resize_classifier(model, (96, 96))
    assert resized is not model and resized.training and resized.is_gradient_checkpointing
    assert {value.dtype for value in resized.parameters()} == {torch.float16}
    trained = [name for name, value in resized.named_parameters() if value.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    with pytest.raises(ValueError, match="before it gets its patch head"):
        resize_classifier(add_patch_head(random_model("vit", VIT), (64, 64)), (96, 96))


def test_windows_of_timm_that_become_smaller(tmp_path):
    """A Swin at 64 pixels: its last maps are smaller than its windows."""
    config = TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", num_labels=NUM_CLASSES)
    model = TimmWrapperForImageClassification(config).eval()
    resized = resize_classifier(model, (64, 64))
    assert resized is not model
    resized.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()(pixel_values)
        torch.testing.assert_close(again.logits, resized(pixel_values).logits)


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", (96, 64)), ("swin_tiny_patch4_window7_224", (256, 256)), ("cait_xxs24_224", (64, 96))],
)
def test_models_of_timm_load_at_the_new_size(name, size, tmp_path):
    config = TimmWrapperConfig(architecture=name, num_labels=NUM_CLASSES, model_args={"drop_path_rate": 0.1})
    model = TimmWrapperForImageClassification(config).eval()
    resized = resize_classifier(model, size)
    assert resized is not model
    for key, value in model.named_parameters():
        other = resized.get_parameter(key)
        assert torch.equal(value, other) or "pos_embed" in key
    resized.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(again(pixel_values).logits, resized(pixel_values).logits)
    assert again.config.model_args["drop_path_rate"] == 0.1


def test_windows_of_timm_have_the_tables_that_timm_gives_them():
    """The same as a checkpoint gets that timm loads at this size."""
    config = TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", num_labels=NUM_CLASSES)
    model = TimmWrapperForImageClassification(config)
    resized = resize_classifier(model, (64, 64)).timm_model
    state = swin_transformer.checkpoint_filter_fn(dict(model.timm_model.state_dict()), copy.deepcopy(resized))
    tables = {key: value for key, value in resized.state_dict().items() if key.endswith("bias_table")}
    assert {len(table) for table in tables.values()} == {13 * 13, 7 * 7, 3 * 3}  # windows of 7, 4 and 2 cells
    for key, table in tables.items():
        torch.testing.assert_close(table, state[key])


@pytest.mark.parametrize("name", ["mixer_s32_224", "test_convnext"])
def test_models_of_timm_without_a_table_stay_as_they_are(name):
    """A convolutional network takes any size, an MLP-Mixer no other."""
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=name, num_labels=NUM_CLASSES))
    assert resize_classifier(model, (64, 64)) is model
