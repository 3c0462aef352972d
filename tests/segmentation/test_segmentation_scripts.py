"""The programs that write images and masks as Parquet files."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.segmentation.arguments import SegmentationDataArguments
from modeling_lvvit.segmentation.conversion import ade20k, image_mask_folder
from modeling_lvvit.segmentation.data import open_segmentation_data


@dataclass
class Done:
    """How a program ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys):
    def call(program, *arguments) -> Done:
        capsys.readouterr()
        try:
            program.main([*map(str, arguments)])
            code, message = 0, ""
        except SystemExit as stop:
            code, message = 1, stop.code
        out, err = capsys.readouterr()
        return Done(code, out, err + message)

    return call


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def release(tmp_path) -> Path:
    """The scene-parsing release in small: 3 training images, 1 for validation, classes 1 to 150."""
    folder, rng = tmp_path / "ADEChallengeData2016", np.random.default_rng(0)
    for split, name, count in (("training", "train", 3), ("validation", "val", 1)):
        for number in range(count):
            stem = f"ADE_{name}_{number:08d}"
            save(folder / "images" / split / f"{stem}.jpg", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
            save(folder / "annotations" / split / f"{stem}.png", rng.integers(0, 151, (20, 30), dtype=np.uint8))
    names = ["wall", "screen, door", "screen, CRT", *(f"thing {index}, synonym" for index in range(147))]
    lines = [f"{index}\t0.1\t1\t1\t{name}" for index, name in enumerate(names, start=1)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]) + "\n")
    (folder / "sceneCategories.txt").write_text("ADE_train_00000001 bathroom\n")
    return folder


def test_ade20k_release_becomes_parquet(run, release, tmp_path):
    done = run(ade20k, release, "--output_dir", tmp_path / "ade20k")
    assert done.returncode == 0, done.stderr
    assert "3 train and 1 validation images" in done.stdout
    found = datasets.load_dataset(str(tmp_path / "ade20k"))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "validation": 1}
    row = found["train"].cast_column("annotation", datasets.Image(decode=False))[1]
    assert row["scene_category"] == "bathroom"
    assert found["train"][0]["scene_category"] is None
    original = release / "annotations" / "training" / "ADE_train_00000001.png"
    assert row["annotation"]["bytes"] == original.read_bytes()  # as it was, 0 included
    names = json.loads((tmp_path / "ade20k" / "id2label.json").read_text())
    assert len(names) == 150 and names["0"] == "wall" and names["3"] == "thing 0"
    assert names["1"] == "screen, door" and names["2"] == "screen, CRT"  # the first synonym would not be unique
    assert run(ade20k, release, "--output_dir", tmp_path / "ade20k").stderr.strip().endswith("choose another folder.")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "objectInfo150.txt").unlink(), "objectInfo150.txt; it belongs to the release"),
        (lambda folder: (folder / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n"), "must name the classes 1 to 150"),
        (lambda folder: (folder / "annotations/training/ADE_train_00000000.png").unlink(), "have no partner"),
        (
            lambda folder: save(folder / "annotations/validation/ADE_val_00000000.png", np.zeros((30, 20), np.uint8)),
            "ADE_val_00000000.png is 20 x 30 pixels (width x height), its image 30 x 20",
        ),
        (
            lambda folder: (folder / "images/training/ADE_train_00000002.jpg").write_bytes(b"no image"),
            "ADE_train_00000002.jpg cannot be opened",
        ),
    ],
)  # fmt: skip
def test_damaged_releases_are_refused_and_nothing_is_left(run, release, tmp_path, spoil, message):
    spoil(release)
    done = run(ade20k, release, "--output_dir", tmp_path / "out")
    assert done.returncode == 1 and message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [release.name]


