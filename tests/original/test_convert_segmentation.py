"""The converter on segmentation checkpoints in the layout of the authors' backbone and MMSegmentation's heads."""

import shutil

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from modeling_lvvit.original.convert import convert_checkpoint, main
from modeling_lvvit.original.segmentation import OriginalSegmenter
from modeling_lvvit.variants import variant_config
from support.original_layout import recipe_values


HEADS = {"upernet": {"neck_channels": 24}, "fcn": {"neck_channels": 20}}


def original_weights(head: str, variant: str = "lvvit_s_224", divisor: float = 2.0) -> tuple[OriginalSegmenter, dict]:
    """A segmenter of 64-pixel images and 7 classes; its tensors hold the values that the recipe draws for their names."""
    settings = {"image_size": 64, "num_labels": 7, "decoder_channels": 16, "segmentation_head": head, **HEADS[head]}
    config = variant_config(variant, layer_norm_eps=1e-6, residual_divisor=divisor, **settings)
    last = config.num_hidden_layers - 1
    original = OriginalSegmenter(config, [last - 9, last - 6, last - 3, last]).eval()
    weights = {
        name: torch.from_numpy(recipe_values(name.removeprefix("backbone."), tuple(value.shape)))
        for name, value in original.state_dict().items()
    }
    original.load_state_dict(weights)
    return original, weights


@pytest.mark.parametrize("head", HEADS)
def test_segmentation_checkpoints_convert(head, tmp_path):
    """Head and auxiliary head, on an image of another size too."""
    original, weights = original_weights(head)
    layout = {"meta": {"epoch": 1, "CLASSES": ("wall", "sky")}, "state_dict": weights}
    torch.save(layout, tmp_path / "upernet.pth")
    assert convert_checkpoint(tmp_path / "upernet.pth", tmp_path / "out") < 1e-3
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").eval()
    kept = []
    model.auxiliary_decoder.register_forward_hook(lambda module, inputs, output: kept.append(output))
    pixel_values = torch.randn(2, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(pixel_values, labels=torch.zeros(2, 96, 80, dtype=torch.long))
        expected, auxiliary = original(pixel_values)
    scale = expected.abs().max().item()
    torch.testing.assert_close(output.logits, expected, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(kept[0], auxiliary, rtol=1e-3, atol=1e-4 * auxiliary.abs().max().item())
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert hasattr(processor, "post_process_semantic_segmentation") and processor.size["shortest_edge"] == 512


def test_class_names_of_the_training_are_kept(tmp_path):
    _, weights = original_weights("upernet")
    names = tuple(f"thing {index}" for index in range(7))
    for meta, expected in (({"CLASSES": names}, names[3]), ({"CLASSES": names[:2]}, "LABEL_3"), ({}, "LABEL_3")):
        torch.save({"meta": {"epoch": 1, "PALETTE": [[1, 2, 3]], **meta}, "state_dict": weights}, tmp_path / "u.pth")
        convert_checkpoint(tmp_path / "u.pth", tmp_path / expected / str(len(meta)))
        config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / expected / str(len(meta))).config
        assert config.id2label[3] == expected and config.label2id[expected] == 3
        shutil.rmtree(tmp_path / expected)


@pytest.mark.slow
def test_the_large_published_run_divided_nothing(tmp_path, capsys):
    """Its configuration leaves `skip_lam` out, and with it weights that were trained so are run."""
    _, weights = original_weights("upernet", "lvvit_l_288", divisor=1.0)
    torch.save({"state_dict": weights}, tmp_path / "upernet.pth")
    main([str(tmp_path / "upernet.pth"), str(tmp_path / "out")])
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").config
    assert (config.residual_divisor, config.layer_norm_eps) == (1.0, 1e-6)
    assert "7 classes" in capsys.readouterr().out


def test_damaged_segmentation_checkpoints_are_refused(tmp_path):
    _, weights = original_weights("upernet")
    lacking = {name: value for name, value in weights.items() if name != "decode_head.bottleneck.bn.bias"}
    torch.save({"state_dict": lacking}, tmp_path / "upernet.pth")
    with pytest.raises(ValueError, match=r"decoder.bottleneck.batch_norm.bias"):
        convert_checkpoint(tmp_path / "upernet.pth", tmp_path / "out")
    lacking = {name: value for name, value in weights.items() if name != "backbone.pos_embed"}
    torch.save({"state_dict": lacking}, tmp_path / "upernet.pth")
    with pytest.raises(ValueError, match=r"has no backbone.pos_embed"):
        convert_checkpoint(tmp_path / "upernet.pth", tmp_path / "out")
    for name in ("backbone.side_layer4.0.weight", "backbone.patch_embed.proj.weight"):
        torch.save({key: value for key, value in weights.items() if key != name}, tmp_path / "upernet.pth")
        with pytest.raises(ValueError, match=f"has no {name}"):
            convert_checkpoint(tmp_path / "upernet.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoints_without_an_auxiliary_head_convert(tmp_path):
    _, weights = original_weights("upernet")
    rest = {name: value for name, value in weights.items() if not name.startswith("auxiliary_head.")}
    torch.save({"state_dict": rest}, tmp_path / "upernet.pth")
    assert convert_checkpoint(tmp_path / "upernet.pth", tmp_path / "out") < 1e-3
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").auxiliary_decoder is None
