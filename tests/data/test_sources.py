"""Data sources other than image folders: Parquet files and their splits, cards that configure files, and what the cache keeps."""

from pathlib import Path

import datasets
import pytest

from modeling_lvvit.data.classes.class_labels import with_class_ids
from modeling_lvvit.data.sources import open_splits, parquet_splits
from support.images import labelled_table
from support.programs import ROOT


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/val-*
---
"""


def write_parquet(file: Path, num_rows: int, names: list[str], seed: int = 0) -> None:
    """Images with class ids that go round the names."""
    images = datasets.Dataset(labelled_table(num_rows, seed)).select_columns("image")
    file.parent.mkdir(parents=True, exist_ok=True)
    feature = datasets.ClassLabel(names=names)
    images.add_column("label", [row % len(names) for row in range(num_rows)], feature=feature).to_parquet(file)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.parquet", "b.parquet"], {"train": 2}),
        (["train.parquet", "test.parquet"], {"train": 1, "test": 1}),
        (["Train.parquet", "VAL.parquet"], {"train": 1, "validation": 1}),
        (["train-0.parquet", "train-1.parquet", "dev_0.parquet"], {"train": 2, "validation": 1}),
        (["my_train.parquet", "my_test.parquet"], {"train": 1, "test": 1}),
        (["set-train-00000-of-00001.parquet", "set.val.parquet"], {"train": 1, "validation": 1}),
        (["cats_on_train_set.parquet", "dogs.parquet"], {"train": 2}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 2}),
        (["data/minival-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"], {"minival": 1, "train": 1}),
        (["default/train/0000.parquet", "default/val/0000.parquet"], {"train": 1, "validation": 1}),
        (["train/test_0.parquet", "train/test_1.parquet"], {"test": 2}),
    ],
)
def test_parquet_files_tell_their_split(files, expected):
    assert {name: len(paths) for name, paths in parquet_splits(files).items()} == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["train.parquet", "more.parquet"], "more.parquet is of no split"),
        (["cats_on_train_0.parquet", "dogs.parquet"], "dogs.parquet is of no split"),
        (["train.parquet", "val.parquet", "dev.parquet"], "dev and val are both the split validation"),
    ],
)
def test_parquet_files_that_tell_no_split_are_refused(files, message):
    with pytest.raises(ValueError, match=message):
        parquet_splits(files)


@pytest.mark.parametrize("name", ["my [set]", "what?", "plain"])
def test_parquet_folders_are_opened_whatever_they_are_called(name, tmp_path, caplog):
    write_parquet(tmp_path / name / "train.parquet", 6, ["cat", "dog"])
    write_parquet(tmp_path / name / "Val.parquet", 3, ["cat", "dog"])
    for streaming in (False, True):
        splits = open_splits(str(tmp_path / name), streaming=streaming)
        assert {key: len(list(rows)) for key, rows in splits.items()} == {"train": 6, "validation": 3}
    assert len(open_splits(str(tmp_path / name / "Val.parquet"), split="test")["test"]) == 3


def test_splits_that_number_their_classes_differently_are_paired_by_name(tmp_path):
    write_parquet(tmp_path / "train.parquet", 6, ["cat", "dog"])
    write_parquet(tmp_path / "test.parquet", 4, ["dog", "cat"])
    splits = open_splits(str(tmp_path))
    assert splits["train"].features["label"].names == ["cat", "dog"]
    test = with_class_ids(splits["test"], "data", "label", like=splits["train"])
    assert test["label"][:] == [1, 0, 1, 0]
    assert test.features["label"].names == ["cat", "dog"]
    write_parquet(tmp_path / "test.parquet", 4, ["dog", "fish"])
    with pytest.raises(ValueError, match=r"classes that training lacks: \['fish'\]"):
        with_class_ids(open_splits(str(tmp_path))["test"], "data", "label", like=splits["train"])


def test_files_of_a_split_that_number_their_classes_differently_are_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", 6, ["cat", "dog"])
    write_parquet(tmp_path / "train-1.parquet", 4, ["dog", "cat"])
    with pytest.raises(ValueError, match="name the classes of column 'label' differently"):
        open_splits(str(tmp_path))


def test_images_next_to_parquet_files_are_named(tmp_path, caplog):
    write_parquet(tmp_path / "train.parquet", 6, ["cat", "dog"])
    (tmp_path / "new").mkdir()
    open_splits(str(tmp_path))["train"][0]["image"].save(tmp_path / "new" / "1.png")
    assert len(open_splits(str(tmp_path))["train"]) == 6
    assert "has Parquet files, which are read; 1 image files are left out" in caplog.text


def test_parquet_files_without_images_do_not_hide_image_files(tmp_path, caplog):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        datasets.Dataset(labelled_table(1))[0]["image"].save(tmp_path / name / "1.png")
    datasets.Dataset.from_dict({"file": ["cat/1.png"], "embedding": [[1.0, 2.0]]}).to_parquet(tmp_path / "new.parquet")
    assert len(open_splits(str(tmp_path))["train"]) == 2
    assert "Left out, no image files: 1 (1 .parquet): new.parquet." in caplog.text


@pytest.mark.parametrize("card", [CARD, None], ids=["card", "file names"])
def test_the_cache_knows_folders_of_the_same_name_and_changed_files(card, tmp_path):
    shapes = [("a", 6, ["cat", "dog"], 0), ("b", 8, ["owl", "fox", "elk"], 1)]
    for parent, num_rows, names, seed in shapes:
        for split in ("train", "val"):
            write_parquet(
                tmp_path / parent / "set" / "data" / f"{split}-00000-of-00001.parquet", num_rows, names, seed
            )
        if card:
            (tmp_path / parent / "set" / "README.md").write_text(card)
    for parent, num_rows, names, seed in shapes:
        rows = open_splits(str(tmp_path / parent / "set"))["train"]
        assert (len(rows), rows.features["label"].names) == (num_rows, names)
        expected = datasets.Dataset(labelled_table(num_rows, seed))
        assert rows[3]["image"].tobytes() == expected[3]["image"].tobytes()
    for split in ("train", "val"):
        write_parquet(tmp_path / "a" / "set" / "data" / f"{split}-00000-of-00001.parquet", 4, ["ant", "bee"], 2)
    rows = open_splits(str(tmp_path / "a" / "set"))["train"]
    assert (len(rows), rows.features["label"].names) == (4, ["ant", "bee"])


def test_programs_open_data_with_one_function():
    """No other file of the project calls the library's loader."""
    files = [*(ROOT / "modeling_lvvit").rglob("*.py"), *(ROOT / "dataset_scripts").glob("*.py"), ROOT / "train_tl.py"]
    callers = {file.name for file in files if "load_dataset(" in file.read_text(encoding="utf-8")}
    assert callers == {"sources.py"}


