"""Model behaviour beyond the library's common tests."""

import copy

import pytest
import torch

from modeling_lvvit import LVViTBackbone, LVViTConfig, LVViTForImageClassification, LVViTModel
from modeling_lvvit.variants import VARIANTS, find_variant, variant_config
from support.models import NUM_CLASSES, tiny_config


def random_images(batch_size: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))


def box_mask(batch_size: int = 2) -> torch.Tensor:
    mask = torch.zeros(batch_size, 4, 6, dtype=torch.bool)
    mask[:, 1:3, 2:6] = True
    return mask


@pytest.mark.parametrize("name", VARIANTS)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = LVViTForImageClassification(variant_config(name))
    assert model.num_parameters() == VARIANTS[name].num_parameters
    assert find_variant(model.config) == name


@torch.no_grad()
def test_logits_add_half_the_best_patch(tiny_model):
    output = tiny_model.eval()(random_images())
    expected = output.cls_logits + 0.5 * output.patch_logits.max(dim=1).values
    torch.testing.assert_close(output.logits, expected)
    assert output.patch_logits.shape == (2, 24, NUM_CLASSES)


@torch.no_grad()
def test_untrained_patch_head_stays_out_of_logits(tiny_model):
    tiny_model.eval().config.patch_logits_weight = 0.0
    output = tiny_model(random_images())
    assert torch.equal(output.logits, output.cls_logits)


@torch.no_grad()
def test_mixing_takes_partner_tokens_and_puts_logits_back(tiny_model):
    """Without layers, a token depends on its own patch and place only, so mixed and put-back logits equal unmixed ones."""
    model = LVViTForImageClassification(tiny_config(num_hidden_layers=1)).eval()
    for parameter in model.lvvit.layers.parameters():
        parameter.zero_()
    plain, mixed = model(random_images()), model(random_images(), mix_mask=box_mask())
    torch.testing.assert_close(mixed.patch_logits, plain.patch_logits)
    embeddings = model.lvvit.embeddings
    tokens, mixed_tokens = embeddings(random_images())[:, 1:], embeddings(random_images(), box_mask())[:, 1:]
    inside = box_mask()[0].flatten()
    torch.testing.assert_close(mixed_tokens[0, inside], tokens[1, inside])
    torch.testing.assert_close(mixed_tokens[0, ~inside], tokens[0, ~inside])


@torch.no_grad()
def test_mixing_changes_predictions_and_odd_batches_work(tiny_model):
    tiny_model.eval()
    images = random_images(3)
    mixed = tiny_model(images, mix_mask=box_mask(3)).cls_logits
    plain = tiny_model(images).cls_logits
    torch.testing.assert_close(mixed[1], plain[1])  # the middle image is its own partner
    assert (mixed[0] - plain[0]).abs().max() > 1e-4


def test_every_parameter_gets_a_gradient(tiny_model):
    output = tiny_model.train()(random_images(), mix_mask=box_mask())
    (output.cls_logits.square().mean() + output.patch_logits.square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tiny_model.parameters())


@torch.no_grad()
def test_position_table_is_interpolated_only_when_asked(tiny_model):
    images = random_images(1, 64, 40)
    with pytest.raises(ValueError, match=r"\(64\*40\) doesn't match model \(32\*48\)"):
        tiny_model(images)
    assert tiny_model(images, interpolate_pos_encoding=True).patch_logits.shape[1] == 8 * 5


def test_interpolated_table_keeps_class_entry_and_orientation():
    model = LVViTModel(tiny_config())
    embeddings = model.embeddings
    rows = torch.arange(4.0).view(4, 1, 1).expand(4, 6, 32)  # the table tells its row
    with torch.no_grad():
        embeddings.position_embeddings[0, 1:] = rows.reshape(24, 32)
    table = embeddings.interpolate_position_embeddings(8, 6)
    assert torch.equal(table[:, :1], embeddings.position_embeddings[:, :1])
    grid = table[0, 1:].unflatten(0, (8, 6))
    torch.testing.assert_close(grid[:, 0], grid[:, 5])
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()


