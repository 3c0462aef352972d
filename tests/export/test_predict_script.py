"""What the exported `predict.py` says of images and options that it cannot use, before any work."""

import sys

import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.export import predict
from support.image_files import COLORS, encode, raw_tiff


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """Runs the script in an empty folder with a model of gray levels: output, or the message with which it ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    (tmp_path / "image.png").write_bytes(encode(Image.fromarray(COLORS), "PNG"))

    class GrayLevels:
        is_classifier = True

        def __init__(self, folder, file=None):
            pass

        def best_classes(self, image, count):
            return [(f"level {np.asarray(image).mean():.0f}", 1.0)][:count]

        def classes_of_pixels(self, image):
            return np.asarray(image)[..., 0] // 128

        def name(self, index):
            return str(index)

    monkeypatch.setattr(predict, "Model", GrayLevels)

    def run(*arguments: str, is_classifier: bool = True) -> str:
        GrayLevels.is_classifier = is_classifier
        monkeypatch.setattr(sys, "argv", ["predict.py", *arguments])
        try:
            predict.main()
        except SystemExit as end:
            assert end.code
        printed = capsys.readouterr()
        return printed.err or printed.out

    return run


def test_script_names_what_is_wrong_with_images(script, tmp_path):
    (tmp_path / "float.tif").write_bytes(raw_tiff(np.ones((4, 4), dtype="<f4"), sample_format=3))
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "deep.tif").write_bytes(raw_tiff(np.full((4, 4), 257 * 99, dtype="<u2")))
    assert "float.tif: floating-point pixels have no agreed range" in script("float.tif")
    assert script("text.jpg") == "text.jpg: cannot identify image file\n"
    assert "gone.png: [Errno 2]" in script("gone.png")
    assert "level 99" in script("deep.tif")


def test_script_takes_large_images_on_request(script, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "exceeds limit of 200 pixels; --max_image_pixels allows more" in script("image.png")
    assert "level" in script("image.png", "--max_image_pixels", "864")
    assert "exceeds limit" in script("image.png", "--max_image_pixels", "800")


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_script_refuses_numbers_below_one(number, script):
    for option in ("--top", "--max_image_pixels"):
        assert f"argument {option}: expected a number of at least 1, got {number}" in script(
            "image.png", option, number
        )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("gone/x.png", "--output: there is no folder gone"),
        ("x.jpg", "--output: images of classes are saved as .png, got .jpg"),
        ("x.xyz", "got .xyz"),
        ("x", "got no ending"),
        ("image.png", "--output: name a new file"),
        (".", "--output: name a new file"),
    ],
)
def test_script_finds_outputs_that_cannot_be_written_before_the_work(output, message, script, monkeypatch):
    monkeypatch.setattr(predict.Model, "classes_of_pixels", None)
    assert message in script("image.png", "--output", output, is_classifier=False)


def test_script_writes_classes(script, tmp_path):
    assert "saved classes.png" in script("image.png", "--output", "classes.png", is_classifier=False)
    with Image.open(tmp_path / "classes.png") as image:
        np.testing.assert_array_equal(np.asarray(image), COLORS[..., 0] // 128)
    assert "the model is a classifier" in script("image.png", "--output", "x.png")


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_classes_have_probabilities_of_their_own_where_an_image_may_have_several(is_multi_label):
    model = object.__new__(predict.Model)
    model.names, model.is_multi_label = {0: "cat", 1: "dog", 2: "eel"}, is_multi_label
    model.logits = lambda image: np.log(np.array([3.0, 1.0, 1 / 3], dtype=np.float32))
    names, shares = zip(*model.best_classes(Image.fromarray(COLORS), 2))
    assert names == ("cat", "dog")
    assert shares == pytest.approx((0.75, 0.5) if is_multi_label else (9 / 13, 3 / 13))
    model.logits = lambda image: np.array([-2000.0, 2000.0, 0.0], dtype=np.float32)
    assert model.best_classes(Image.fromarray(COLORS), 1) == [("dog", 1.0)]
