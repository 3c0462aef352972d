"""The demo: what it says of an image, the page as a program uses it, and the folder for a Space."""

import io
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as metadata_version
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import numpy as np
import pytest
import torch
import yaml
from gradio_client import Client, handle_file
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, SegformerImageProcessor

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.demo import space as space_module
from modeling_lvvit.demo.__main__ import main
from modeling_lvvit.demo.explanation import Explainer, annotated
from modeling_lvvit.demo.page import build_page, build_segmentation_page, read_image
from modeling_lvvit.demo.segmentation import Segmenter, is_segmentation_model
from modeling_lvvit.demo.space import export_space
from modeling_lvvit.variants import evaluation_image_processor
from support.models import tiny_config


NAMES = {0: "tabby, tabby cat", 1: "tiger", 2: "crane", 3: "crane", 4: "drake"}


def save_model(folder: Path, **overrides) -> str:
    config = tiny_config(num_labels=len(NAMES), id2label=NAMES, **overrides)
    torch.manual_seed(0)
    model = LVViTForImageClassification(config)
    torch.nn.init.normal_(model.patch_classifier.weight)  # cells that are sure of something
    model.save_pretrained(folder)
    evaluation_image_processor((32, 48), 1.0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path) -> str:
    return save_model(tmp_path / "model")


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8))


def test_explanation_of_a_class(folder, image):
    explainer = Explainer(folder)
    assert (
        "LVViTForImageClassification" in explainer.description and "5 classes, 32 x 48 pixels" in explainer.description
    )
    assert explainer.probabilities(image).sum().item() == pytest.approx(1)
    one, other = (explainer.explain(image, index) for index in (0, 1))
    assert one.relevance.shape == one.attention.shape == (320, 480, 3) and one.relevance.dtype == np.uint8
    assert (one.relevance != other.relevance).any() and (one.attention == other.attention).all()
    assert one.note == ""
    (shown, sections), note = explainer.cells(image)
    assert note == "" and all(mask.shape == shown.shape[:2] for mask, _ in sections)


def test_model_that_was_trained_with_plain_labels_still_has_cells(tmp_path, image):
    explainer = Explainer(save_model(tmp_path / "model", patch_logits_weight=0.0))
    assert explainer.cells(image)[0] is not None


def test_cells_at_chance_are_explained_and_wordnet_ids_have_names(tmp_path, image):
    explainer = Explainer(save_model(tmp_path / "model"))
    explainer.classifier.class_names[:2] = ["n01440764", "n02012849"]
    explainer._dense.score_map = lambda pixels: torch.zeros(1, 5, 4, 6)
    (_, sections), note = explainer.cells(image)
    assert sections == [] and note == "Cells: no cell stands out: at most 20 %."
    assert explainer.distinct_names[0] == "tench, Tinca tinca"


def test_model_without_class_token_says_what_is_missing(tmp_path, image):
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
    ResNetForImageClassification(ResNetConfig(**shape, num_labels=5, id2label=NAMES)).save_pretrained(tmp_path)
    evaluation_image_processor((64, 64), 1.0).save_pretrained(tmp_path)
    explainer = Explainer(str(tmp_path))
    found = explainer.explain(image, 0)
    assert found.relevance is None and found.note.startswith("No relevance: ")
    assert explainer.cells(image)[0] is not None


def test_cells_of_the_strongest_classes_come_first():
    ids, strengths = np.array([[0, 1], [1, 2]]), np.array([[0.4, 0.5], [0.3, 0.0]])
    image, sections = annotated(np.zeros((4, 4, 3)), ids, strengths, ["a", "b", "c"])
    assert [name for _, name in sections] == ["b 50 %", "a 25 %"]  # c is at chance
    assert sections[0][0][0, 3] == pytest.approx(0.5) and sections[0][0][3, 3] == 0


def test_segmentation_model_paints_classes(tmp_path, image):
    config = tiny_config(segmentation_head="fcn", num_hidden_layers=4, num_labels=len(NAMES), id2label=NAMES)
    LVViTForSemanticSegmentation(config).save_pretrained(tmp_path)
    SegformerImageProcessor(do_resize=True, size={"shortest_edge": 32}).save_pretrained(tmp_path)
    assert is_segmentation_model(str(tmp_path))
    segmenter = Segmenter(str(tmp_path))
    assert segmenter.settings.window == (32, 48) and segmenter.settings.short_side == 32
    shown, sections = segmenter.segment(image)
    assert shown.shape == (40, 70, 3)
    assert sum((mask > 0).astype(int) for mask, _ in sections).tolist() == np.ones((40, 70), int).tolist()
    build_segmentation_page(segmenter)


