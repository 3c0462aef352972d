"""Which files are published: by name, data also by content; never a pickle."""

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
NAMES = ("model.safetensors", "model-00001-of-00002.safetensors", "config.json", "data/train-00000.parquet")
PICKLE_NAMES = (
    "training_args.bin",
    "pytorch_model.bin",
    "optimizer.pt",
    "rng_state.pth",
    "a.pkl",
    "model.ckpt",
    "onnx/a.pt2",
)


@pytest.mark.parametrize("content", HARMFUL)
@pytest.mark.parametrize("name", PICKLE_NAMES)
def test_names_of_pickles_are_not_published(name, content, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(HARMFUL[content])
    assert published_files(tmp_path) == ([], [name])


@pytest.mark.parametrize("content", ["torch", "zip", "pickle"])
def test_a_card_is_text(content, tmp_path):
    (tmp_path / "README.md").write_bytes(HARMFUL[content])
    with pytest.raises(ValueError, match="README.md is no whole md file and cannot be published"):
        published_files(tmp_path)


@pytest.mark.parametrize("content", HARMFUL)
@pytest.mark.parametrize("name", NAMES)
def test_pickles_under_names_of_data_are_found(name, content, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(HARMFUL[content])
    with pytest.raises(ValueError, match="cannot be published"):
        published_files(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "data/train-00000.parquet"])
def test_damaged_files_are_named(name, tmp_path):
    write_good_files(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30] if name != "config.json" else b"{(")
    with pytest.raises(ValueError, match=f"{path}.*cannot be published"):
        published_files(tmp_path)
