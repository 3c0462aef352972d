"""Image folders: every image is used once, in the split and class that its folders name, or what is left out is named."""

import logging
import os
import random
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import datasets
import pandas as pd
import pytest
from PIL import Image

from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.open_data import OpenedData, open_datasets
from modeling_lvvit.data.classes.class_labels import class_counts
from modeling_lvvit.data.image_folder import image_suffixes, read_layout
from modeling_lvvit.data.sources import open_splits
from modeling_lvvit.evaluate.test_sets import open_test_set


FORMATS = {"png": "PNG", "gif": "GIF", "webp": "WEBP", "avif": "AVIF", "bmp": "BMP", "tif": "TIFF"}


def add_images(folder: Path, count: int, name: str = "{}.jpg") -> None:
    """Writes different images; `{}` in their name stands for a number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = folder / name.format(number)
        color = tuple(random.Random(str(file)).randbytes(3))
        Image.new("RGB", (8, 8), color).save(file, format=FORMATS.get(file.suffix.lower()[1:], "JPEG"))


def open_folder(folder: Path, **options) -> OpenedData:
    return open_datasets(DataArguments(dataset_name=str(folder), **options), seed=0)


def counts(rows: datasets.Dataset) -> dict[str, int]:
    """Images of each class that has any."""
    pairs = zip(rows.features["label"].names, class_counts(rows, "label").tolist())
    return {name: count for name, count in pairs if count}


def paths(rows: datasets.Dataset) -> set[str]:
    return {value["path"] for value in rows.with_format("arrow")[:]["image"].to_pylist()}


def split_counts(folder: Path) -> dict[str, dict[str, int]]:
    return {name: counts(rows) for name, rows in open_splits(str(folder)).items()}


# --- folders as people have them: what is opened ---


def test_file_names_are_no_splits(tmp_path):
    for name in ("cat", "dog"):
        add_images(tmp_path / name, 17)
        add_images(tmp_path / name, 3, f"{name}_on_train_{{}}.jpg")
    assert split_counts(tmp_path) == {"train": {"cat": 20, "dog": 20}}


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("bus", "car", "train"):
        add_images(tmp_path / "nested" / "train" / name, 8)
        add_images(tmp_path / "nested" / "test" / name, 4)
        add_images(tmp_path / "flat" / name, 5)
    classes = ("bus", "car", "train")
    assert split_counts(tmp_path / "nested") == {"train": dict.fromkeys(classes, 8), "test": dict.fromkeys(classes, 4)}
    assert split_counts(tmp_path / "flat") == {"train": dict.fromkeys(classes, 5)}


@pytest.mark.parametrize(
    "names", [("dev-board", "eval-board"), ("test_a", "test_b"), ("validation rules", "train set")]
)
def test_classes_whose_names_begin_with_a_split(names, tmp_path):
    for name in names:
        add_images(tmp_path / name, 5)
    assert split_counts(tmp_path) == {"train": dict.fromkeys(sorted(names), 5)}


@pytest.mark.parametrize(
    "folders", [("Train", "Val"), ("TRAIN", "VALID"), ("training", "dev"), ("train", "Validation"), ("train", "eval")]
)
def test_splits_in_any_case(folders, tmp_path):
    for folder, count in zip(folders, (8, 4)):
        for name in ("cat", "dog"):
            add_images(tmp_path / folder / name, count)
    assert split_counts(tmp_path) == {"train": {"cat": 8, "dog": 8}, "validation": {"cat": 4, "dog": 4}}


def test_endings_in_any_case_and_all_that_pillow_opens(tmp_path):
    names = [
        "{}.jpg",
        "{}.Jpg",
        "{}.JPEG",
        "{}.jfif",
        "{}a.Png",
        "{}.GIF",
        "{}.webp",
        "{}.avif",
        "{}.BMP",
        "{}.tif",
        "{}",
    ]
    for name in names:
        add_images(tmp_path / "train" / "cat", 2, name)
        add_images(tmp_path / "train" / "dog", 1, name)
    assert split_counts(tmp_path) == {"train": {"cat": 2 * len(names), "dog": len(names)}}
    assert {".avif", ".jp2", ".qoi", ".tga"} <= image_suffixes()
    assert not {".pdf", ".mpg", ".h5", ".wmf"} & image_suffixes()  # that Pillow writes only, or recognizes only


def test_linked_folders_and_files_are_followed(tmp_path):
    for name in ("cat", "dog"):
        add_images(tmp_path / "store" / name, 6)
        (tmp_path / "set").mkdir(exist_ok=True)
        os.symlink(tmp_path / "store" / name, tmp_path / "set" / name)
    add_images(tmp_path / "elsewhere", 2, "new_{}.jpg")
    os.symlink(tmp_path / "elsewhere" / "new_0.jpg", tmp_path / "set" / "cat" / "linked.jpg")
    assert split_counts(tmp_path / "set") == {"train": {"cat": 7, "dog": 6}}


@pytest.mark.parametrize("name", ["my [set]", "what?", "a*b", "{x}", "spaces and ümläuts"])
def test_paths_with_signs_of_patterns(name, tmp_path):
    for class_name in ("cat [1]", "dog?"):
        add_images(tmp_path / name / class_name, 4)
    assert split_counts(tmp_path / name) == {"train": {"cat [1]": 4, "dog?": 4}}


def test_hidden_and_system_files_are_ignored(tmp_path, caplog):
    for name in ("cat", "dog"):
        for split, count in (("train", 5), ("val", 2)):
            add_images(tmp_path / split / name, count)
            add_images(tmp_path / split / name / "@eaDir" / "0.jpg", 1, "SYNOFILE_THUMB_{}.jpg")
            add_images(tmp_path / split / name, 1, "._{}.jpg")
            (tmp_path / split / name / "Thumbs.db").write_bytes(b"thumbs")
    for junk in (tmp_path / "@eaDir", tmp_path / "train" / "__MACOSX", tmp_path / "train" / ".ipynb_checkpoints"):
        add_images(junk, 2)
    (tmp_path / ".DS_Store").write_bytes(b"store")
    assert split_counts(tmp_path) == {"train": {"cat": 5, "dog": 5}, "validation": {"cat": 2, "dog": 2}}
    assert caplog.text == ""


def test_a_folder_around_all_others_is_passed_over(tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / "photos" / "train" / name, 5)
        add_images(tmp_path / "photos" / "val" / name, 2)
    assert split_counts(tmp_path) == {"train": {"cat": 5, "dog": 5}, "validation": {"cat": 2, "dog": 2}}
    assert "The images are read from photos/, the only folder with images." in caplog.text


def test_folders_inside_class_folders(tmp_path, caplog):
    for name in ("cat", "dog"):
        for part in ("a", "b"):
            add_images(tmp_path / "train" / name / part, 3)
    assert split_counts(tmp_path) == {"train": {"cat": 6, "dog": 6}}
    assert "12 images lie in folders inside class folders and have the class of the outer one" in caplog.text


def test_accents_in_class_names_are_composed(tmp_path):
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        add_images(tmp_path / split / name, 3)
        add_images(tmp_path / split / "tea", 3)
    assert split_counts(tmp_path) == {"train": {"caf\u00e9": 3, "tea": 3}, "validation": {"caf\u00e9": 3, "tea": 3}}


# --- what is left out is named ---


def test_stray_images_are_named(tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / "train" / name, 5)
        add_images(tmp_path / "val" / name, 2)
    add_images(tmp_path / "train", 1, "overview.jpg")
    add_images(tmp_path, 1, "logo.png")
    assert split_counts(tmp_path) == {"train": {"cat": 5, "dog": 5}, "validation": {"cat": 2, "dog": 2}}
    assert "Left out, in no class folder: 1: train/overview.jpg." in caplog.text
    assert "Left out, in no folder of a split: 1: logo.png." in caplog.text


def test_other_files_are_counted_by_ending(tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / name, 5)
        for number in range(5):
            for ending in ("xml", "json", "txt"):
                (tmp_path / name / f"{number}.{ending}").write_text("{}")
        (tmp_path / name / "clip.mp4").write_bytes(b"film")
        (tmp_path / name / "raw.heic").write_bytes(b"photo")
    assert split_counts(tmp_path) == {"train": {"cat": 5, "dog": 5}}
    assert "Left out, no image files: 34 (10 .json, 10 .txt, 10 .xml, 2 .heic, 2 .mp4): cat/0.json" in caplog.text


def test_links_to_nothing_in_circles_and_to_the_same_file(tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / name, 5)
    os.symlink(tmp_path / "gone.jpg", tmp_path / "cat" / "gone.jpg")
    os.symlink(tmp_path, tmp_path / "cat" / "up")
    os.symlink("itself.jpg", tmp_path / "cat" / "itself.jpg")
    shutil.copy(tmp_path / "cat" / "0.jpg", os.fsencode(tmp_path) + b"/cat/\xe9.jpg")
    os.symlink(tmp_path / "cat" / "0.jpg", tmp_path / "cat" / "again.jpg")
    os.link(tmp_path / "dog" / "0.jpg", tmp_path / "dog" / "hard.jpg")
    assert split_counts(tmp_path) == {"train": {"cat": 5, "dog": 5}}
    for reason in (
        "a link to nothing: 2: cat/gone.jpg, cat/itself.jpg", "a link to a folder above it: 1: cat/up",
        "names that are no UTF-8: 1: cat/\ufffd.jpg",
    ):  # fmt: skip
        assert f"Left out, {reason}." in caplog.text
    assert "Left out, links to an image that is there already: 2: cat/again.jpg, dog/hard.jpg." in caplog.text


def test_empty_class_folders_and_classes_of_one_split_are_named(tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / "train" / name, 5)
        add_images(tmp_path / "val" / name, 2)
    add_images(tmp_path / "val" / "bird", 2)
    add_images(tmp_path / "train" / "fish", 3)
    (tmp_path / "train" / "horse").mkdir()
    opened = open_folder(tmp_path)
    assert counts(opened.train) == {"cat": 5, "dog": 5, "fish": 3}
    assert counts(opened.evaluation) == {"bird": 2, "cat": 2, "dog": 2}
    assert "The folder train/horse is empty." in caplog.text
    assert "1 of 4 classes have no training image: bird." in caplog.text
    assert "1 of 4 classes have no evaluation image: fish." in caplog.text
    assert opened.describe("label") == [
        "training: 13 images of 3 classes, from 3 (fish) to 5 (cat)",
        "evaluation (validation): 6 images of 3 classes, 2 each",
    ]


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_evaluation_split_without_classes_is_not_evaluated_on(split, tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / "train" / name, 10)
    add_images(tmp_path / split, 5)
    opened = open_folder(tmp_path)
    assert (len(opened.train), len(opened.evaluation)) == (18, 2)
    assert paths(opened.train) | paths(opened.evaluation) == {str(path) for path in tmp_path.glob("train/*/*.jpg")}
    assert "has no labels, so it cannot be evaluated on" in caplog.text
    assert "No evaluation split: 10 % of the training rows are held out for it." in caplog.text


# --- what cannot be told is refused ---


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test"), "the 3 rows of split train lie in none"),
        (("images",), "the 3 rows of split train lie in none"),
        (("train/cat", "val/cat", "dev/cat"), "The folders dev and val are both the split validation"),
        (("train/cat", "Train/cat"), "The folders Train and train are both the split train"),
        (("train/cat", "val/cat", "extra/cat"), "The folders train, val are called after splits, extra are not"),
    ],
)
def test_folders_that_tell_no_splits_or_classes_are_refused(folders, message, tmp_path):
    for folder in folders:
        add_images(tmp_path / folder, 3)
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path / "images" if folders == ("images",) else tmp_path)


def test_no_image_is_in_two_splits_or_classes(tmp_path):
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            add_images(tmp_path / split / name, 3)
    os.symlink(tmp_path / "train" / "cat" / "0.jpg", tmp_path / "val" / "cat" / "copy.jpg")
    with pytest.raises(ValueError, match="copy.jpg is the same file as train/cat/0.jpg: an image must not be in"):
        open_splits(str(tmp_path))
    (tmp_path / "val" / "cat" / "copy.jpg").unlink()
    os.link(tmp_path / "train" / "cat" / "0.jpg", tmp_path / "train" / "dog" / "copy.jpg")
    with pytest.raises(ValueError, match="is the same file as train/cat/0.jpg, and both are classes"):
        open_splits(str(tmp_path))


# --- metadata ---


def write_metadata(file: Path, **columns) -> None:
    table = pd.DataFrame(columns)
    writers = {".csv": table.to_csv, ".parquet": table.to_parquet}
    if file.suffix == ".jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        writers[file.suffix](file, index=False)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("place", ["", "train"])
def test_metadata_without_labels_keeps_the_class_folders(suffix, place, tmp_path):
    for name in ("cat", "dog"):
        add_images(tmp_path / "train" / name, 4)
    files = sorted(path.relative_to(tmp_path / place).as_posix() for path in tmp_path.glob("train/*/*.jpg"))
    write_metadata(tmp_path / place / f"metadata{suffix}", file_name=files[::-1], photographer=list("abcdefgh"))
    rows = open_splits(str(tmp_path))["train"]
    assert counts(rows) == {"cat": 4, "dog": 4}
    assert rows[0]["photographer"] == "h"  # of the image with the first path


def test_labels_of_metadata_go_before_folders(tmp_path, caplog):
    for name in ("cat", "dog"):
        add_images(tmp_path / "train" / name, 4)
    write_metadata(tmp_path / "train" / "metadata.csv", file_name=["cat/0.jpg", "dog/1.jpg"], label=["tiger", "wolf"])
    rows = open_splits(str(tmp_path))["train"]
    assert rows["label"][:] == ["tiger", "wolf"]
    assert "Left out, without a row in the metadata: 6: train/cat/1.jpg" in caplog.text


def test_metadata_list_images_outside_class_folders(tmp_path, caplog):
    add_images(tmp_path / "train", 3)
    add_images(tmp_path / "train" / "more", 2)
    files = ["0.jpg", "1.jpg", "2.jpg", "more/0.jpg", "more/1.jpg"]
    write_metadata(tmp_path / "train" / "metadata.jsonl", file_name=files, label=["001", "002", "001", "002", "010"])
    assert open_splits(str(tmp_path))["train"]["label"][:] == ["001", "002", "001", "002", "010"]
    assert caplog.text == ""


def test_images_of_a_file_system_without_inodes_are_all_used(tmp_path, monkeypatch):
    """Those of FUSE may give every entry of a folder the same one."""

    class Entry:
        def __init__(self, entry):
            self.entry = entry

        def __getattr__(self, name):
            return (lambda: 2**32 - 1) if name == "inode" else getattr(self.entry, name)

    for name in ("cat", "dog"):
        add_images(tmp_path / name, 4)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: nullcontext(map(Entry, scandir(path))))
    assert split_counts(tmp_path) == {"train": {"cat": 4, "dog": 4}}


def test_further_file_columns_are_images(tmp_path):
    add_images(tmp_path / "train" / "images", 3)
    add_images(tmp_path / "train" / "masks", 3, "{}.png")
    files = [f"images/{number}.jpg" for number in range(3)]
    masks = [f"masks/{number}.png" for number in range(3)]
    write_metadata(tmp_path / "train" / "metadata.csv", file_name=files, mask_file_name=masks)
    rows = open_splits(str(tmp_path))["train"]
    assert rows.column_names == ["image", "mask"]
    assert isinstance(rows.features["mask"], datasets.Image)
    assert rows[2]["mask"].getpixel((0, 0)) == Image.open(tmp_path / "train" / "masks" / "2.png").getpixel((0, 0))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file_name": ["cat/9.jpg"]}, "names 1 files that are not there: train/cat/9.jpg"),
        ({"file_name": ["cat/0.jpg", "cat/0.jpg"]}, "several rows for train/cat/0.jpg"),
        ({"name": ["cat/0.jpg"]}, "needs a column 'file_name'"),
        ({"file_name": ["metadata.csv"]}, "names files that are no images"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(columns, message, tmp_path):
    add_images(tmp_path / "train" / "cat", 2)
    write_metadata(tmp_path / "train" / "metadata.csv", **columns)
    with pytest.raises(ValueError, match=message):
        open_splits(str(tmp_path))


# --- whole trees ---


ENDINGS = (".jpg", ".JPG", ".jpeg", ".Png", ".webp", ".gif", ".bmp", "")
CLASSES = ("cat", "dog", "train", "Val", "test set", "eval-board", "[x]", "été", "0")
JUNK = ("notes.txt", "labels.xml", "clip.mp4", "README.md", "a.csv")
HIDDEN = (".hidden.jpg", "._0.jpg", "Thumbs.db")


def grow_tree(root: Path, draw: random.Random) -> dict[str, Counter]:
    """Writes a random tree, and returns the images of each class in each split that the rule of image folders gives it."""
    splits = draw.choice([{}, {"train": "train"}, {"Train": "train", "VAL": "validation"}, {"training": "train", "test": "test", "dev": "validation"}])  # fmt: skip
    top = root / draw.choice(["", "", "photos"])
    expected = {}
    for folder, split in (splits or {"": "train"}).items():
        names = draw.sample(CLASSES, draw.randint(2, 5))
        if not splits:  # two class folders called after splits would be splits
            names = [name for name in names if name not in ("train", "Val")] + ["cow", "pig"]
        expected[split] = Counter()
        for name in names:
            place, count = top / folder / name, draw.randint(1, 6)
            deep = place / "more" if draw.random() < 0.2 else place
            for number in range(count):
                add_images(deep if number % 2 else place, 1, f"train_{number}_{{}}{draw.choice(ENDINGS)}")
            expected[split][name] = count
            if draw.random() < 0.3:
                (root.parent / "store").mkdir(exist_ok=True)
                target = root.parent / "store" / f"{root.name}_{split}_{name}"
                shutil.move(place, target)
                os.symlink(target, place)
            for junk in draw.sample(JUNK, draw.randint(0, 2)):
                (place / junk).write_text("junk")
            for junk in draw.sample(HIDDEN, draw.randint(0, 2)):
                shutil.copy(next(file for file in place.rglob("*") if file.is_file()), place / junk)
        if draw.random() < 0.3:
            add_images(top / folder / "@eaDir", 1)
        if draw.random() < 0.3:
            add_images(top / folder, 1, "overview_{}.jpg") if top != root or splits else None
        if draw.random() < 0.3:
            (top / folder / "empty").mkdir()
    return expected


@pytest.mark.parametrize("seed", range(40))
def test_random_trees_are_opened_whole(seed, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    root = tmp_path / "tree"
    expected = grow_tree(root, random.Random(seed))
    opened = {name: counts(rows) for name, rows in open_splits(str(root)).items()}
    assert opened == {name: dict(sorted(classes.items())) for name, classes in expected.items()}
    # nothing on the disk is neither used, named, nor hidden
    layout, _ = read_layout(root)
    used = {path for rows in layout.splits.values() for path, _ in rows}
    named = {path for files in layout.left_out.values() for path in files}
    on_disk = {
        (Path(folder) / file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, followlinks=True)
        for file in files
        if "@eaDir" not in folder and file not in HIDDEN
    }
    assert used | named == on_disk
    assert not used & named
    assert len(used) == sum(sum(classes.values()) for classes in expected.values())
    assert all(line.split(": ")[0] in caplog.text for line in layout.warnings())


def test_all_programs_open_folders_alike(tmp_path):
    for name in ("cat", "dog"):
        add_images(tmp_path / "Train" / name, 3, "{}.JPG")
        add_images(tmp_path / "Val" / name, 2, "on_train_{}.png")
    expected = {str(path) for path in tmp_path.glob("Val/*/*")}
    assert paths(open_folder(tmp_path).evaluation) == paths(open_test_set(str(tmp_path)).rows) == expected
    stream = open_splits(str(tmp_path), streaming=True)["train"]
    assert len(list(stream)) == len(open_splits(str(tmp_path))["train"]) == 6