@pytest.fixture
def client(folder):
    page = build_page(Explainer(folder))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield Client(url, verbose=False)
    page.close()


def test_page_classifies_and_explains(client, image, tmp_path):
    image.save(tmp_path / "scene.png")
    file = handle_file(str(tmp_path / "scene.png"))
    best, dropdown, relevance, attention, cells, notes = client.predict(file, api_name="/classify")
    assert len(best["confidences"]) == 5 and best["label"] == dropdown["choices"][0][0]
    assert {"crane [2]", "crane [3]", "tiger"} < {label for label, _ in dropdown["choices"]}
    assert Path(relevance).is_file() and Path(attention).is_file() and cells["annotations"] and not notes
    other = client.predict(file, dropdown["choices"][1][1], api_name="/relevance")
    assert Path(other).read_bytes() != Path(relevance).read_bytes()


def test_page_says_that_a_file_is_no_image(client, tmp_path):
    for name, content in (("notes.png", b"not an image"), ("cut.jpg", _jpeg()[:200])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Exception, match=f"{name} cannot be read as an image"):
            client.predict(handle_file(str(tmp_path / name)), api_name="/classify")


def test_page_opens_uploaded_files_only(client, image, tmp_path):
    image.save(tmp_path / "private.png")
    for path in (str(tmp_path / "private.png"), "/etc/hostname", "http://127.0.0.1:9/a.png"):
        with pytest.raises(gr.Error, match="Upload an image first"):
            read_image(SimpleNamespace(path=path, orig_name=None))
    assert read_image(None) is None


def test_relevance_alone(client, image, tmp_path):
    image.save(tmp_path / "scene.png")
    assert Path(client.predict(handle_file(str(tmp_path / "scene.png")), 1, api_name="/relevance")).is_file()


def test_names_that_look_alike_are_numbered(folder):
    explainer = Explainer(folder)
    explainer.classifier.class_names = ["crane", "crane", "crane [0]", "", ", odd"]
    assert explainer.distinct_names == ["crane [0]", "crane [1]", "crane [0] [2]", " [3]", " [4]"]


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_space_has_program_package_requirements_and_model(folder, tmp_path, capsys):
    space = tmp_path / "space"
    (Path(folder) / "checkpoint-3").mkdir()
    main(["--model", folder, "--export_space", str(space)])
    assert "saved to" in capsys.readouterr().out
    card = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["title"] == "model"
    requirements = (space / "requirements.txt").read_text()
    assert "torch" in requirements and "gradio==" in requirements and "pytest" not in requirements
    assert (space / "model" / "model.safetensors").is_file() and not (space / "model" / "checkpoint-3").exists()
    assert not list(space.rglob("__pycache__")) and not list(tmp_path.glob(".space*"))
    for inside in (Path(folder) / "space", Path(folder).parent):
        with pytest.raises(SystemExit, match="lie in one another"):
            main(["--model", folder, "--export_space", str(inside)])
    with pytest.raises(SystemExit, match="there is something already"):
        main(["--model", folder, "--export_space", str(space)])


def test_page_alone_needs_gradio(folder, tmp_path, monkeypatch):
    def absent(name: str) -> str:
        if name == "gradio":
            raise PackageNotFoundError(name)
        return metadata_version(name)

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "modeling_lvvit.demo.page", raising=False)
    monkeypatch.setattr(space_module, "version", absent)
    main(["--model", folder, "--export_space", str(tmp_path / "space")])
    requirements = (tmp_path / "space" / "requirements.txt").read_text()
    assert (
        re.search(r"^gradio[<>]", requirements, re.MULTILINE)
        and "sdk_version" not in (tmp_path / "space" / "README.md").read_text()
    )
    with pytest.raises(SystemExit, match=r'pip install "modeling-lvvit\[demo\]"'):
        main(["--model", folder])


@pytest.mark.slow
def test_space_runs_from_its_own_files(folder, tmp_path):
    export_space(folder, tmp_path / "space")
    code = "import app, modeling_lvvit; from modeling_lvvit.demo.explanation import Explainer\n"
    code += "print(modeling_lvvit.__file__, len(Explainer('model').class_names))"
    environment = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": ""}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path / "space", env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(tmp_path / "space" / "modeling_lvvit" / "__init__.py"), "5"]


def test_missing_model_ends_with_a_message(tmp_path):
    with pytest.raises(SystemExit, match="There is no model folder"):
        main(["--model", str(tmp_path / "nothing")])
