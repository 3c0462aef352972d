"""Labels of the very crops that a run sees: made by `lvvit annotate --crops`, replayed by `lvvit train --token_labels`."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

import train_tl
from modeling_lvvit.cli.annotation import __main__ as annotation
from modeling_lvvit.cli.annotation.crops import CropBatches, run_epochs
from modeling_lvvit.cli.parser import parse
from modeling_lvvit.data.images import SampleError
from modeling_lvvit.data.reduced_copy import program as cache
from modeling_lvvit.labels.crops import CropLabelSetWriter
from modeling_lvvit.labels.label_set import LabelLookup, LabelSet
from modeling_lvvit.token_labeling import AugmentationConfig, TrainTransform
from modeling_lvvit.visualization import check_labels
from support.images import labelled_table
from support.models import NUM_CLASSES
from support.programs import TINY, run


RECIPE = f"""
image_size: 32
config_overrides: {TINY}
crop_scale_min: 0.2
per_device_train_batch_size: 4
num_train_epochs: 4
max_train_samples: 20
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images without an evaluation split, a recipe, and an annotator with random weights that says different things of cells."""
    folder = tmp_path_factory.mktemp("crops")
    parquet.write_table(labelled_table(26), folder / "train.parquet")
    (folder / "recipe.yaml").write_text(RECIPE)
    torch.manual_seed(0)
    names = {index: f"class {index}" for index in range(NUM_CLASSES)}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=names)
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        model.classifier[1].weight.mul_(8)
    model.save_pretrained(folder / "annotator")
    size = {"height": 40, "width": 40}
    BitImageProcessor(size={"shortest_edge": 40}, crop_size=size).save_pretrained(folder / "annotator")
    return folder


def annotate_words(folder: Path, output: Path, *more: str) -> list[str]:
    words = [str(folder / "train.parquet"), "--annotator", str(folder / "annotator"), "--output_dir", str(output)]
    return [*words, "--top_k", str(NUM_CLASSES), "--epochs", "2", "--num_workers", "1", "--rows_per_shard", "7", *more]


def crops_of(folder: Path, *options: str) -> list[str]:
    return ["--crops", str(folder / "recipe.yaml"), *options]


@pytest.fixture(scope="module")
def labels(folder) -> Path:
    annotation.main(annotate_words(folder, folder / "labels", *crops_of(folder)))
    return folder / "labels"


def prepare(folder: Path, output: Path, *options: str):
    words = [str(folder / "recipe.yaml"), "--dataset_name", str(folder / "train.parquet"), "--output_dir", str(output)]
    return train_tl.prepare(*parse([*words, "--report_to", "none", *options])).trainer


@pytest.fixture(scope="module")
def trainers(folder, labels, tmp_path_factory):
    """One that replays the labels, and one whose annotator labels crops in training; RandAugment, flips and erasing are on."""
    options = (["--token_labels", str(labels)], ["--annotator", str(folder / "annotator")])
    return [prepare(folder, tmp_path_factory.mktemp("run"), *words) for words in options]


def batch_of(trainer, epoch: int) -> dict[str, torch.Tensor]:
    samples = trainer.train_dataset
    samples.start_epoch(trainer.args.data_seed, epoch)
    return trainer.data_collator([samples[row] for row in range(len(samples))])


def test_labels_of_crops_equal_live_ones_in_each_epoch_of_the_ring(trainers):
    replayed, live = trainers
    assert len(replayed.train_dataset) == 20
    seen = []
    for epoch in range(4):
        batch, shown = batch_of(replayed, epoch), batch_of(live, epoch % 2)
        targets = replayed.objective.crop_targets(batch)[1:]
        expected = live.annotator.label(shown["pixel_values"], live.grid_size)
        for ours, theirs in zip(targets, expected, strict=True):
            torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), atol=2e-3, rtol=2e-3)
        seen.append((batch["pixel_values"], targets[1].to_dense()))
        assert torch.equal(batch["pixel_values"], shown["pixel_values"])
        assert 0 < len(batch["erased"]) < 10 and "erased" not in shown  # a quarter of the images
    assert (seen[0][1].amax(-1) > 0.3).any()
    assert torch.equal(seen[2][0], seen[0][0]) and torch.equal(seen[2][1], seen[0][1])
    assert (seen[1][1] - seen[0][1]).abs().amax() > 0.1


def test_loss_of_a_step_equals_that_with_live_labels(folder, labels, tmp_path):
    options = (["--token_labels", str(labels)], ["--annotator", str(folder / "annotator")])
    losses = []
    for place, words in enumerate(options):
        trainer = prepare(folder, tmp_path / str(place), *words, "--random_erasing", "0")  # live erases other places
        batch = batch_of(trainer, 1)
        assert batch["mix_mask"].any()
        torch.manual_seed(0)
        losses.append(trainer.compute_loss(trainer.model.train(), batch).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_labels_of_crops_do_not_fit_a_reduced_copy(folder, labels, tmp_path):
    words = [str(folder / "train.parquet"), "--output_dir", str(tmp_path / "copy"), "--num_workers", "1"]
    cache.main([*words, "--max_side", "30"])
    options = ["--token_labels", str(labels), "--dataset_name", str(tmp_path / "copy")]
    with pytest.raises(ValueError, match="labels of crops of other image files than those of this reduced copy"):
        prepare(folder, tmp_path / "run", *options)
    cache.main([*words[:1], "--output_dir", str(tmp_path / "whole"), "--num_workers", "1", "--max_side", "60"])
    assert prepare(folder, tmp_path / "run", *options[:2], "--dataset_name", str(tmp_path / "whole")) is not None


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_interrupted_annotation_continues_to_the_same_files(folder, labels, tmp_path, monkeypatch):
    write, written = CropLabelSetWriter.write, []

    def stop(writer, shard, table):
        if len(written) == 4:  # in the second epoch
            raise OSError("full")
        written.append(shard)
        write(writer, shard, table)

    words = annotate_words(folder, tmp_path / "labels", *crops_of(folder), "--num_workers", "2")
    monkeypatch.setattr(CropLabelSetWriter, "write", stop)
    with pytest.raises(SystemExit, match="full"):
        annotation.main(words)
    monkeypatch.undo()
    annotation.main(words)
    assert files(tmp_path / "labels") == files(labels)


@pytest.mark.slow
def test_two_processes_make_what_a_killed_run_lacks(folder, labels, tmp_path):
    shutil.copytree(labels, tmp_path / "labels")
    for lost in ("README.md", "data/train-00001.parquet", "data/train-00003.parquet", "data/train-00005.parquet"):
        (tmp_path / "labels" / lost).unlink()
    (tmp_path / "labels" / "data" / ".train-00003.parquet.a1b2c3d4.partial").write_bytes(b"half")
    words = annotate_words(folder, tmp_path / "labels", *crops_of(folder))
    command = ["-m", "modeling_lvvit.cli.command", "annotate", *words, "--cpu", "--num_processes", "2"]
    result = run(command, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert files(tmp_path / "labels") == files(labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 3", "--seed is 42 there and 3 here"),  # other rows are held out
        ("--data_seed 3", "--data_seed is 42 there and 3 here"),
        ("--image_size 40", r"--image_size is \[32, 32\] there and \[40, 40\] here"),
        (
            "--crop_scale_min 0.3 --color_jitter 0.1",
            "--color_jitter is 0.0 there and 0.1 here, --crop_scale_min is 0.2 there",
        ),
        ("--rand_augment none", "--rand_augment is 'rand-m9-mstd0.5-inc1' there and 'none' here"),
        (
            "--max_train_samples 15",
            "20 training rows, and the 15 training rows .*--max_train_samples is 20 there and 15 here",
        ),
        ("--train_sampling_strategy balanced", "balanced draws rows several times"),
        ("--label_crop authors", "--label_crop authors cuts maps of whole images"),
    ],
)
def test_run_that_draws_other_crops_is_refused(folder, labels, tmp_path, options, message):
    words = [
        str(folder / "recipe.yaml"),
        "--dataset_name",
        str(folder / "train.parquet"),
        "--output_dir",
        str(tmp_path),
    ]
    words += ["--report_to", "none", "--token_labels", str(labels), *options.split()]
    with pytest.raises(SystemExit, match=f"lvvit train: .*{message}"):
        train_tl.main(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--streaming"], "Leave out --streaming with --crops: a stream does not number"),
        (["--on_error", "empty"], "Leave out --on_error"),
        (["--fit", "pad"], "Leave out --fit"),
        (["--crops", "no_such_recipe"], "There is no recipe file no_such_recipe"),
        (["--crops", "crop_scale=0.5"], r"Unknown options: --crop_scale \(did you mean --crop_scale_min"),
        (["--crops", "train_sampling_strategy=balanced"], "recipe draws rows several times"),
        (["--epochs", "0"], "--epochs must be at least 1"),
    ],
)
def test_what_cannot_be_labelled_is_refused(folder, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"lvvit annotate: .*{message}"):
        annotation.main([*annotate_words(folder, tmp_path / "labels", *crops_of(folder)), *options])
    assert not (tmp_path / "labels").exists()


def test_epochs_need_crops(folder, tmp_path):
    with pytest.raises(SystemExit, match="--epochs needs --crops"):
        annotation.main(annotate_words(folder, tmp_path / "labels"))


def test_options_of_the_run_can_follow_the_recipe(folder, labels, tmp_path, capsys):
    """Another seed holds out other rows and draws other crops; the epochs are those of the run."""
    words = [word for word in annotate_words(folder, tmp_path / "labels") if word not in ("--epochs", "2")]
    annotation.main([*words, *crops_of(folder, "seed=3", "num_train_epochs=1.5")])
    output = capsys.readouterr().out
    assert "labels of 20 crops in each of 2 epochs (data_seed 3, image_size [32, 32], crop_scale_min 0.2" in output
    # 7 classes, 5 x 5 cells, 2 bytes each, 60 for the key, and 6 files
    assert "up to about 1,310 bytes a crop, 0.1 MB in all" in output
    assert re.search(r"% of 40 maps of crops have the human label as their first class\n", output)
    prepare(folder, tmp_path / "run", "--token_labels", str(tmp_path / "labels"), "--seed", "3")


@pytest.mark.parametrize(("options", "epochs"), [([], 4), (["--max_steps", "11"], 3), (["--min_steps", "22"], 5)])
def test_epochs_of_a_run(folder, options, epochs):
    _, _, args = parse([str(folder / "recipe.yaml"), *options, "--per_device_train_batch_size", "4"])
    assert run_epochs(args, 20) == epochs


def test_shards_hold_rows_of_one_epoch(trainers):
    batches = CropBatches(trainers[1].train_dataset, None, seed=0, num_epochs=2, rows_per_shard=8, batch_size=3)
    assert batches.num_shards == 6
    assert [list(batches.shard_rows(shard)) for shard in (2, 3)] == [[16, 17, 18, 19], [*range(8)]]


def test_another_version_of_timm_is_said(folder, labels, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("timm.__version__", "9.9")
    monkeypatch.setattr(logging.getLogger("modeling_lvvit.token_labeling.trainer_setup"), "propagate", True)
    prepare(folder, tmp_path, "--token_labels", str(labels))
    assert "here is 9.9: if its RandAugment differs" in caplog.text


def test_labels_of_another_crop_stop_the_run(trainers):
    """Also where nothing compares the options, or a library draws otherwise with the same ones."""
    samples = trainers[0].train_dataset
    transform = samples.transform
    samples.transform = TrainTransform((32, 32), [0.5] * 3, [0.5] * 3, AugmentationConfig(crop_scale=(0.5, 1.0)))
    samples.start_epoch(0, 1)
    with pytest.raises(
        SampleError,
        match="row 2 of the training data does not belong to its crop in epoch 1: the labels are of the crop",
    ):
        samples[2]
    samples.transform = transform


def test_check_draws_the_crops_again(folder, labels, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    with pytest.raises(SystemExit) as ended:
        check_labels.main([str(labels), str(folder / "train.parquet"), "--contact_sheet", str(sheet)])
    output = capsys.readouterr().out
    assert ended.value.code == 0, output
    assert "40 label maps, 0 of them empty" in output
    assert "all 20 images have a label map of their crop in each of 2 epochs" in output
    assert sheet.stat().st_size > 10_000


def test_check_refuses_other_images(folder, labels, tmp_path, capsys):
    parquet.write_table(labelled_table(10), tmp_path / "train.parquet")
    with pytest.raises(SystemExit) as ended:
        check_labels.main([str(labels), str(tmp_path / "train.parquet")])
    assert ended.value.code == 1
    assert "keys of the label set belong to no image of" in capsys.readouterr().out


def test_card_and_record_say_what_the_crops_are(labels):
    settings = json.loads((labels / "token_labels.json").read_text())["settings"]
    assert settings["epochs"] == 2 and settings["num_rows"] == 20 and settings["rows.max_train_samples"] == 20
    card = (labels / "README.md").read_text()
    assert "20 training crops in each of 2 epochs" in card and "| crops.crop_scale_min | 0.2 |" in card


def test_labels_of_crops_are_no_labels_of_images(labels):
    rows = LabelSet.open(str(labels), "train")
    with pytest.raises(ValueError, match="labels of training crops"):
        rows.join(rows.rows)
    with pytest.raises(ValueError, match="Train without `streaming`"):
        LabelLookup(rows)
