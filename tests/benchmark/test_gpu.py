"""The benchmark of a GPU, tried on a CPU with tiny models."""

import json

import datasets
import pytest
import torch
from PIL import Image

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.benchmark import gpu
from modeling_lvvit.benchmark.__main__ import main
from modeling_lvvit.benchmark.data_loading import synthetic_rows
from modeling_lvvit.benchmark.gpu import GPUBenchmark, limit_sentence
from modeling_lvvit.benchmark.image_supply import decoding_rate, jpeg_decoders, jpeg_files
from modeling_lvvit.benchmark.record import Record
from support.models import tiny_config


CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> str:
    """A saved model; few images, little time, and a small competitor."""
    monkeypatch.setattr(gpu, "SYNTHETIC_IMAGES", 8)
    monkeypatch.setattr(gpu, "SUPPLY_SHARE", 1e-4)
    monkeypatch.setattr(gpu, "SECONDS_OF_A_TURN", 0.0)
    monkeypatch.setattr(gpu, "matmul_ceiling", lambda device, dtype: 1e12)
    monkeypatch.setattr(gpu, "COMPETITOR", "timm/test_vit")
    size = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_attention_heads": 2}
    config = tiny_config(num_hidden_layers=1, residual_divisor=2.0, **size)
    LVViTForImageClassification(config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


def measured(tmp_path, *arguments: str) -> dict:
    file = tmp_path / "gpu.json"
    main(["gpu", *arguments, "--device", "cpu", "--rounds", "2", "--output_file", str(file)])
    return json.loads(file.read_text())


def test_everything_but_what_takes_too_long_is_measured(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "FIRST_ESTIMATES", {"inference": 1e6, "training": 1e6})
    result = measured(tmp_path, tiny, "--batch_sizes", "4", "2", "--minutes", "60")
    printed = capsys.readouterr().out
    rows = [(row["mode"], row["model"], row["batch_size"]) for row in result["rows"] if row["mode"] != "supply"]
    eager = [f"original/{tiny}+bfloat16", f"{tiny}+bfloat16", "timm/test_vit@32+bfloat16"]
    assert rows == [(mode, name, size) for mode, size in (("inference", 4), ("training", 2)) for name in eager]
    for row in result["rows"][:3]:
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / (row["milliseconds"] / 1000))
        assert row["ceiling_share"] > 0 and len(row["seconds"]) == 2
    supplies = [row["model"] for row in result["rows"] if row["mode"] == "supply"]
    assert {"loader, 1 worker", "torchvision, whole images"} <= set(supplies)
    left_out = [text.split(":")[0] for text in result["left_out"]]
    compiled = [f"{name}+compiled" for name in eager[1:]]
    assert {f"{mode} {name}" for mode in ("inference", "training") for name in compiled} < set(left_out)
    assert f"inference {tiny}+bfloat16+deployed" in left_out and "copy to the device" in left_out
    assert all(text in printed for text in result["left_out"])
    assert "The first limit is the device step" in printed or "The first limit is the loader" in printed


@pytest.mark.slow
def test_compiled_models_say_how_long_they_took(tiny, tmp_path, capsys):
    result = measured(tmp_path, tiny, "--batch_sizes", "2", "--minutes", "60")
    compiled = [row for row in result["rows"] if row.get("compiles")]
    assert len(compiled) == 5 and all(row["first_call_seconds"] > row["milliseconds"] / 1000 for row in compiled)
    assert "first call, with compilation, in" in capsys.readouterr().out


def test_batches_are_halved_where_memory_does_not_suffice(tiny, monkeypatch, capsys):
    def inference_call(model, setting):
        if setting.batch_size > 3:
            raise torch.OutOfMemoryError("out of memory")
        return lambda: None

    monkeypatch.setattr(gpu, "inference_call", inference_call)
    benchmark = GPUBenchmark(Record(60), CPU, (tiny,), (8, 8), rounds=1)
    benchmark.compare("inference", [f"original/{tiny}", tiny])
    assert [row["batch_size"] for row in benchmark.record.rows] == [2, 2]
    assert capsys.readouterr().out.count("no memory for") == 2  # the second model begins where the first fitted


def test_what_fails_is_named_and_the_rest_goes_on(tiny, monkeypatch):
    def inference_call(model, setting):
        if model.source == "original":
            raise RuntimeError("no kernel\nand a long story")
        return lambda: None

    monkeypatch.setattr(gpu, "inference_call", inference_call)
    benchmark = GPUBenchmark(Record(60), CPU, (tiny,), (2, 2), rounds=1)
    benchmark.compare("inference", [f"original/{tiny}", tiny])
    assert [row["ratio"] for row in benchmark.record.rows] == [1.0]
    assert benchmark.record.left_out == [f"inference original/{tiny}: RuntimeError: no kernel"]


def test_time_that_is_reserved_is_not_taken():
    record = Record(minutes=1)
    assert record.has_time("this", 30) and not record.has_time("that", 30, reserved=40)
    assert record.left_out[0].startswith("that: may take 30.0 s")


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"device step": 4000.0, "loader, 1 worker": 100.0, "loader, 16 workers": 1000.0, "decoder": 5e3}, ("loader, 16 workers: 1,000", "25%", "decoder: 5,000 images a second, 5.0 times the loader")),
        ({"device step": 4000.0, "loader, 9 workers": 6000.0, "copy to the device": 2000.0}, ("copy to the device: 2,000", "50%")),
        ({"device step": 4000.0, "loader, 9 workers": 6000.0}, ("device step: 4,000", "100%")),
        ({"device step": 4000.0}, ("unknown", "")),
    ],
)  # fmt: skip
def test_the_first_limit_is_the_slowest_of_what_every_image_passes(rates, expected):
    assert all(text in limit_sentence(rates) for text in expected)


@pytest.mark.filterwarnings("ignore")
def test_decoders_decode_whole_images_and_regions():
    files = jpeg_files(synthetic_rows(3, 10, image_size=(64, 48)))
    assert len(files) == 3
    names = []
    for name, make_decoder in jpeg_decoders(CPU):
        if name.startswith("nvimgcodec"):
            pytest.importorskip("nvidia.nvimgcodec")
        assert decoding_rate(make_decoder(), files, CPU, seconds=0.01) > 0
        names.append(name)
    assert names == ["nvimgcodec, CPU, whole images", "nvimgcodec, CPU, regions", "torchvision, whole images"]
    with pytest.raises(RuntimeError, match="1 of 3 files were not decoded"):
        decoding_rate(lambda batch: len(batch) - 1, files, CPU, seconds=0.01)


def test_files_of_other_formats_are_left_out(tmp_path):
    images = [str(tmp_path / name) for name in ("a.png", "b.jpg")]
    for path in images:
        Image.new("RGB", (8, 8)).save(path)
    rows = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    assert jpeg_files(rows) == [(tmp_path / "b.jpg").read_bytes()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "must be positive"),
        (["lvvit_t_224+compiled"], "without options"),
        (["timm/resnet18"], "models of ours"),
        (["--batch_sizes", "1", "2", "3"], "of inference and training"),
    ],
)
def test_wrong_arguments_end_with_a_message(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["gpu", *arguments, "--device", "cpu"])
