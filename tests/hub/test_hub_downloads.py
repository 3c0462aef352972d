"""What was published, loaded by somebody else: a fresh process with a fresh cache that cannot find this package."""

import io
import json
import os
import pickle
import pickletools
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from transformers import AutoImageProcessor
from transformers_versions import NAMES, run_client, save_models, upload

from modeling_lvvit import LVViTForImageClassification, LVViTForSemanticSegmentation
from modeling_lvvit.hub.repository import HubTarget
from modeling_lvvit.publish import publish_folder
from modeling_lvvit.variants import evaluation_image_processor
from support.images import encode_image, labelled_table
from support.label_sets import layout_of, random_maps, table_of, write_label_set
from support.local_hub import local_hub
from support.models import tiny_config
from support.programs import ROOT
from support.trainers import trainer_for


pytestmark = pytest.mark.slow
DOWNLOAD_TIMEOUT = 300  # seconds
CLIENT = """
import json, sys

sys.modules["modeling_lvvit"] = None  # what is installed here must not help
import torch, transformers
from datasets import load_dataset
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    AutoModelForSemanticSegmentation, pipeline,
)

name, other, image = "user/net", "user/segmenter", Image.open(sys.argv[1])
trusted = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(name, **trusted)
processor = AutoImageProcessor.from_pretrained(name, **trusted)
pixels = processor(image, return_tensors="pt")["pixel_values"]
classifier = AutoModelForImageClassification.from_pretrained(name, **trusted).eval()
with torch.no_grad():
    found = {
        "pixels": pixels,
        "logits": classifier(pixels).logits,
        "tokens": AutoModel.from_pretrained(name, **trusted).eval()(pixels).last_hidden_state,
        "map": AutoBackbone.from_pretrained(name, **trusted).eval()(pixels).feature_maps[-1],
        "classes": AutoModelForSemanticSegmentation.from_pretrained(other, **trusted).eval()(pixels).logits,
    }
scores = {each["label"]: each["score"] for each in pipeline("image-classification", model=name, top_k=7, **trusted)(image)}
found["scores"] = torch.tensor([scores[config.id2label[index]] for index in range(7)])
torch.save(found, sys.argv[2])
labels = load_dataset("user/labels", split="train", **trusted)
print(json.dumps([transformers.__version__, config.model_type, len(labels), type(classifier).__module__]))
"""
DISTRUSTFUL = """
import sys

sys.modules["modeling_lvvit"] = None
from transformers import (
    AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForSemanticSegmentation, pipeline,
)

for load, name in (
    (AutoConfig.from_pretrained, "user/net"),
    (AutoModel.from_pretrained, "user/net"),
    (AutoModelForImageClassification.from_pretrained, "user/net"),
    (AutoBackbone.from_pretrained, "user/net"),
    (AutoModelForSemanticSegmentation.from_pretrained, "user/segmenter"),
    (lambda name, **options: pipeline("image-classification", model=name, **options), "user/net"),
):
    for options in ({}, {"trust_remote_code": False}):
        try:
            load(name, **options)
        except ValueError as error:
            assert "contains custom code" in str(error) and "trust_remote_code=True" in str(error), error
        else:
            sys.exit(f"{load} ran code that no one allowed")
assert not [module for module in sys.modules if module.startswith("transformers_modules.")]
print("refused")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A hub with a trained classifier, a segmentation model and a label set, and the folders that they came from."""
    folder = tmp_path_factory.mktemp("published")
    with local_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        publish_all(folder)
        yield hub, folder


def publish_all(folder: Path) -> None:
    rows = datasets.Dataset(labelled_table())
    options = {
        "push_to_hub": True,
        "hub_model_id": "user/net",
        "hub_token": "hf_test",
        "max_steps": 3,
        "ema_decay": 0.5,
    }
    options |= {"save_strategy": "steps", "save_steps": 1, "hub_strategy": "every_save", "hub_always_push": True}
    torch.manual_seed(0)
    trainer = trainer_for(LVViTForImageClassification(tiny_config()), rows, folder / "net", **options)
    processor = trainer.processing_class = evaluation_image_processor((32, 48), 0.9)
    trainer.train()
    trainer.push_to_hub()
    settings = {"num_hidden_layers": 4, "neck_channels": 16, "decoder_channels": 8, "pool_scales": (1, 2)}
    segmenter = LVViTForSemanticSegmentation(tiny_config(**settings))
    segmenter.save_pretrained(folder / "segmenter")
    processor.save_pretrained(folder / "segmenter")
    (folder / "segmenter" / "README.md").write_text("# Segmenter")
    publish_folder(folder / "segmenter", HubTarget("user/segmenter", token="hf_test").open())
    maps = random_maps(20)
    write_label_set(folder / "labels", table_of(maps), layout_of(maps))
    publish_folder(folder / "labels", HubTarget("user/labels", "dataset", token="hf_test").open())