BAD_CONFIGS = {
    "odd patch size": ({"patch_size": 7, "image_size": 28}, "`patch_size` must be even, got 7"),
    "image size": ({"image_size": (32, 50)}, r"width 50\) must be positive multiples of `patch_size` \(8\)"),
    "heads": ({"num_attention_heads": 5}, r"multiple of `num_attention_heads` \(5\)"),
    "rate": ({"drop_path_rate": 1.0}, "drop_path_rate"),
    "no layers": ({"num_hidden_layers": 0}, "`num_hidden_layers` must be positive"),
    "text": ({"hidden_size": "32"}, "`hidden_size` must be an integer, got '32'"),
    "switch": ({"conv_stem": 1}, "`conv_stem` must be a boolean"),
    "one side": ({"image_size": [32]}, r"`image_size` must be an integer or \(height, width\)"),
    "stages": ({"out_features": ["stage2", "stem"]}, "in this order"),
    "stage": ({"out_indices": [3]}, "`out_indices` must be valid indices"),
    "both": ({"out_features": ["stem"], "out_indices": [1]}, "must be the same stages"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations_are_refused(case):
    overrides, message = BAD_CONFIGS[case]
    with pytest.raises(Exception, match=message):
        tiny_config(**overrides)


def test_bad_inputs_are_refused(tiny_model):
    with pytest.raises(ValueError, match="multiples of the patch size"):
        tiny_model(random_images(1, 36, 48), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="3 channels, got 4"):
        tiny_model(torch.zeros(1, 4, 32, 48))
    with pytest.raises(ValueError, match=r"`mix_mask` must have shape \(2, 4, 6\)"):
        tiny_model(random_images(), mix_mask=torch.zeros(2, 6, 4, dtype=torch.bool))


@pytest.mark.parametrize("patch_size", [2, 4, 10, 14])
def test_any_even_patch_size(patch_size):
    model = LVViTForImageClassification(
        tiny_config(patch_size=patch_size, image_size=(2 * patch_size, 3 * patch_size))
    )
    assert model(torch.zeros(1, 3, 2 * patch_size, 3 * patch_size)).patch_logits.shape[1] == 6


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    model = LVViTModel(tiny_config(num_hidden_layers=3, drop_path_rate=0.4))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])
    torch.manual_seed(0)
    dropped = model.layers[2].drop_path.train()(torch.ones(20_000, 1, 1))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


@torch.no_grad()
def test_backbone_gives_maps_of_the_tapped_layers(tiny_model):
    backbone = LVViTBackbone(tiny_config(out_features=["stem", "stage2"])).eval()
    backbone.lvvit.load_state_dict(tiny_model.lvvit.state_dict())
    maps = backbone(random_images()).feature_maps
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 32, 4, 6)] * 2
    tokens = tiny_model.eval().lvvit(random_images()).last_hidden_state[:, 1:]
    torch.testing.assert_close(maps[1].flatten(2).mT, tokens)


def test_classifier_checkpoint_loads_as_backbone_and_backbone(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    for kind in (LVViTModel, LVViTBackbone):
        loaded, report = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert torch.equal(loaded.base_model.layernorm.weight, tiny_model.lvvit.layernorm.weight)


def test_changed_class_count_makes_both_heads_new(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LVViTForImageClassification.from_pretrained(tmp_path, num_labels=3)
    model = LVViTForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == model.patch_classifier.out_features == 3
    assert model(random_images()).patch_logits.shape[-1] == 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@torch.no_grad()
def test_attention_implementations_agree(tiny_model, implementation):
    expected = tiny_model.eval()(random_images()).logits
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(random_images()).logits, expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model):
    gradients = []
    for is_checkpointed in (False, True):
        model = LVViTForImageClassification(tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.1))
        model.load_state_dict(tiny_model.state_dict())
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        model.train()(random_images(4), mix_mask=box_mask(4)).patch_logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.lvvit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_configs_are_equal_if_all_values_are():
    assert tiny_config() == tiny_config() and tiny_config() != tiny_config(hidden_size=64)


def test_config_that_became_wrong_is_not_saved(tmp_path):
    config = tiny_config()
    config.patch_size = 7
    with pytest.raises(ValueError, match="must be even"):
        config.save_pretrained(tmp_path)


def test_config_round_trip_keeps_auto_map(tmp_path):
    config = tiny_config(out_indices=[1, 2])
    config.save_pretrained(tmp_path)
    loaded = LVViTConfig.from_pretrained(tmp_path)
    assert loaded.out_features == ["stage1", "stage2"]
    assert loaded.auto_map["AutoModelForImageClassification"] == "modeling_lvvit.LVViTForImageClassification"
    assert loaded.grid_size == (4, 6)
