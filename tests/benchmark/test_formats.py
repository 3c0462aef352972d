"""A trained model in its formats: who takes part, what is counted, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.benchmark.__main__ import main
from modeling_lvvit.benchmark.formats import answers, file_bytes, find_formats, formats_table
from modeling_lvvit.export.folder import ExportSettings, export_folder
from modeling_lvvit.variants import evaluation_image_processor
from support.models import tiny_config


SIDE, IMAGES = 32, 6


@pytest.fixture
def saved(tmp_path) -> str:
    """A saved model whose classes depend on the image, with its image processor."""
    torch.manual_seed(0)
    model = LVViTForImageClassification(tiny_config(image_size=SIDE, num_hidden_layers=1)).eval()
    model.classifier.weight.data *= 20
    model.save_pretrained(tmp_path / "model")
    evaluation_image_processor((SIDE, SIDE), 1.0).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def pictures(tmp_path) -> str:
    """A folder of images, of another size than the input."""
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        values = generator.integers(0, 256, (SIDE + 8, SIDE + 20, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{index}.png")
    return str(tmp_path / "images")


@pytest.fixture
def exported(saved, pictures, tmp_path) -> str:
    """The model as ONNX files in float32 and int8."""
    pytest.importorskip("onnxscript")
    settings = ExportSettings(dtypes=("float32", "int8"), check_images=pictures, min_agreement=0.0)
    export_folder(saved, tmp_path / "exported", settings)
    return str(tmp_path / "exported")


@pytest.mark.slow
def test_formats_are_timed_and_their_answers_compared(saved, exported, pictures, capsys, tmp_path):
    file = tmp_path / "figures.json"
    command = ["formats", saved, "--exported", exported, "--images", pictures, "--batch_sizes", "2"]
    main([*command, "--rounds", "2", "--output_file", str(file)])
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    names = ["PyTorch", "PyTorch+deployed", "PyTorch+deployed+bfloat16", "PyTorch+int8"]
    names += ["onnx/model.onnx", "onnx/model_quantized.onnx"]
    assert [(row["batch_size"], row["model"]) for row in rows] == [(2, name) for name in names]
    eager, deployed, bfloat16, int8, onnx, onnx_int8 = rows[: len(names)]
    assert eager["ratio"] == eager["same_class"] == 1 and eager["largest_change"] == 0
    assert deployed["same_class"] == 1 and deployed["largest_change"] < 1e-4 < int8["largest_change"] < 0.1
    assert 0 < onnx["largest_change"] < 0.01  # a gray level that its resizing differs by
    assert onnx["largest_change"] < onnx_int8["largest_change"] < 0.1
    assert {row["images"] for row in rows} == {IMAGES} and {len(row["seconds"]) for row in rows} == {2}
    assert int8["megabytes"] < eager["megabytes"] and bfloat16["megabytes"] < 0.6 * deployed["megabytes"]
    assert onnx["megabytes"] == Path(exported, "onnx", "model.onnx").stat().st_size / 1e6
    assert "linear layers with 8 bits" in int8["preparation"] and int8["preparation"] in printed
    assert all(name in printed for name in names) and "images/s (2)" in printed


def test_answers_by_hand():
    expected = np.array([[0.6, 0.4], [0.5, 0.5], [0.2, 0.8]])
    found = {"probabilities": np.array([[0.4, 0.6], [0.6, 0.4], [0.1, 0.9]]), "bytes": 2_500_000, "preparation": ""}
    result = answers(found, expected)
    assert (result["megabytes"], result["same_class"]) == (2.5, pytest.approx(2 / 3))
    assert result["largest_change"] == pytest.approx(0.2)


def test_a_line_has_the_speed_of_each_batch_size():
    rows = [
        {"model": name, "batch_size": size, "megabytes": 1.0, "images_per_second": rate, "ratio": rate / 10}
        | {"same_class": 0.995, "largest_change": 0.25, "preparation": note}
        for size in (1, 8)
        for name, rate, note in (("a", 10 * size, ""), ("b", 20 * size, "fused before"))
    ]
    assert formats_table(rows).splitlines() == [
        "model  megabytes  images/s (1)  ratio (1)  images/s (8)  ratio (8)  same class  largest change",
        "a            1.0          10.0       1.00          80.0       8.00       99.5%          0.2500",
        "b            1.0          20.0       2.00         160.0      16.00       99.5%          0.2500",
        "b: fused before",
    ]


def test_bytes_of_external_data_count(tmp_path):
    for name, size in (("model.onnx", 10), ("model.onnx_data", 200), ("model_fp16.onnx", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    assert file_bytes(tmp_path / "model.onnx") == 210


def test_files_that_prepare_no_images_do_not_take_part(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ValueError, match="has none of model.onnx"):
        find_formats("model", str(tmp_path))
    (tmp_path / "onnx" / "model.onnx").touch()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    with pytest.raises(ValueError, match="Export the model again"):
        find_formats("model", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["formats"], "takes one folder with a saved model, got none"),
        (["formats", "lvvit_s_224", "--images", "x"], "takes one folder"),
        (["formats", "MODEL"], "give a data source"),
        (["formats", "MODEL", "--images", "x", "--num_classes", "3"], "leave out"),
        (["formats", "MODEL", "--images", "x", "--exported", "./none"], "Name a folder of `lvvit export`"),
        (["formats", "MODEL", "--images", "./none"], "There is nothing at none"),
        (["inference", "MODEL", "--exported", "x"], "are for mode formats"),
        (["formats", "MODEL", "--images", "x", "--max_samples", "0"], "must be at least 1"),
    ],
)
def test_wrong_formats_end_with_a_message(arguments, message, saved):
    with pytest.raises(SystemExit, match=message):
        main([saved if word == "MODEL" else word for word in arguments])
