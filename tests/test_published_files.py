"""Which files are published: formats by content, never a pickle."""

import io
import json
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

from modeling_lvvit.token_labeling.published_files import published_files


def write_good_files(folder):
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "modeling.py").write_text("x = 1\n")
    (folder / "README.md").write_text("# Größe\n")
    (folder / "labels.txt").write_text("I am no pickle.\n.")
    (folder / "empty.txt").write_text("")
    (folder / "dot.txt").write_text(".")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "picture.png")
    pq.write_table(pa.table({"a": [1]}), folder / "train-00000.parquet")
    (folder / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    writer = EventFileWriter(str(folder / "runs"))
    writer.flush()
    writer.close()


def test_good_files_are_published_and_others_are_not(tmp_path):
    write_good_files(tmp_path)
    events = next((tmp_path / "runs").iterdir()).name
    for name in ("checkpoint-3", "_stage", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimizer.pt").write_bytes(pickle.dumps([1]))
    (tmp_path / ".README.md.x.partial").write_bytes(b"half")
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps([1]))
    published, others = published_files(tmp_path)
    expected = ["README.md", "config.json", "dot.txt", "empty.txt", "labels.txt", "model.onnx", "model.safetensors"]
    expected += ["modeling.py", "picture.png", f"runs/{events}", "train-00000.parquet"]
    assert published == expected
    assert others == ["training_args.bin"]


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
ENDINGS = (".safetensors", ".json", ".py", ".md", ".txt", ".yaml", ".csv", ".png", ".jpg", ".parquet", ".onnx")


@pytest.mark.parametrize("content", HARMFUL)
@pytest.mark.parametrize("name", [*(f"file{ending}" for ending in ENDINGS), "events.out.tfevents.1.host"])
def test_pickles_are_found_whatever_they_are_called(name, content, tmp_path):
    (tmp_path / name).write_bytes(HARMFUL[content])
    with pytest.raises(ValueError, match="cannot be published"):
        published_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "modeling.py", "picture.png", "train-00000.parquet"]
)
def test_damaged_files_are_named(name, tmp_path):
    write_good_files(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30] if name not in ("modeling.py", "config.json") else b"{(")
    with pytest.raises(ValueError, match=f"{path}.*cannot be published"):
        published_files(tmp_path)


def test_json_is_parsed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "b"}))
    assert published_files(tmp_path) == (["a.json"], [])
