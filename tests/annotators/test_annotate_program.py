"""The annotation program: odd images, many classes, kills, full disks, streams, the Hub."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators import annotate
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.five_crop import FiveCrop
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.labels.packing import unpacked_rows
from modeling_lvvit.labels.reader import LabelMapReader
from modeling_lvvit.token_labeling import (
    TokenLabelDataset,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from support.classifiers import save_annotator
from support.images import encode_image
from support.local_hub import local_hub
from support.models import tiny_config
from support.programs import ROOT


NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]


def save_images(path: Path, contents: list[bytes], names: list[str]) -> Path:
    """A Parquet file of images that are called 0.img, 1.img and so on."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"bytes": content, "path": f"{row}.img"} for row, content in enumerate(contents)]
    columns = [pa.array(rows, datasets.Image().pa_type), pa.array(np.arange(len(rows)) % len(names))]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_arrays(columns, schema=features.arrow_schema), path)
    return path


def random_images(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 70, (count, 2))
    return [encode_image(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for height, width in sizes]


@pytest.fixture(scope="module")
def annotator(tmp_path_factory) -> Path:
    return save_annotator(tmp_path_factory.mktemp("annotator"), NAMES)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return save_images(tmp_path_factory.mktemp("images") / "train.parquet", random_images(150), NAMES)


def options(images: Path, annotator: Path, output: Path, *more: str) -> list[str]:
    return [
        "--dataset",
        str(images),
        "--annotator",
        str(annotator),
        "--output_dir",
        str(output),
        "--top_k",
        "3",
        *more,
    ]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def everything(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def labels(images, annotator, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("labels") / "set"
    annotate.main(options(images, annotator, folder))
    return folder


def test_maps_of_five_windows(images, annotator, labels, tmp_path, capsys):
    """Each map is that of the views of its image; the record says so; a set begun without windows is another one."""
    annotate.main(options(images, annotator, tmp_path / "set", "--five_crop", "--max_samples", "20"))
    assert "% of 20 images" in capsys.readouterr().out
    rows = LabelSet.open(str(tmp_path / "set"), "train").rows
    maps = LabelMapReader(rows).fetch([0, 7])
    loaded = load_annotator(str(annotator))
    views, table = FiveCrop(loaded), datasets.load_dataset("parquet", data_files=str(images), split="train")
    by_name = {f"{row}.img": row for row in range(len(table))}
    for offset, row in enumerate((0, 7)):
        image = table[by_name[rows[row]["image_key"]]]["image"].convert("RGB")
        with torch.inference_mode():
            scores = views.score_map(views.prepare(image)[0][None])[0]
        stored = torch.from_numpy(maps.scores[offset].astype(np.float32))
        taken = scores.gather(0, torch.from_numpy(np.asarray(maps.ids[offset]).astype(np.int64)))
        torch.testing.assert_close(stored, taken, atol=2e-3, rtol=2e-3)
        assert torch.equal(stored.amin(0), scores.topk(3, dim=0).values[-1].half().float())
    assert json.loads((tmp_path / "set" / "token_labels.json").read_text())["settings"]["five_crop"] == 0.6
    with pytest.raises(SystemExit, match="five_crop"):
        annotate.main(options(images, annotator, tmp_path / "set", "--max_samples", "20"))


def test_label_set_loads_and_describes_itself(labels):
    rows = datasets.load_dataset(str(labels), split="train")
    assert len(rows) == 150
    assert rows.features["token_label_palette"].feature.names == NAMES
    assert np.array(unpacked_rows(rows)[3]["token_label_scores"]).shape == (3, 6, 6)
    assert rows[3]["image_key"] == "3.img"
    card = (labels / "README.md").read_text()
    assert "150 images" in card
    assert "| k | 3 |" in card
    assert "--preset own_images --variant auto --output_dir run" in card  # few images


def test_sets_of_one_folder_name_are_not_confused(annotator, tmp_path):
    for seed in (1, 2):
        images = save_images(tmp_path / str(seed) / "train.parquet", random_images(5 * seed, seed), NAMES)
        annotate.main(options(images, annotator, tmp_path / f"{seed}" / "set"))
    sizes = [len(datasets.load_dataset(str(tmp_path / f"{seed}" / "set"), split="train")) for seed in (1, 2)]
    assert sizes == [5, 10]


def test_second_run_changes_nothing(labels, images, annotator):
    before = everything(labels)
    annotate.main(options(images, annotator, labels))
    assert everything(labels) == before


def test_missing_and_damaged_shards_are_made_again(labels, images, annotator, tmp_path):
    before = everything(labels)
    (labels / "data" / "train-00001.parquet").unlink()
    (labels / "data" / "train-00000.parquet").write_bytes(before["data/train-00000.parquet"][:500])
    (labels / "README.md").unlink()
    annotate.main(options(images, annotator, labels))
    assert everything(labels) == before


def test_other_settings_are_refused(labels, images, annotator):
    with pytest.raises(SystemExit, match=r"other settings.*\n.*scores: 'logits' there, 'relative' now"):
        annotate.main(options(images, annotator, labels, "--scores", "relative"))


def test_stream_gives_the_same_shards(labels, images, annotator, tmp_path):
    annotate.main(options(images, annotator, tmp_path / "set", "--streaming", "--rows_per_shard", "64"))
    assert shards(tmp_path / "set") == shards(labels)


def odd_images() -> dict[str, bytes]:
    """Files of many kinds, by what the report says of them."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (30, 44, 3), dtype=np.uint8)
    original = Image.fromarray(colors)

    def encoded(image: Image.Image, file_format: str, **arguments) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, format=file_format, **arguments)
        return buffer.getvalue()

    rotated = original.getexif()
    rotated[0x0112] = 6
    return {
        "": encode_image(colors),
        "CMYK, converted to RGB": encoded(original.convert("CMYK"), "JPEG"),
        "grayscale": encoded(original.convert("L"), "PNG"),
        "16-bit, scaled to 8": encoded(Image.fromarray(rng.integers(0, 65536, (30, 44), dtype=np.uint16)), "PNG"),
        "animation, first frame used": encoded(original, "GIF", save_all=True, append_images=[original.rotate(90)]),
        "turned upright as its Exif orientation says": encoded(original, "JPEG", exif=rotated),
        "transparency dropped": encoded(original.convert("RGBA"), "PNG"),
        "unreadable: image file is truncated": encode_image(colors)[:-300],
        "unreadable: cannot identify image file": b"this is no image",
    }


def test_odd_images_are_named_in_the_report(annotator, tmp_path, capsys):
    contents = odd_images()
    images = save_images(tmp_path / "odd" / "train.parquet", list(contents.values()), NAMES)
    annotate.main(options(images, annotator, tmp_path / "set", "--on_error", "empty"))
    report = capsys.readouterr().out
    assert f"train: {len(contents)} images of {min(len(contents), len(NAMES))} classes" in report
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train")
    for row, note in enumerate(contents):
        assert rows[row]["image_note"].startswith(note)
        assert bool(rows[row]["token_label_palette"]) != note.startswith("unreadable")
        assert not note or f"{note}" in report
        assert not note or f"{row}.img" in report


def test_damaged_image_stops_and_what_is_done_stays(annotator, tmp_path):
    contents = [*random_images(70), b"this is no image"]
    images = save_images(tmp_path / "odd" / "train.parquet", contents, NAMES)
    with pytest.raises(SystemExit, match=r"Image 70\.img is unreadable: cannot identify image file"):
        annotate.main(options(images, annotator, tmp_path / "set"))
    assert sorted(path.name for path in (tmp_path / "set" / "data").glob("[!.]*")) == ["train-00000.parquet"]


def test_full_disk_is_said_and_the_set_continues(images, annotator, labels, tmp_path, monkeypatch):
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("modeling_lvvit.data.files.atomic_files.os.fsync", fsync)
        with pytest.raises(SystemExit, match=r"train-00001\.parquet cannot be written: No space left.*start the same"):
            annotate.main(options(images, annotator, tmp_path / "set"))
    assert sorted(path.name for path in (tmp_path / "set" / "data").glob("[!.]*")) == ["train-00000.parquet"]
    annotate.main(options(images, annotator, tmp_path / "set"))
    assert everything(tmp_path / "set") == everything(labels)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--annotator", "no/such/model"], "cannot be loaded"),
        (["--annotator", "timm/no_such_network", "--random_weights"], "cannot be loaded"),
        (["--dataset", "./no_such_folder"], "There is no dataset"),
        (["--image_column", "photo"], "no column 'photo'"),
        (["--key_column", "name"], "no column 'name'"),
        (["--key_column", "label"], "have the same key: '0'"),
        (["--dataset", "{images}", "--split", "dev"], "no split 'dev'"),
        (["--batch_size", "0"], "at least 1"),
        (["--class_map", "no_such_file.json"], "no class map"),
        (["--output_dir", "/proc/labels"], "proc/labels"),
    ],
)
def test_mistakes_stop_before_any_work(images, annotator, tmp_path, more, message):
    more = [word.replace("{images}", str(images.parent)) for word in more]
    with pytest.raises(SystemExit, match=message):
        annotate.main(options(images, annotator, tmp_path / "set", *more))
    assert not (tmp_path / "set").exists()


def test_more_classes_than_there_are_means_all(images, annotator, tmp_path, caplog):
    logging.getLogger("modeling_lvvit.annotators.annotate").addHandler(caplog.handler)
    annotate.main(options(images, annotator, tmp_path / "a", "--top_k", "9", "--max_samples", "5"))
    assert "--top_k 9 is more than the 7 classes: every cell keeps all of them" in caplog.text
    annotate.main(options(images, annotator, tmp_path / "b", "--top_k", "7", "--max_samples", "5"))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_classes_are_matched_by_name(images, tmp_path, labels):
    shuffled = save_annotator(tmp_path / "annotator", [name.upper() for name in reversed(NAMES)])
    annotate.main(options(images, shuffled, tmp_path / "set"))
    given = unpacked_rows(datasets.load_dataset(str(labels), split="train"))
    found = unpacked_rows(datasets.load_dataset(str(tmp_path / "set"), split="train"))
    assert found.features["token_label_palette"].feature.names == NAMES
    mirrored = [6 - index for index in reversed(given[0]["token_label_palette"])]
    assert found[0]["token_label_palette"] == mirrored  # the same scores, counted from the other end


def test_annotator_with_other_classes_is_refused(images, tmp_path):
    other = save_annotator(tmp_path / "annotator", ["ant", "bee", "cat", "dog", "emu", "fox", "yak"])
    with pytest.raises(SystemExit, match=r"only in the dataset: 'gnu'\n.*only in the annotator: 'yak'"):
        annotate.main(options(images, other, tmp_path / "set"))


def save_plain(path: Path, labels: pa.Array | None, count: int = 6) -> Path:
    """Images with a label column that names no classes, or without one."""
    columns = {"image": pa.array([{"bytes": content, "path": f"{row}.img"} for row, content in
                                  enumerate(random_images(count))])}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns if labels is None else {**columns, "label": labels}), path)
    return path


def test_numbers_without_names_need_the_users_word(annotator, tmp_path):
    images = save_plain(tmp_path / "images" / "train.parquet", pa.array([0, 1, 2, 0, 1, 6]))
    with pytest.raises(SystemExit, match="numbers that are not named.*'ant', 'bee'.*--annotator_class_map identity"):
        annotate.main(options(images, annotator, tmp_path / "set"))
    annotate.main(options(images, annotator, tmp_path / "set", "--class_map", "identity"))
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train")
    assert rows.features["token_label_palette"].feature.names == NAMES


def test_text_labels_are_matched_as_training_counts_them(annotator, tmp_path):
    images = save_plain(tmp_path / "images" / "train.parquet", pa.array(["dog", "ant", "emu", "dog", "ant", "emu"]))
    with pytest.raises(SystemExit, match="only in the annotator: 'bee', 'cat', 'fox', 'gnu'"):
        annotate.main(options(images, annotator, tmp_path / "set"))
    annotate.main(options(images, annotator, tmp_path / "set", "--ignore_extra_classes"))
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train")
    assert rows.features["token_label_palette"].feature.names == ["ant", "dog", "emu"]


def test_images_without_labels_get_the_annotators_classes(annotator, tmp_path):
    images = save_plain(tmp_path / "images" / "train.parquet", None)
    with pytest.raises(SystemExit, match="no column 'kind' to match classes with"):
        annotate.main(options(images, annotator, tmp_path / "other", "--label_column", "kind"))
    annotate.main(options(images, annotator, tmp_path / "set"))
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train")
    assert rows.features["token_label_palette"].feature.names == NAMES


def test_empty_labels_may_be_allowed_after_a_stop(annotator, tmp_path):
    images = save_images(tmp_path / "odd" / "train.parquet", [*random_images(70), b"no image"], NAMES)
    with pytest.raises(SystemExit, match="--on_error empty; then start again"):
        annotate.main(options(images, annotator, tmp_path / "set"))
    kept = (tmp_path / "set" / "data" / "train-00000.parquet").stat().st_mtime_ns
    annotate.main(options(images, annotator, tmp_path / "set", "--on_error", "empty"))
    assert (tmp_path / "set" / "data" / "train-00000.parquet").stat().st_mtime_ns == kept
    assert len(shards(tmp_path / "set")) == 2


def test_stream_of_other_data_is_not_continued(annotator, tmp_path):
    images = save_images(tmp_path / "images" / "train.parquet", random_images(9), NAMES)
    more = ("--streaming", "--rows_per_shard", "4")
    annotate.main(options(images, annotator, tmp_path / "set", *more))
    save_images(images, random_images(8), NAMES)
    with pytest.raises(SystemExit, match="other settings.*\\n.*dataset_state"):
        annotate.main(options(images, annotator, tmp_path / "set", *more))


def test_many_classes_from_annotation_to_a_training_step(tmp_path):
    names = [f"class {index}" for index in range(21_841)]
    annotator = save_annotator(tmp_path / "annotator", names)
    images = save_images(tmp_path / "images" / "train.parquet", random_images(8), names)
    annotate.main(options(images, annotator, tmp_path / "set", "--top_k", "5"))
    rows = datasets.load_dataset(str(tmp_path / "images"), split="train")
    joined = LabelSet(datasets.load_dataset(str(tmp_path / "set"), split="train")).join(rows)
    assert joined.class_names == names
    transform = TrainTransform((32, 48), [0.5] * 3, [0.5] * 3)
    samples = TokenLabelDataset(rows, transform, label_maps=joined.label_maps)
    model = LVViTForImageClassification(tiny_config(num_labels=21_841))
    arguments = TokenLabelTrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, report_to="none", save_strategy="no"
    )
    result = TokenLabelTrainer(model, arguments, train_dataset=samples).train()
    assert np.isfinite(result.training_loss)


def start(arguments: list[str], folder: Path, processes: int, **environment: str) -> subprocess.Popen:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *launch, "dataset_scripts/annotate.py", *arguments],
        cwd=ROOT,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_tree(pid: int) -> None:
    """kill -9 for a process and all that it started; they have sessions of their own."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes)


@pytest.mark.slow
def test_killed_runs_of_two_processes_end_like_an_uninterrupted_one(images, annotator, labels, tmp_path):
    rng = np.random.default_rng(0)
    arguments = options(images, annotator, tmp_path / "set", "--rows_per_shard", "2")
    annotate.main(options(images, annotator, tmp_path / "whole", "--rows_per_shard", "2"))
    data = tmp_path / "set" / "data"
    for kill in range(2):
        process = start(arguments, tmp_path, processes=2)
        enough = 10 * kill + int(rng.integers(1, 10))
        while process.poll() is None and (not data.is_dir() or len(list(data.glob("*.parquet"))) < enough):
            time.sleep(0.01)
        kill_tree(process.pid)
        process.communicate()
        assert enough <= len(list(data.glob("*.parquet"))) < 75
    process = start(arguments, tmp_path, processes=2)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]
    assert everything(tmp_path / "set") == everything(tmp_path / "whole")


@pytest.mark.slow
def test_label_set_goes_to_the_hub_and_comes_back_by_name(images, annotator, labels, tmp_path):
    with local_hub() as hub:
        environment = hub.environment(tmp_path / "home")
        process = start(
            options(images, annotator, tmp_path / "set", "--push_to_hub", "user/labels"), tmp_path, 1, **environment
        )
        output, _ = process.communicate()
        assert process.returncode == 0, f"{output[-3000:]}\n{hub.unknown}"
        assert "published: " in output
        uploaded = hub.files("user/labels", "dataset")
        expected = everything(labels)
        card = expected.pop("README.md").replace(b"THIS_FOLDER", b"user/labels")  # its example names the repository
        assert {name: uploaded[name] for name in expected} == expected and uploaded["README.md"] == card
        command = ["dataset_scripts/check_token_labels.py", "user/labels", "--dataset", str(images)]
        check = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert check.returncode == 0, f"{check.stdout}{check.stderr[-3000:]}\n{hub.unknown}"
        assert "all 150 images that can be trained on have a label map" in check.stdout
