"""The benchmark: what it accepts, counts and prints."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.benchmark import interleaved_timing as turns
from modeling_lvvit.benchmark import measure
from modeling_lvvit.benchmark.__main__ import main
from modeling_lvvit.benchmark.comparison import count_size, table
from modeling_lvvit.benchmark.data_loading import synthetic_label_map, synthetic_rows
from modeling_lvvit.benchmark.models import BenchmarkModel
from modeling_lvvit.benchmark.published import comparison as published_comparison
from modeling_lvvit.benchmark.published.comparison import find_benchmark_model
from modeling_lvvit.benchmark.published.results import COMPETITORS, PublishedRow, lvvit_rows, published_rows
from modeling_lvvit.variants import VARIANTS
from support.models import tiny_config


@pytest.fixture
def tiny(tmp_path) -> str:
    """A saved model, of which `original/` has a rendering too."""
    config = tiny_config(
        image_size=32, patch_size=16, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, residual_divisor=2.0
    )
    LVViTForImageClassification(config).save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")


@pytest.fixture
def few_images(labelled_rows, tmp_path) -> str:
    """A Parquet file with 12 images."""
    labelled_rows.to_parquet(tmp_path / "rows.parquet")
    return str(tmp_path / "rows.parquet")


def figures(capsys, tmp_path, *arguments: str) -> tuple[list[dict], str]:
    file = tmp_path / "figures.json"
    main([*arguments, "--rounds", "2", "--output_file", str(file), "--device", "cpu"])
    return json.loads(file.read_text())["rows"], capsys.readouterr().out


def test_inference_rows_have_speed_size_and_ratio(tiny, capsys, tmp_path):
    options = ["+fused+bfloat16", "+eager", "+kept_memory"]
    models = [f"original/{tiny}", tiny, *(tiny + option for option in options), f"original/{tiny}+bfloat16"]
    rows, printed = figures(capsys, tmp_path, "inference", *models, "--batch_sizes", "2", "3", "--ceiling")
    assert [row["model"] for row in rows] == 2 * models
    assert rows[0]["ratio"] == rows[6]["ratio"] == 1
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / (row["milliseconds"] / 1000))
        assert 0 < row["ceiling_share"] < 1.5
    parameters = sum(p.numel() for p in LVViTForImageClassification.from_pretrained(tiny).parameters())
    assert rows[0]["parameters"] == rows[1]["parameters"] == parameters
    assert all(model in printed for model in models)


def test_training_steps_run_with_every_option(tiny, capsys, tmp_path):
    options = ["+bfloat16", "+plain", "+checkpointing", "+channels_last"]
    models = [f"original/{tiny}+bfloat16", *(tiny + option for option in options)]
    rows, _ = figures(capsys, tmp_path, "training", *models, "--batch_sizes", "2", "--num_classes", "11")
    assert all(row["ratio"] > 0 for row in rows)
    assert rows[0]["parameters"] == rows[1]["parameters"] < 20_000  # 11 classes


def test_folders_of_any_patch_size_train(capsys, tmp_path):
    LVViTForImageClassification(tiny_config()).save_pretrained(tmp_path / "model")
    rows, _ = figures(capsys, tmp_path, "training", str(tmp_path / "model"), "--batch_sizes", "2")
    assert rows[0]["parameters"] > 0


def test_run_takes_new_batches(tiny, few_images, capsys, tmp_path):
    models = [tiny, tiny + "+plain"]
    rows, _ = figures(capsys, tmp_path, "run", *models, "--batch_sizes", "2", "--images", few_images)
    assert {row["mode"] for row in rows} == {"run"}


def test_loaders_side_by_side(few_images, capsys, tmp_path):
    rows, printed = figures(capsys, tmp_path, "data", "--batch_sizes", "3", "--images", few_images)
    assert [row["model"] for row in rows] == [
        "token_labels", "plain_labels", "exact_resize", "without_library", "timm", "torchvision",
    ]  # fmt: skip
    assert "data, batch size 3" in printed


def test_too_few_images(few_images, tmp_path, capsys):
    with pytest.raises(SystemExit, match="has 12 images, fewer than a batch of 16"):
        figures(capsys, tmp_path, "data", "token_labels", "--images", few_images)


@pytest.mark.slow
def test_larger_batches_take_more_memory(capsys, tmp_path):
    """A batch of 1024 takes more than one of 64, by about its larger activations."""
    LVViTForImageClassification(tiny_config()).save_pretrained(tmp_path / "model")
    rows, _ = figures(capsys, tmp_path, "inference", str(tmp_path / "model"), "--batch_sizes", "64", "1024")
    assert rows[1]["peak_megabytes"] > rows[0]["peak_megabytes"] + 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lvvit_x_224", "names no model"),
        ("timm/no_such_model", "names no model"),
        ("original/resnet50", "names no model"),
        ("lvvit_t_224+fast", "option fast is unknown"),
        ("timm/resnet18+fused", "option fused is for our models only"),
        ("lvvit_t_224+eager+sdpa", "more than one attention"),
        ("lvvit_t_224+bfloat16+float16", "more than one precision"),
    ],
)
def test_unknown_benchmark_models_are_named_before_anything_runs(text, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkModel.parse(text)
    with pytest.raises(SystemExit, match=message.replace("+", r"\+")):
        main(["inference", "lvvit_t_224", text])


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "nothing"],
        ["inference", "--rounds", "0"],
        ["inference", "--batch_sizes", "0"],
        ["data", "--images", "./none"],
    ],
)
def test_wrong_arguments_end_with_a_message(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert isinstance(stop.value.code, str)


def test_flops_of_a_layer_by_hand():
    """Stem 7x7, 3x3, 3x3 at half resolution, patches, 25 tokens, both heads; two FLOPs a product."""
    config = tiny_config(num_hidden_layers=1)
    stem = (16 * 24) * 8 * (3 * 49 + 2 * 8 * 9) + 24 * 32 * (8 * 16)
    layer = 25 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 48) + 2 * 25 * 25 * 32
    heads = 25 * 32 * 7
    counted = measure.count_flops(lambda: LVViTForImageClassification(config), (32, 48))
    assert counted == 2 * (stem + layer + heads)


def note_turns(file: Path, name: str):
    """Prepares a call that writes its name and process to a file."""

    def call() -> None:
        with file.open("a") as lines:
            lines.write(f"{name} {os.getpid()}\n")

    return call


def test_benchmark_models_are_taken_in_turn_in_processes_of_their_own(tmp_path):
    file = tmp_path / "turns"
    entries = {name: turns.Entry(partial(note_turns, file, name), threads=1) for name in "abc"}
    times = turns.time_interleaved(entries, torch.device("cpu"), rounds=3, warmup=1)
    lines = file.read_text().splitlines()
    assert "".join(line[0] for line in lines) == "abc" + "abc" + "bca" + "cab"
    assert len(set(lines)) == 3 and str(os.getpid()) not in " ".join(lines).split()
    assert {len(found.seconds) for found in times.values()} == {3}


def test_ratio_is_the_median_over_rounds():
    assert turns.median_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_synthetic_maps_name_a_few_classes_and_repeat():
    rows, again = synthetic_rows(2, 50, seed=3), synthetic_rows(2, 50, seed=3)
    assert rows[1] == again[1]
    ids, scores = synthetic_label_map(1000, np.random.default_rng(0))
    assert ids.shape == scores.shape == (5, 18, 18)
    assert (np.diff(scores.astype(np.float32), axis=0) <= 0).all()
    assert len(np.unique(ids)) <= 40


def test_table_has_the_columns_that_rows_have():
    lines = table([{"model": "a", "ratio": 1.0}, {"model": "longer", "ratio": 12.351}]).splitlines()
    assert lines == ["model   ratio", "a        1.00", "longer  12.35"]


def test_side_of_images_behind_the_name():
    assert BenchmarkModel.parse("timm/cait_xxs24_224@96").build(5).patch_embed.img_size == (96, 96)
    assert BenchmarkModel.parse("timm/resnet18@96").image_size() == (96, 96)  # whose constructor takes no size
    ours = BenchmarkModel.parse("lvvit_t_224@64+fused")
    assert ours.build().config.image_size == 64 and ours.grid_size() == (4, 4) and ours.options == {"fused"}
    for text in ("lvvit_t_224@", "lvvit_t_224@0", "timm/resnet18@big"):
        with pytest.raises(ValueError, match="expected the side of its images in pixels behind the @"):
            BenchmarkModel.parse(text)


def test_every_published_row_has_a_model_or_says_why_not():
    rows = published_rows([])
    assert {row.network for row in rows if find_benchmark_model(row) is None} == {"DeepViT-S", "DeepViT-L"}
    assert all(row.note for row in rows if find_benchmark_model(row) is None)
    assert len({(row.network, row.train_size, row.test_size) for row in rows}) == len(rows)


def counted_gmacs(row: PublishedRow) -> float:
    return count_size(find_benchmark_model(row), None)[1] / 2e9


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lvvit_s_224", 6.6),
        ("lvvit_s_384", 22.2),
        ("lvvit_m_384", 42.2),
        ("lvvit_l_288", 59.0),
        ("lvvit_l_448", 157.2),
        ("lvvit_l_512", 214.8),
    ],
)
def test_flops_of_lvvit_are_the_published_ones(name, published):
    row = next(row for row in lvvit_rows() if row.model == name)
    assert row.gmacs == published
    assert counted_gmacs(row) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("name", VARIANTS)
def test_multiply_adds_on_the_cards_are_counted(name):
    row = next(row for row in lvvit_rows() if row.model == name)
    assert counted_gmacs(row) == pytest.approx(VARIANTS[name].counted_gmacs, rel=0.005)


def test_flops_of_m_at_224_are_not_the_published_ones_and_the_table_says_so():
    row = next(row for row in lvvit_rows() if row.model == "lvvit_m_224")
    assert row.gmacs == 16.0 and "16.0 G does not follow" in row.note
    assert counted_gmacs(row) == pytest.approx(12.7, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", [row for row in COMPETITORS if row.gmacs and row.model and "counted and timed" not in row.note], ids=str
)
def test_competitors_are_the_published_networks(row):
    """Papers count a little differently; another network would be further off."""
    parameters, flops = count_size(find_benchmark_model(row), None)
    assert flops / 2e9 == pytest.approx(row.gmacs, rel=0.04)
    assert parameters / 1e6 == pytest.approx(row.million_parameters, rel=0.02)


def test_table_counts_without_timing_and_keeps_rows(capsys, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    arguments = [
        "--table",
        "deit-s",
        "DeepViT",
        "LV-ViT-M",
        "--rounds",
        "0",
        "--device",
        "cpu",
        "--output_file",
        str(file),
    ]
    main(arguments)
    printed = capsys.readouterr().out
    assert "| DeiT-S distilled | 224, 224 | 81.2 | 86.8 | 22M | 4.6G |" in printed
    assert "| DeepViT-S [1] | 224, 224 | 82.3 | - | 27M | 6.2G |  | - | - | - |" in printed
    assert "| LV-ViT-M [2] | 224, 224 | 84.1 | 88.4 | 56M | 16.0G | `lvvit_m_224` | 55.8M | 12.7G | 223 |" in printed
    assert "images/s" not in printed
    monkeypatch.setattr(published_comparison, "_measured", lambda *_: pytest.fail("measured again"))
    main(arguments)
    assert capsys.readouterr().out == printed
    main(["--table", "DeepViT", *arguments[4:]])  # rows of a smaller table are added, not taken instead
    assert len(json.loads(file.read_text())["rows"]) == 7
    with pytest.raises(SystemExit, match="was measured in another way"):
        main([*arguments, "--num_classes", "10"])
    file.write_text("{}")  # of another program
    with pytest.raises(SystemExit, match="is no record of such a table"):
        main(arguments)


@pytest.mark.slow
def test_table_times_each_beside_lvvit_s(capsys, tmp_path):
    arguments = ["--table", "LV-ViT-T", "--rounds", "2", "--batch_sizes", "1", "--device", "cpu"]
    main([*arguments, "--options", "bfloat16", "--output_file", str(tmp_path / "table.json")])
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert row["ratio"] > 1 and row["images_per_second"] > 0 and len(row["seconds"]) == 2
    assert "times LV-ViT-S" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "ResNet"], "no row is called so"),
        (["inference", "--table"], "leave out inference"),
        (["--table", "--batch_sizes", "1", "2"], "takes one batch size"),
        (["--table", "--options", "deployed"], "is for our models only"),
        (["--table", "--options", "bfloat16", "float16"], "more than one precision"),
        (["--table", "--ceiling"], "do nothing with --table"),
        (["--table", "--rounds", "-1"], "at least 0"),
    ],
)
def test_wrong_tables_end_with_a_message(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
