"""Exported folders give the same predictions with transformers.js, in Node and in a browser, as ONNX Runtime gives in Python.

transformers.js is downloaded once into the user's cache by npm (500 MB on the disk); `TRANSFORMERS_JS` names a folder that has its
`node_modules`. Without a network, Node or Chromium the tests are skipped.
"""

import json
import os
import shutil
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import BaseImageProcessor

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.export.__main__ import main
from modeling_lvvit.variants import evaluation_image_processor
from support.models import tiny_config


pytestmark = pytest.mark.slow
predict = pytest.importorskip("modeling_lvvit.export.predict")
onnxruntime = pytest.importorskip("onnxruntime")
VERSION = "4.3.2"
LIBRARY = Path("node_modules", "@huggingface", "transformers", "dist", "transformers.node.mjs")
SCRIPTS = Path(__file__).parent / "transformers_js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIME = 300  # seconds that a program may take
ORIENTATION = 0x112
BOUND = {"float32": 1e-4, "float16": 5e-3}  # of probabilities
DTYPES = {"float32": ("fp32", "model.onnx"), "float16": ("fp16", "model_fp16.onnx")}
CLASSES = {index: f"class {index}" for index in range(7)}
SEGMENTATION = {"num_hidden_layers": 4, "neck_channels": 16, "decoder_channels": 8}


@pytest.fixture(scope="module")
def packages() -> Path:
    """Folder with `node_modules`; the test is skipped where there is none and it cannot be downloaded."""
    if shutil.which("node") is None:
        pytest.skip("there is no Node (program node)")
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvvit-tests"
    folder = Path(os.environ.get("TRANSFORMERS_JS") or store / f"transformers-js-{VERSION}")
    if not (folder / LIBRARY).is_file():
        store.mkdir(parents=True, exist_ok=True)
        # filled next to its final place and then renamed, so that an interrupted run leaves no half copy
        with tempfile.TemporaryDirectory(dir=store) as temporary:
            # without the packages' own scripts, which download more than a processor needs
            command = [
                "npm",
                "install",
                "--no-save",
                "--no-package-lock",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
            ]
            command += [
                "--fetch-retries",
                "1",
                "--prefix",
                f"{temporary}/packages",
                f"@huggingface/transformers@{VERSION}",
            ]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=2 * TIME)
                Path(temporary, "packages").rename(folder)
            except (OSError, subprocess.SubprocessError) as error:
                if not (folder / LIBRARY).is_file():  # where it is, another process was faster
                    detail = str(getattr(error, "stderr", None) or error).strip().partition("\n")[0]
                    pytest.skip(f"transformers.js {VERSION} could not be downloaded ({detail})")
    return folder


