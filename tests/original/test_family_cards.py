"""The cards of the published family: against the table of sizes, as cards of the Hub, and their examples."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from modeling_lvvit import LVViTConfig, LVViTForSemanticSegmentation
from modeling_lvvit.benchmark.published.results import LVVIT_NOTES
from modeling_lvvit.original.convert import main as convert
from modeling_lvvit.original.family_cards import (
    ONLY_IN_REPOSITORY,
    Conversion,
    converted_card,
    family_card,
    is_released,
)
from modeling_lvvit.original.segmentation import OriginalSegmenter
from modeling_lvvit.variants import RELEASES, SEGMENTERS, VARIANTS, published_row, variant_config
from support.original_layout import original_state_dict, recipe_values


CARDS = Path(__file__).parents[2] / "model_cards"


ROWS = [*VARIANTS, *SEGMENTERS]
EXAMPLES_ALWAYS_RUN = {"lvvit_t_224", "lvvit_s_224", "lvvit_s_384", "lvvit_m_224", "lvvit_l_288", "upernet_s"}
MEASURES = {"top-1 accuracy": "published_top1", "ReaL top-1 accuracy": "published_real_top1"}
MEASURES |= {"mean IoU": "published_miou", "mean IoU, several scales": "published_multi_scale_miou"}
MEASURES |= {"pixel accuracy, several scales": "published_multi_scale_accuracy"}


def committed(name: str) -> str:
    return (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ROWS)
def test_card_says_what_the_table_says(name):
    """To write them again: python -m modeling_lvvit.family_cards."""
    assert committed(name) == f"{family_card(name)}\n"
    row = VARIANTS.get(name) or SEGMENTERS[name]
    card = ModelCard(committed(name))
    found = {MEASURES[result.metric_name]: result.metric_value for result in card.data.eval_results}
    expected = {field: getattr(row, field) for field in MEASURES.values() if getattr(row, field, None) is not None}
    assert {field: round(100 * value, 1) for field, value in found.items()} == expected
    figures = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (published|counted here) \|$", card.text, flags=re.MULTILINE))
    assert set(figures.values()) == {"published", "counted here"}
    assert f"{row.num_parameters:,}" in card.text
    if row.checkpoint is None:
        assert "released no weights" in card.text and "lvvit convert" not in card.text
    else:
        assert f"wget {RELEASES}/{row.checkpoint}" in card.text
        assert f"lvvit convert {row.checkpoint.rpartition('/')[2]} {name}" in card.text


@pytest.mark.parametrize("name", ROWS)
def test_card_is_one_of_the_hub(name, hub):
    card = ModelCard(committed(name))
    card.validate()
    data = card.data
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.pipeline_tag == ("image-segmentation" if name in SEGMENTERS else "image-classification")
    again = model_index_to_eval_results(data.to_dict()["model-index"])[1]
    assert again == data.eval_results and all("published" in result.source_name for result in again)
    assert data.metrics == sorted({result.metric_type for result in again})
    for result in again:  # a figure that the paper lacks is not said to be from it
        is_elsewhere = (name, result.metric_name) in ONLY_IN_REPOSITORY
        assert ("repository" in result.source_name) == is_elsewhere
        assert not is_elsewhere or "the paper has none" in card.text
    for title in (
        "Use",
        "Figures",
        "Where the weights come from",
        "Intended use",
        "Limitations",
        "Environmental note",
    ):
        assert f"\n## {title}\n" in card.text
    assert "\n## License\n" in card.text and "@inproceedings{jiang2021all" in card.text


def test_every_card_has_a_row():
    others = {"comparison", "photographs"}
    assert {path.stem for path in CARDS.glob("*.md")} == {*ROWS, *others}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_parameters_of_segmenters(name):
    row = SEGMENTERS[name]
    settings = {"num_labels": 150, "image_size": 512, "decoder_channels": row.decoder_channels}
    config = variant_config(row.backbone, **settings)
    with torch.device("meta"):
        assert LVViTForSemanticSegmentation(config).num_parameters() == row.num_parameters
    assert abs(row.num_parameters / 1e6 - row.published_millions) < 0.6
    assert published_row(config, is_segmenter=True) == name


def test_rows_are_recognized_by_their_configuration():
    assert all(published_row(variant_config(name), is_segmenter=False) == name for name in VARIANTS)
    for other in ({"num_labels": 10}, {"image_size": 240}, {"patch_size": 8}, {"hidden_size": 390}):
        assert published_row(variant_config("lvvit_s_224", **other), is_segmenter=False) is None
    assert published_row(variant_config("lvvit_s_224", num_labels=21), is_segmenter=True) is None


def test_notes_of_the_comparison_are_on_the_cards():
    assert set(LVVIT_NOTES) <= set(VARIANTS)
    assert "16.0 billion multiply-adds do not follow" in committed("lvvit_m_224")


def test_rows_are_claimed_for_files_that_the_authors_released_only():
    assert is_released("lvvit_s_224", "lvvit_s-26M-224-83.3.pth.tar") and is_released(
        "upernet_m", "upernet_lvvit_m.pth"
    )
    assert not is_released("lvvit_s_224", "model_best.pth.tar") and not is_released("lvvit_l_288", "lvvit_l.pth")
    assert not is_released(None, "lvvit_t.pth")
    conversion = Conversion("model_best.pth.tar", "0" * 64, 1e-6)
    for is_segmenter in (False, True):
        card = converted_card(variant_config("lvvit_s_224"), "mine", is_segmenter, conversion)
        assert card.data.eval_results is None and card.data.license is None and card.data.datasets is None
        for claim in ("ImageNet", "ADE20K", "authors trained", "authors' file", "83.3", "trained with a soft label"):
            assert claim not in card.text
        assert "`model_best.pth.tar` (SHA-256" in card.text and 'name = "mine"' in card.text


def checkpoint_of(name: str) -> dict[str, torch.Tensor]:
    """Tensors of the authors' layout for a row."""
    if name in VARIANTS:
        return original_state_dict(variant_config(name))
    row = SEGMENTERS[name]
    divisor = {"residual_divisor": 1.0} if name == "upernet_l" else {}
    settings = {"num_labels": 150, "decoder_channels": row.decoder_channels, "layer_norm_eps": 1e-6, **divisor}
    config = variant_config(row.backbone, **settings)
    last = config.num_hidden_layers - 1
    with torch.device("meta"):
        shapes = OriginalSegmenter(config, [last - 9, last - 6, last - 3, last]).state_dict()
    return {
        key: torch.from_numpy(recipe_values(key.removeprefix("backbone."), tuple(value.shape)))
        for key, value in shapes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_example_of_the_card_runs_on_a_converted_model(name, tmp_path, monkeypatch, capsys):
    """All rows take two minutes: `ALL_CARDS=1 pytest tests/test_family_cards.py`; else one of each architecture."""
    if name not in EXAMPLES_ALWAYS_RUN and not os.environ.get("ALL_CARDS"):
        pytest.skip("runs with ALL_CARDS=1")
    monkeypatch.chdir(tmp_path)
    checkpoint = ((VARIANTS.get(name) or SEGMENTERS[name]).checkpoint or "mine.pth").rpartition("/")[2]
    torch.save({"state_dict": checkpoint_of(name)}, checkpoint)
    convert([checkpoint, name])
    printed = capsys.readouterr().out
    assert name in SEGMENTERS or f"{name}, 1000 classes" in printed
    assert float(printed.split()[-1]) < (1e-3 if name in SEGMENTERS else 5e-5)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(image).save("image.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", committed(name), flags=re.DOTALL)
    exec(example, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.fullmatch(r".+ [0-9.]+ %", line) for line in lines)
    assert len(lines) == 5 or name in SEGMENTERS
    config = LVViTConfig.from_pretrained(name)
    assert name in SEGMENTERS or config.id2label[1] == "goldfish"
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert "(SHA-256 `" in card and ("the authors' file" in card) == (checkpoint != "mine.pth")
