"""Photographs with dense labels and predictions by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit.data.classes.class_matching import shown_names
from modeling_lvvit.visualization.photographs import NUM_NAMED, main, map_panel
from support.models import save_tiny_lvvit


def test_wordnet_ids_become_names_and_others_stay():
    assert shown_names(["n02123045", "my n02123045", "dog, hound"]) == ["tabby", "my n02123045", "dog"]


def test_largest_classes_are_named_and_keep_their_colors():
    """2 x 4 cells: four of class 2, two of class 0, one of class 1, and one of which the classifier is unsure."""
    scores = torch.full((5, 2, 4), -20.0)
    for cell, index in enumerate([2, 2, 0, 1, 2, 2, 0]):
        scores[index, cell // 4, cell % 4] = 20.0
    scores[:, 1, 3] = 0.0
    annotator = SimpleNamespace(
        preprocessing=lambda image: (torch.zeros(3, 2, 4), None), score_map=lambda x: scores[None]
    )
    colors = {"b": 0}
    panel = map_panel(annotator, list("abcde"), Image.new("RGB", (40, 20), "white"), None, colors)
    assert [name for name, _ in panel.legend] == ["c", "a", "b"]
    assert colors == {"b": 0, "c": 1, "a": 2}
    painted = panel.painted[5::10, 5::10]  # the middle of each cell
    assert np.allclose(painted[0, 0], painted[1, 1])
    assert not np.allclose(painted[0, 0], painted[0, 2])
    assert np.ptp(painted[1, 3]) == pytest.approx(0, abs=1e-6)  # gray
    assert len(panel.legend) <= NUM_NAMED


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_program_draws_images_of_any_shape(ending, tmp_path, capsys):
    model = save_tiny_lvvit(tmp_path / "model", ["n02123045", "dog", "cup"])
    images = [tmp_path / "wide.png", tmp_path / "high.png"]
    for path, size in zip(images, ((60, 40), (30, 90))):
        Image.effect_noise(size, 80).convert("RGB").save(path)
    output = tmp_path / f"figure.{ending}"
    main([*map(str, images), "--annotator", str(model), "--models", str(model), "--output_file", str(output)])
    assert Image.open(output).format == {"png": "PNG", "jpg": "JPEG"}[ending]
    assert "saved to" in capsys.readouterr().out
    (tmp_path / "no image.png").write_text("text")
    with pytest.raises(SystemExit, match="no image.png cannot be read"):
        main([str(tmp_path / "no image.png"), "--annotator", str(model)])
