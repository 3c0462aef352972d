"""Relevance maps, how well they find things, and the programs that draw and measure them."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.variants import evaluation_image_processor
from modeling_lvvit.visualization import relevance_maps
from modeling_lvvit.visualization.__main__ import class_id
from modeling_lvvit.visualization.__main__ import main as draw
from modeling_lvvit.visualization.figures import save_relevance_figure
from modeling_lvvit.visualization.localization import chance_scores, localization_scores
from modeling_lvvit.visualization.localization import main as measure
from modeling_lvvit.visualization.panels import cells_panel
from modeling_lvvit.visualization.relevance import attention_rollout, class_relevance
from support.masked_images import masked, quarter
from support.models import NUM_CLASSES, tiny_config


def test_relevance_by_hand():
    """One head; in the second layer the first token takes all from the second, which had 1 + 0 of itself."""
    first = (torch.tensor([[[[0.5, 0.5], [0.0, 1.0]]]]), torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]]))
    assert class_relevance([first[0]], [first[1]]).tolist() == [[[1.5, 1.0], [0.0, 1.0]]]
    second = (torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), torch.tensor([[[[5.0, 2.0], [0.0, 0.0]]]]))
    found = class_relevance([first[0], second[0]], [first[1], second[1]])
    assert found.tolist() == [[[1.5, 3.0], [0.0, 1.0]]]


def test_heads_are_averaged_after_negative_weights_are_dropped():
    attention = torch.full((1, 2, 1, 1), 1.0)
    gradient = torch.tensor([3.0, -3.0]).view(1, 2, 1, 1)
    assert class_relevance([attention], [gradient]).item() == 1 + 3 / 2


def test_rollout_by_hand():
    """Half of every layer is the token itself."""
    attention = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    assert attention_rollout([attention]).tolist() == [[[0.5, 0.5], [0.0, 1.0]]]
    assert attention_rollout([attention] * 2).tolist() == [[[0.25, 0.75], [0.0, 1.0]]]
    random = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(3)]
    assert torch.allclose(attention_rollout(random).sum(-1), torch.ones(2, 5))


def vit() -> ViTForImageClassification:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**shape, image_size=(32, 48), patch_size=8, num_labels=5)).eval()


def test_maps_have_the_grid_of_the_patches(tiny_model):
    pixel_values = torch.rand(2, 3, 32, 48)
    for model in (tiny_model.eval(), vit()):
        maps = relevance_maps(model, pixel_values)
        for found in (maps.relevance, maps.attention, maps.rollout):
            assert found.shape == (2, 4, 6) and (found >= 0).all()
        assert torch.equal(maps.class_ids, maps.logits.argmax(-1))
        with torch.no_grad():
            assert torch.allclose(maps.logits, model(pixel_values).logits, atol=1e-5)
    assert relevance_maps(tiny_model, pixel_values).patch_logits.shape == (2, 24, NUM_CLASSES)
    tiny_model.config.patch_logits_weight = 0.0  # the patch head was not trained
    assert relevance_maps(tiny_model, pixel_values).patch_logits is None


def test_maps_of_a_batch_are_those_of_its_images(tiny_model):
    pixel_values, ids = torch.rand(3, 3, 32, 48), torch.tensor([1, 4, 2])
    together = relevance_maps(tiny_model.eval(), pixel_values, ids).relevance
    for index in range(3):
        alone = relevance_maps(tiny_model, pixel_values[index : index + 1], ids[index : index + 1]).relevance
        assert torch.allclose(together[index], alone[0], atol=1e-6)
    others = relevance_maps(tiny_model, pixel_values, torch.tensor([2, 2, 2])).relevance
    assert not torch.allclose(others[0], together[0]) and torch.allclose(others[2], together[2], atol=1e-6)


def timm_vit() -> torch.nn.Module:
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "img_size": (32, 48), "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape).eval()


def with_weights_of(theirs: torch.nn.Module) -> ViTForImageClassification:
    """The model of transformers that computes the same."""
    model = vit()
    model.config.layer_norm_eps = 1e-6
    for layer in model.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer.eps = 1e-6
    names = [
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
        ("norm.", "vit.layernorm."),
        ("head.", "classifier."),
    ]
    values = {}
    for key, value in theirs.state_dict().items():
        if ".attn.qkv." in key:
            layer, part = key.split(".")[1], key.split(".")[-1]
            for name, third in zip("qkv", value.chunk(3)):
                values[f"vit.layers.{layer}.attention.{name}_proj.{part}"] = third
            continue
        for old, new in (
            ("blocks.", "vit.layers."),
            ("attn.proj", "attention.o_proj"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
        ):
            key = key.replace(old, new)
        for old, new in names:
            key = new + key.removeprefix(old) if key.startswith(old) else key
        values[key] = value
    model.load_state_dict(values)
    return model


def test_timm_and_transformers_give_the_same_maps():
    theirs = timm_vit()
    switches = [block.attn.fused_attn for block in theirs.blocks]
    pixel_values, ids = torch.rand(2, 3, 32, 48), torch.tensor([1, 3])
    maps, same = relevance_maps(theirs, pixel_values, ids), relevance_maps(with_weights_of(theirs), pixel_values, ids)
    for name in ("relevance", "attention", "rollout", "logits"):
        assert torch.allclose(getattr(maps, name), getattr(same, name), atol=1e-5), name
    assert [block.attn.fused_attn for block in theirs.blocks] == switches
    assert not any(block.attn.attn_drop._forward_hooks for block in theirs.blocks)


def test_the_model_stays_as_it_was(tiny_model):
    tiny_model.eval().requires_grad_(False)
    tiny_model.classifier.requires_grad_(True)
    before = {name: value.requires_grad for name, value in tiny_model.named_parameters()}
    implementation = tiny_model.config._attn_implementation
    with torch.no_grad():
        relevance_maps(tiny_model, torch.rand(1, 3, 32, 48))
    assert {name: value.requires_grad for name, value in tiny_model.named_parameters()} == before
    assert tiny_model.config._attn_implementation == implementation
    assert all(value.grad is None for value in tiny_model.parameters())


def test_networks_without_a_class_token_are_refused():
    resnet = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).eval()
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    ).eval()
    for name in ("resnet10t", "cait_xxs24_224", "swin_tiny_patch4_window7_224", "mobilevit_xxs", "volo_d1_224"):
        with pytest.raises(ValueError, match="relevance needs a plain vision transformer"):
            relevance_maps(timm.create_model(name).eval(), torch.rand(1, 3, 224, 224))
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    beit = BeitForImageClassification(BeitConfig(**shape, image_size=32, patch_size=8)).eval()
    with pytest.raises(ValueError, match="does not come from its class token alone"):
        relevance_maps(beit, torch.rand(1, 3, 32, 32))
    for model in (resnet, swin):
        with pytest.raises(ValueError, match="relevance needs a plain vision transformer"):
            relevance_maps(model, torch.rand(1, 3, 32, 32))


def test_localization_by_hand():
    """Masks of 2 of 8 pixels; the first map has its peak and one of its two largest values inside, the second none."""
    maps = torch.tensor([[[9.0, 1, 2, 3], [8, 0, 0, 0]], [[0.0, 1, 2, 3], [0, 9, 9, 0]]])
    masks = torch.zeros(2, 2, 4, dtype=torch.bool)
    masks[0, 0, :2] = masks[1, 0, :2] = True
    hits, overlap = localization_scores(maps, masks)
    assert hits.tolist() == [1.0, 0.0] and overlap.tolist() == pytest.approx([1 / 3, 0.0])
    share, chance = chance_scores(masks)
    assert share.tolist() == [0.25] * 2 and chance.tolist() == pytest.approx([0.25 / 1.75] * 2)


def test_maps_that_say_nothing_get_what_chance_does():
    masks = torch.zeros(1, 2, 4, dtype=torch.bool)
    masks[0, 0, 0] = True
    hits, overlap = localization_scores(torch.ones(1, 2, 2), masks)
    assert hits.item() == 0.125 and overlap.item() == pytest.approx(0.125 / 1.875)


def test_chance_is_what_random_maps_reach():
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(2000, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 1:5] = True
    hits, overlap = localization_scores(torch.rand(2000, 8, 8, generator=generator), masks)
    share, chance = chance_scores(masks)
    assert hits.float().mean().item() == pytest.approx(share.mean().item(), abs=0.03)
    assert overlap.mean().item() == pytest.approx(chance.mean().item(), abs=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(image_size=32)
    config.id2label = {index: f"thing {index}, synonym {index}" for index in range(NUM_CLASSES)}
    config.label2id = {name: index for index, name in config.id2label.items()}
    LVViTForImageClassification(config).save_pretrained(folder)
    evaluation_image_processor((32, 32), 1.0).save_pretrained(folder)
    return folder


def test_localization_program(model, tmp_path, capsys):
    masked(quarter).to_parquet(tmp_path / "test.parquet")
    measure(["--model", str(model), "--dataset", str(tmp_path / "test.parquet"), "--batch_size", "2"])
    table = capsys.readouterr().out
    assert "| tiny | relevance |" in table and "| tiny | patch predictions |" in table
    assert "| tiny | chance | 25.0 | 14.3 |" in table and "5 of 5 images" in table
    masked(lambda label: np.zeros((40, 40), dtype=np.uint8) + NUM_CLASSES).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SystemExit, match="No mask of .* has the label of its image"):
        measure(["--model", str(model), "--dataset", str(tmp_path / "test.parquet")])


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        (["--mask_column_name", "masks"], 40, "no column 'masks'"),
        ([], 36, "all must have one shape"),
        (["--crop_pct", "0.9"], 40, "does not see whole images"),
        (["--model", "./nowhere"], 40, "There is no model folder"),
    ],
)
def test_unfit_data_is_refused(options, size, message, model, tmp_path):
    masked(quarter, size).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SystemExit, match=message):
        measure(["--model", str(model), "--dataset", str(tmp_path / "test.parquet"), *options])


def test_drawing_program(model, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    command = [str(tmp_path / "a.png"), "--model", str(model), str(model), "--output", str(tmp_path / "new" / "b.png")]
    draw([*command, "--classes", "thing 3, synonym 3", "5", "synonym 2", "--annotator", str(model)])
    with Image.open(tmp_path / "new" / "b.png") as image:
        assert image.width > 1200 and image.height > 500
    assert "saved to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL"], "Give --image"),
        (["nowhere.png", "--model", "MODEL"], "nowhere.png cannot be read as an image"),
        (["IMAGE", "--model", "MODEL", "--classes", "dog"], "None of 7 classes has the name 'dog'"),
        (["IMAGE", "--model", "timm/resnet18"], "cannot be evaluated"),
    ],
)
def test_errors_of_drawing(arguments, message, model, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    words = [word.replace("MODEL", str(model)).replace("IMAGE", str(tmp_path / "a.png")) for word in arguments]
    with pytest.raises(SystemExit, match=message):
        draw(words)


def test_classes_are_found_by_name_synonym_and_id():
    names = ["tench, Tinca tinca", "crane", "crane", "3"]
    assert [class_id(word, names) for word in ("Tench, tinca_tinca", "tinca tinca", "0", "2", "3")] == [0, 0, 0, 2, 3]
    with pytest.raises(ValueError, match="Several classes have the name 'crane'"):
        class_id("crane", names)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_no_text_of_a_relevance_figure_is_cut(rows, tmp_path):
    panels = [(f"relevance\nname {column}", np.full((8, 8 + 4 * column, 3), 0.5)) for column in range(3)]
    save_relevance_figure(tmp_path / "a.png", [("a_model_with_a_name_" * 3, panels)] * rows, note="a note")
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("L"))
    edges = (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:])
    assert all((edge == 255).all() for edge in edges) and pixels.min() < 100


def test_cells_that_all_lie_at_chance_are_no_riddle():
    names, shown = ["n01440764, tench", "b"], np.zeros((4, 4, 3))
    logits = torch.zeros(2, 2, 2)
    assert cells_panel(shown, logits, names, "cells")[0] == "cells\nno cell stands out: at most 50 %"
    logits[0, 0, 1] = 3.0
    assert cells_panel(shown, logits + torch.tensor([0.1, 0]), names, "cells")[0] == "cells\nmost: n01440764"


def test_two_images_are_refused(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    with pytest.raises(SystemExit, match=r"takes one image, and then models: .*b.png is no model"):
        draw([str(tmp_path / "a.png"), str(tmp_path / "b.png"), "MODEL"])