def test_files_that_a_card_forgets_or_repeats(tmp_path, caplog):
    for name in ("train-0", "val-0", "extra-0"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", 4, ["cat", "dog"])
    (tmp_path / "README.md").write_text(CARD)
    assert sorted(open_splits(str(tmp_path))) == ["train", "validation"]
    assert "1 files are in no split" in caplog.text
    (tmp_path / "README.md").write_text(CARD.replace("data/val-*", "data/*"))
    with pytest.raises(ValueError, match=r"train-0.parquet is in the splits train and validation"):
        open_splits(str(tmp_path))


def test_the_cache_knows_changed_files_of_a_linked_folder(tmp_path):
    write_parquet(tmp_path / "store" / "train-0.parquet", 4, ["cat", "dog"])
    write_parquet(tmp_path / "store" / "val-0.parquet", 4, ["cat", "dog"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text(CARD)
    (tmp_path / "set" / "data").symlink_to(tmp_path / "store")
    assert len(open_splits(str(tmp_path / "set"))["train"]) == 4
    write_parquet(tmp_path / "store" / "train-0.parquet", 6, ["cat", "dog"])
    assert len(open_splits(str(tmp_path / "set"))["train"]) == 6


def test_what_a_folder_cannot_be_opened_with_is_said(tmp_path):
    write_parquet(tmp_path / "[set]" / "data" / "train-0.parquet", 4, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"\[set\] has no configuration 'small'"):
        open_splits(str(tmp_path / "[set]"), "small")
    (tmp_path / "[set]" / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="in a path for a pattern. Rename it"):
        open_splits(str(tmp_path / "[set]"))
