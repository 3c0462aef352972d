"""Which files are published: formats by content, never a pickle."""

import io
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from modeling_lvvit.hub.file_checks import published_files


def write_good_files(folder):
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "modeling_net.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Größe\n")
    (folder / "LICENSE").write_text("Do what you like.\n")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "image.png")
    for name in ("data", "onnx"):
        (folder / name).mkdir()
    pq.write_table(pa.table({"a": [1]}), folder / "data" / "train-00000.parquet")
    (folder / "onnx" / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    writer = EventFileWriter(str(folder / "runs"))
    writer.flush()
    writer.close()


def test_what_belongs_to_a_model_is_published_and_the_rest_named(tmp_path):
    write_good_files(tmp_path)
    events = next((tmp_path / "runs").iterdir()).name
    for name in ("checkpoint-3", "_stage", ".cache", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(pickle.dumps([1]))
    (tmp_path / ".README.md.x.partial").write_bytes(b"half")
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps([1]))
    (tmp_path / "token.txt").write_text("hf_secret")
    (tmp_path / "kaggle.json").write_text("{}")
    save_file({"weight": torch.ones(3)}, tmp_path / "other" / "model.safetensors")
    outside = tmp_path.parent / f"{tmp_path.name} outside.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(outside)
    (tmp_path / "link.png").symlink_to(outside)
    published, others = published_files(tmp_path)
    assert published == [
        "LICENSE", "README.md", "config.json", "data/train-00000.parquet", "image.png", "model.safetensors", "modeling_net.py",
        "onnx/model.onnx", f"runs/{events}",
    ]  # fmt: skip
    assert others == [
        "kaggle.json", "link.png", "other/model.safetensors", "other/optimizer.pt", "token.txt", "training_args.bin"
    ]  # fmt: skip


TEXTS = (
    "",
    ".",
    "I am no pickle.\n.",
    "1. cat\n2. dog\n",
    "0.5,0.25\n",
    "2.0\n",
    "N.B. this",
    "a. item",
    "# 1.",
    "12.",
    "(a). b",
)


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_is_no_pickle(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert published_files(tmp_path) == (["README.md"], [])


def saved_by_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"a": 1}))
    return buffer.getvalue()


HARMFUL = {"torch": saved_by_torch(), "zip": zipped(), "pickle": pickle.dumps({"a": [1]})}
HARMFUL |= {f"pickle of protocol {number}": pickle.dumps({"a": [1, "x"]}, number) for number in range(5)}
NAMES = (
    "model.safetensors",
    "config.json",
    "modeling_a.py",
    "README.md",
    "LICENSE",
    "a.png",
    "a.jpg",
    "model.onnx",
    "predict.py",
)
NAMES += ("data/train-00000.parquet", "runs/events.out.tfevents.1.host", "onnx/model.onnx")


@pytest.mark.parametrize("content", HARMFUL)
@pytest.mark.parametrize("name", NAMES)
def test_pickles_are_found_whatever_they_are_called(name, content, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(HARMFUL[content])
    with pytest.raises(ValueError, match="cannot be published"):
        published_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "modeling_net.py", "image.png", "data/train-00000.parquet"]
)
def test_damaged_files_are_named(name, tmp_path):
    write_good_files(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30] if name not in ("modeling_net.py", "config.json") else b"{(")
    with pytest.raises(ValueError, match=f"{path}.*cannot be published"):
        published_files(tmp_path)