def in_node(packages: Path, job: dict, models: Path) -> dict:
    """What `predictions.mjs` gives in Node."""
    paths = {**job, "images": [str(models.parent / "images" / name) for name in job["images"]]}
    command = ["node", SCRIPTS / "node.mjs", packages / LIBRARY, models, json.dumps(paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_browser(packages: Path, job: dict, models: Path) -> dict:
    """What `predictions.mjs` gives in a page in headless Chromium, which reaches this process alone."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no Chromium (program {', '.join(BROWSERS)})")
    folders = {"models": models, "images": models.parent / "images", "page": SCRIPTS}
    folders["node_modules"] = packages / "node_modules"
    paths = {**job, "images": [f"/images/{name}" for name in job["images"]]}
    with served(folders, paths) as (port, answers), tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            f"--user-data-dir={profile}/user",
        ]
        command += [
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"http://127.0.0.1:{port}/page/page.html",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert answers.arrived.wait(TIME), "the page sent nothing"
        finally:
            process.terminate()
            process.wait(TIME)
    assert "error" not in answers.content, answers.content["error"]
    return answers.content


class Answers:
    """What the page sent."""

    def __init__(self):
        self.arrived, self.content = threading.Event(), {}


@contextmanager
def served(folders: dict[str, Path], job: dict):
    """A server on this machine with folders by the first part of the path, and a job: its port, and what is sent to it."""
    answers = Answers()

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

        def translate_path(self, path: str) -> str:
            first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
            return str(folders.get(first, Path("nowhere")) / rest)

        def do_GET(self) -> None:
            if self.path == "/job":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(job).encode())
            else:
                super().do_GET()

        def do_POST(self) -> None:
            answers.content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            answers.arrived.set()

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, answers
        server.shutdown()


PROGRAMS = {"node": in_node, "browser": in_browser}


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Colors that change slowly, with noise."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray(np.uint8((np.asarray(blobs) + rng.normal(0, 8, (height, width, 3))).clip(0, 255)))


def write_images(folder: Path) -> list[str]:
    """Ten images of several sizes, orientations, colors and formats; their names."""
    folder.mkdir()
    turned = {orientation: Image.Exif() for orientation in (3, 6)}
    for orientation, exif in turned.items():
        exif[ORIENTATION] = orientation
    photograph(120, 90, 0).save(folder / "plain.jpg", quality=90)
    photograph(90, 120, 1).save(folder / "full_color.jpg", quality=95, subsampling=0, progressive=True)
    photograph(121, 75, 2).save(folder / "on_its_side.jpg", exif=turned[6])
    photograph(80, 60, 3).save(folder / "upside_down.jpg", exif=turned[3])
    photograph(100, 70, 4).convert("L").save(folder / "gray.jpg")
    photograph(100, 70, 5).quantize(32).save(folder / "palette.png")
    photograph(20, 30, 6).save(folder / "tiny.png")
    photograph(3000, 2000, 7).save(folder / "large.jpg")
    photograph(400, 30, 8).save(folder / "wide.png")
    photograph(50, 70, 9).save(folder / "plain.webp", lossless=True)
    return sorted(path.name for path in folder.iterdir())


def export(model: nn.Module, processor: BaseImageProcessor, folder: Path, *options: str) -> Path:
    """Exports a model into a new folder of models, next to which images are."""
    model.config.id2label, model.config.label2id = CLASSES, {name: index for index, name in CLASSES.items()}
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    main([str(folder / "saved"), str(folder / "models" / "exported"), *options])
    return folder / "models"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, list[str]]:
    """Folder of models, and the names of images on which the model says different classes."""
    folder = tmp_path_factory.mktemp("classifier")
    names = write_images(folder / "images")
    torch.manual_seed(0)
    model, processor = LVViTForImageClassification(tiny_config()).eval(), evaluation_image_processor((32, 48), 0.8)
    images = [predict.read_image(folder / "images" / name) for name in names]
    with torch.no_grad():
        logits = model(processor(images, return_tensors="pt")["pixel_values"]).logits
        scale = 2 / logits.std(0).mean()
        for head in (model.classifier, model.patch_classifier):
            head.weight *= scale
        model.classifier.bias -= scale * logits.mean(0)
    return export(model, processor, folder, "--dtype", *DTYPES), names


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("segmenter")
    write_images(folder / "images")
    torch.manual_seed(0)
    model = LVViTForSemanticSegmentation(tiny_config(**SEGMENTATION))
    models = export(model, evaluation_image_processor((32, 48), 0.8), folder)
    return models, ["gray.jpg", "on_its_side.jpg", "tiny.png"]


def expected_shares(models: Path, name: str, file: str) -> dict[str, float]:
    """Probabilities in Python, of an image read as the script next to the model does."""
    image = predict.read_image(models.parent / "images" / name)
    session = onnxruntime.InferenceSession(models / "exported" / "onnx" / file, providers=["CPUExecutionProvider"])
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None]
    shares = torch.tensor(session.run(["logits"], {"pixel_values": pixels})[0][0]).softmax(-1)
    return {CLASSES[index]: share for index, share in enumerate(shares.tolist())}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_are_those_of_python(program, dtype, classifier, packages):
    models, images = classifier
    job = {"name": "exported", "task": "image-classification", "images": images}
    job |= {} if dtype == "float32" else {"dtype": DTYPES[dtype][0]}  # float32 is what the folder asks for
    found = PROGRAMS[program](packages, job, models)
    assert found["warnings"] == []
    expected = [expected_shares(models, name, DTYPES[dtype][1]) for name in images]
    for name, answer, shares in zip(images, found["answers"], expected, strict=True):
        assert answer == pytest.approx(shares, rel=0, abs=BOUND[dtype]), name
    assert len({max(shares, key=shares.get) for shares in expected}) > 2  # the images are told apart


@pytest.mark.parametrize("program", PROGRAMS)
def test_classes_of_pixels_are_those_of_python(program, segmenter, packages):
    models, images = segmenter
    found = PROGRAMS[program](packages, {"name": "exported", "task": "image-segmentation", "images": images}, models)
    assert found["warnings"] == []
    script = predict.Model(models / "exported")
    for name, answer in zip(images, found["answers"], strict=True):
        expected = script.classes_of_pixels(predict.read_image(models.parent / "images" / name))
        classes = np.reshape(answer["classes"], (answer["height"], answer["width"]))
        assert classes.shape == expected.shape and (classes == expected).mean() > 0.99, name