def run(code: str, hub, home: Path, *arguments: str, **environment: str) -> str:
    """Output of a fresh Python process with a fresh cache, started elsewhere."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=home,
        env={**hub.environment(home / "hf"), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}\nunknown routes: {hub.unknown}"
    return done.stdout.strip().rpartition("\n")[2]


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.jpg"
    rng = np.random.default_rng(3)
    path.write_bytes(encode_image(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)))
    return path


def check_loaded(published, image: Path, home: Path, **environment: str) -> str:
    """Loads everything in a fresh process and compares it with what was published; returns the version of transformers."""
    hub, folder = published
    version, model_type, num_rows, module = json.loads(
        run(CLIENT, hub, home, str(image), str(home / "out.pt"), **environment)
    )
    assert (model_type, num_rows) == ("lvvit", 20) and module.startswith("transformers_modules.user.net.")
    found = torch.load(home / "out.pt", weights_only=True)
    pixels = AutoImageProcessor.from_pretrained(folder / "net")(Image.open(image), return_tensors="pt")["pixel_values"]
    classifier = LVViTForImageClassification.from_pretrained(folder / "net").eval()
    segmenter = LVViTForSemanticSegmentation.from_pretrained(folder / "segmenter").eval()
    with torch.no_grad():
        outputs, tokens = classifier(pixels), classifier.lvvit(pixels).last_hidden_state
        expected = {"pixels": pixels, "logits": outputs.logits, "tokens": tokens, "classes": segmenter(pixels).logits}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(found["map"], tokens[:, 1:].mT.unflatten(2, (4, 6)))
    torch.testing.assert_close(found["scores"], outputs.logits.softmax(-1)[0])
    return version


def test_everything_is_loaded_by_name_with_equal_logits(published, image, tmp_path):
    assert check_loaded(published, image, tmp_path) == transformers.__version__


def test_no_code_runs_that_was_not_allowed(published, tmp_path):
    assert run(DISTRUSTFUL, published[0], tmp_path).endswith("refused")


def test_the_oldest_allowed_transformers_loads_it_too(published, image, tmp_path):
    oldest = re.search(r'"transformers>=([0-9.]+),', (ROOT / "setup.py").read_text(encoding="utf-8"))[1] + ".0"
    folder = package_folder(f"transformers=={oldest}")
    assert check_loaded(published, image, tmp_path, PYTHONPATH=str(folder)) == oldest


def test_model_files_run_with_transformers_4_57(hub, tmp_path):
    """As `transformers_versions.py` does it, with the torch of this environment."""
    packages = package_folder("transformers==4.57.1", "huggingface-hub==0.36.2", "tokenizers==0.22.2")
    torch.save(save_models(tmp_path), tmp_path / "expected.pt")
    upload(tmp_path, hub)
    environment = {**hub.environment(tmp_path / "hf"), "PYTHONPATH": str(packages)}
    versions, differences = run_client(sys.executable, tmp_path, tmp_path / "out", [*NAMES.values()], environment)
    assert versions == ["4.57.1", torch.__version__]
    assert differences.pop("processor_pixels") < 0.05  # this version resizes with Pillow
    assert max(differences.values()) < 1e-5, differences


def package_folder(*requirements: str) -> Path:
    """A folder with packages, downloaded once into the user's cache; without a network the test is skipped.

    Args:
        requirements: `NAME==VERSION` of each; the first one names the folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvvit-tests"
    folder = cache / requirements[0].replace("==", "-")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--no-deps", "--only-binary", ":all:"]
    # filled next to its final place and then renamed, so that an interrupted run leaves no half copy
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        command = [*pip, "--target", f"{temporary}/package", *requirements]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT)
            Path(temporary, "package").rename(folder)
        except subprocess.SubprocessError as error:
            pytest.skip(
                f"{' '.join(requirements)} could not be downloaded ({str(getattr(error, 'stderr', error)).strip()[-200:]})"
            )
    return folder


def holds_pickle(content: bytes) -> bool:
    """Whether a file is a pickle or an archive with one, whatever it is called."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        return any(
            holds_pickle(zipfile.ZipFile(io.BytesIO(content)).read(name))
            for name in zipfile.ZipFile(io.BytesIO(content)).namelist()
        )
    if tarfile.is_tarfile(io.BytesIO(content)) or content[:2] in (b"\x1f\x8b", b"BZ"):
        return True
    try:
        return sum(1 for _ in pickletools.genops(content)) > 1
    except Exception:  # its parser raises whatever it stumbles over
        return False


def test_nothing_published_is_a_pickle(published, tmp_path):
    hub, _ = published
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert holds_pickle((tmp_path / "a.pt").read_bytes()) and holds_pickle(pickle.dumps([1, 2]))  # the scan finds them
    scanned = 0
    for repo_id, repo_type in (("user/net", "model"), ("user/segmenter", "model"), ("user/labels", "dataset")):
        for commit in hub.history(repo_id, repo_type):
            for name, file in commit.files.items():
                assert not holds_pickle(file.content), f"{repo_id}: {name}"
                scanned += 1
    assert scanned > 40