def test_folders_with_split_names_become_splits(run, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        save(tmp_path / "images" / split / "a.jpg", rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        save(tmp_path / "masks" / split / "a_mask.png", np.full((8, 12), 2, np.uint8))
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\n")
    arguments = (tmp_path / "images", tmp_path / "masks", "--output_dir", tmp_path / "out")
    done = run(image_mask_folder, *arguments, "--mask_suffix", "_mask", "--class_names", tmp_path / "names.txt")
    assert done.returncode == 0, done.stderr
    found = datasets.load_dataset(str(tmp_path / "out"))
    assert set(found) == {"train", "validation"}
    assert np.asarray(found["train"][0]["annotation"]).tolist() == np.full((8, 12), 2).tolist()
    assert json.loads((tmp_path / "out" / "id2label.json").read_text()) == {"0": "sky", "1": "road", "2": "car"}
    assert "have no partner" in run(image_mask_folder, *arguments).stderr  # without the suffix


def test_links_are_followed_and_files_of_any_image_ending_paired(run, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for number, ending in enumerate(("jpg", "GIF", "avif", "Png")):
        image = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
        save(tmp_path / "store" / f"{number}.{ending}", image)
        save(tmp_path / "masks" / "a" / f"{number}.png", np.full((8, 12), number % 2, np.uint8))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "notes.txt").write_text("notes")
    done = run(image_mask_folder, tmp_path / "images", tmp_path / "masks", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 4
    assert "Left out, no image files: 1 (1 .txt): a/notes.txt." in caplog.text


def test_colors_become_class_ids(run, tmp_path):
    colors = np.array([[[128, 64, 128], [0, 0, 255]], [[0, 0, 255], [1, 2, 3]]], dtype=np.uint8)
    save(tmp_path / "images" / "a.png", np.zeros((2, 2, 3), np.uint8))
    save(tmp_path / "masks" / "a.png", colors)
    (tmp_path / "colors.json").write_text('{"road": [128, 64, 128], "car": [0, 0, 255]}')
    arguments = (tmp_path / "images", tmp_path / "masks", "--output_dir", tmp_path / "out")
    assert "--colors turns colors into ids" in run(image_mask_folder, *arguments).stderr
    refused = run(image_mask_folder, *arguments, "--colors", tmp_path / "colors.json")
    assert refused.returncode == 1 and "1 colors that no class has: [1, 2, 3]" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = run(image_mask_folder, *arguments, "--colors", tmp_path / "colors.json", "--ignore_other_colors")
    assert done.returncode == 0, done.stderr
    row = datasets.load_dataset(str(tmp_path / "out"), split="train")[0]
    assert np.asarray(row["annotation"]).tolist() == [[0, 1], [1, 255]]


def test_ade20k_is_not_trained_with_shifted_classes(run, release, tmp_path):
    """A part of it may lack the class 150, whose value would be refused."""
    run(ade20k, release, "--output_dir", tmp_path / "ade20k")
    options = {"dataset_name": str(tmp_path / "ade20k"), "max_train_samples": 2, "max_eval_samples": 1}
    with pytest.raises(
        ValueError, match="says in mask_settings.json that 0 .* is no class .* give `reduce_labels` true"
    ):
        open_segmentation_data(SegmentationDataArguments(**options), seed=0)
    opened = open_segmentation_data(SegmentationDataArguments(**options, reduce_labels=True), seed=0)
    assert len(opened.class_names) == 150 and opened.encoding.reduce_labels


def binary_folders(folder: Path, file_format: str = "png") -> tuple[Path, Path]:
    """Images of 16 x 16 pixels and masks whose left half is 255; as JPEG with values near both."""
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    save(folder / "images" / "a.png", np.zeros((16, 16, 3), np.uint8))
    save(folder / "masks" / f"a.{file_format}", mask)
    return folder / "images", folder / "masks"


def test_values_that_count_no_classes_are_said(run, tmp_path):
    done = run(image_mask_folder, *binary_folders(tmp_path), "--output_dir", tmp_path / "out")
    assert "with the values 0, 255. If each is a class, train with `--mask_values 0 255`" in done.stdout
    assert "--mask_values 0 255" in (tmp_path / "out" / "README.md").read_text()
    images, masks = binary_folders(tmp_path / "counted")
    save(masks / "a.png", np.arange(256, dtype=np.uint8).reshape(16, 16) % 3)
    done = run(image_mask_folder, images, masks, "--output_dir", tmp_path / "counted" / "out")
    assert "with the values 0, 1, 2." in done.stdout and "--mask_values" not in done.stdout


def test_gray_levels_become_the_nearest_class(run, tmp_path):
    images, masks = binary_folders(tmp_path, "jpg")
    noisy = np.full((16, 16), 251, np.uint8)
    noisy[:, 8:] = np.random.default_rng(0).integers(0, 40, (16, 8))
    save(masks / "a.jpg", noisy)
    arguments = (images, masks, "--output_dir", tmp_path / "out", "--nearest_values", 0, 255)
    done = run(image_mask_folder, *arguments)
    assert done.returncode == 0, done.stderr
    row = datasets.load_dataset(str(tmp_path / "out"), split="train")[0]
    assert row["annotation"].format == "PNG"
    assert np.asarray(row["annotation"]).tolist() == [[1] * 8 + [0] * 8] * 16
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    done = run(image_mask_folder, *arguments, "--class_names", tmp_path / "names.txt")
    assert "3 class names and 2 --nearest_values" in done.stderr
    assert "2 to 255 different values" in run(image_mask_folder, *arguments[:-2], 3, 3).stderr


def test_colors_are_read_upright_and_lying_masks_are_explained(run, tmp_path):
    """Image and mask are stored lying, 2 x 3 pixels, and Exif turns both."""
    exif = Image.Exif()
    exif[0x0112] = 6
    colors = np.zeros((2, 3, 3), np.uint8)
    colors[0, 0] = 9
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(colors).save(tmp_path / name / "a.png", exif=exif)
    (tmp_path / "colors.json").write_text('{"a": [0, 0, 0], "b": [9, 9, 9]}')
    arguments = (tmp_path / "images", tmp_path / "masks", "--colors", tmp_path / "colors.json", "--output_dir")
    assert run(image_mask_folder, *arguments, tmp_path / "out").returncode == 0
    row = datasets.load_dataset(str(tmp_path / "out"), split="train")[0]
    assert np.asarray(row["annotation"]).tolist() == [[0, 1], [0, 0], [0, 0]]
    Image.fromarray(colors).save(tmp_path / "masks" / "a.png")
    done = run(image_mask_folder, *arguments, tmp_path / "b")
    assert "its image 2 x 3 once turned upright, as its Exif orientation (6) says" in done.stderr
