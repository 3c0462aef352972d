"""The programs that import the authors' label files and that check a label set."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.open_data import open_datasets
from modeling_lvvit.data.classes.class_matching import imagenet_class_names
from modeling_lvvit.labels.checks.report import check_label_set
from modeling_lvvit.labels.label_crops import top_classes as top_classes_of
from modeling_lvvit.labels.reader import LabelMapReader, covered_region
from modeling_lvvit.labels.storage import LabelMaps, LabelSetLayout, PaletteMaps, write_shard
from modeling_lvvit.original import label_import
from modeling_lvvit.visualization import check_labels
from support.images import encode_image
from support.label_sets import assert_same_cells, load, random_maps, table_of, write_label_set
from support.programs import ROOT


CLASSES = ("cat", "dog", "eel", "fox")
MAP_SHAPE = (3, 2, 5)  # K, rows, columns


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def threads_for_processes(monkeypatch):
    """Processes take seconds to start; the slow test below starts them."""
    pool = lambda workers, **_: ThreadPoolExecutor(workers)  # noqa: E731
    monkeypatch.setattr(label_import, "ProcessPoolExecutor", pool)


def write_label_files(folder: Path, names: list[str], num_classes: int = len(CLASSES), seed: int = 0) -> LabelMaps:
    """The authors' layout: for each image a tensor [2, K, rows, columns] of float16, scores first."""
    maps = random_maps(len(names), num_classes, MAP_SHAPE, seed)
    for name, ids, scores in zip(names, maps.ids, maps.scores):
        path = folder / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(np.stack([scores, ids.astype(np.float16)])), path)
    return maps


def class_file(folder: Path, names=CLASSES) -> str:
    path = folder / "classes.txt"
    path.write_text("\n".join(names) + "\n")
    return str(path)


def import_labels(label_dir: Path, output_dir: Path, *options: str) -> None:
    label_import.main([str(label_dir), "--output_dir", str(output_dir), "--num_workers", "2", *options])


IMAGENET_FILES = ["n01440764/n01440764_10026", "n01440764/n01440764_7", "n01443537/n01443537_3"]


def test_authors_files_are_imported_losslessly(tmp_path, capsys):
    maps = write_label_files(tmp_path / "label_top5_train_nfnet", IMAGENET_FILES, num_classes=1000)
    import_labels(tmp_path / "label_top5_train_nfnet", tmp_path / "labels")
    labels = load(tmp_path / "labels")
    assert labels["image_key"][:] == [f"{name}.JPEG" for name in IMAGENET_FILES]
    assert labels["image_hash"][:] == labels["map_box"][:] == [None] * 3
    source = LabelMapReader(labels)
    assert source.class_names == imagenet_class_names()
    stored = source.fetch(range(3))
    assert_same_cells(stored, maps)
    assert covered_region(stored.boxes[0], 500, 250) == (0.25, 0, 0.75, 1)
    assert "3 label maps of 3 x 2 x 5" in capsys.readouterr().out
    assert "Token labels from label_top5_train_nfnet" in (tmp_path / "labels" / "README.md").read_text()


def write_images(root: Path, names: list[str], suffix: str = ".JPEG") -> Path:
    """An image folder; every image is wider than high, and grey in its own tone."""
    for tone, name in enumerate(names):
        path = root / "train" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_image(np.full((20, 40, 3), 9 * tone, np.uint8), "PNG"))
    return root


def test_imported_labels_are_joined_to_an_image_folder(tmp_path):
    names = ["cat/2", "cat/1", "dog/1", "eel/3", "fox/1", "fox/2"]
    maps = write_label_files(tmp_path / "maps", names)
    import_labels(tmp_path / "maps", tmp_path / "labels", "--class_names", class_file(tmp_path))
    images = write_images(tmp_path / "images", names)
    opened = open_datasets(
        DataArguments(str(images), token_labels=str(tmp_path / "labels"), eval_fraction=0.4), seed=1
    )
    assert opened.train.features["label"].names == list(CLASSES)
    rows = range(len(opened.train))
    tones = [round(np.asarray(opened.train[row]["image"])[0, 0, 0] / 9) for row in rows]
    assert len(set(tones)) == 3
    assert_same_cells(opened.label_maps.fetch(rows), LabelMaps(maps.ids[tones], maps.scores[tones]))
    assert np.isnan(opened.label_maps.fetch(rows).boxes).all()


class Dangerous:
    """Would run a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def label_tensor() -> torch.Tensor:
    """Scores 3, 2, 1 of the classes 0, 1, 2 in each cell."""
    ids = torch.arange(3.0).view(3, 1, 1).expand(MAP_SHAPE)
    return torch.stack([3 - ids, ids])


def broken(**cells: float) -> Callable[[Path], None]:
    """Writes a file with other values in the last cell: `score` and `id` of the second class."""

    def write(path: Path) -> None:
        values = label_tensor()
        for part, name in enumerate(("score", "id")):
            values[part, 1, -1, -1] = cells.get(name, values[part, 1, -1, -1])
        torch.save(values.half(), path)

    return write


def saved(value: object) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def truncated(path: Path) -> None:
    torch.save(label_tensor().half(), path)
    path.write_bytes(path.read_bytes()[:-300])


def truncated_legacy(path: Path) -> None:
    torch.save(label_tensor().half(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:30])  # within a number of the head


BROKEN_FILES = {
    "truncated": (truncated, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("404: Not Found"), "cannot be read"),
    "code": (lambda path: path.write_bytes(pickle.dumps(Dangerous())), "cannot be read"),
    "code in a tensor file": (saved({"labels": Dangerous()}), "cannot be read"),
    "list": (saved([label_tensor()]), "must hold a tensor .*; it holds list"),
    "rank": (saved(label_tensor()[0]), r"must hold a tensor \[2, K, rows, columns\].* it holds \(3, 2, 5\)"),
    "three parts": (saved(label_tensor()[[0, 1, 1]]), r"it holds \(3, 3, 2, 5\)"),
    "other K": (saved(label_tensor()[:, :2]), r"has a map \(2, 2, 5\), the first file \(3, 2, 5\)"),
    "other size": (saved(label_tensor().mT), r"has a map \(3, 5, 2\), the first file \(3, 2, 5\)"),
    "fractional id": (broken(id=1.5), r"class ids from 0 to 2; expected whole numbers in \[0, 4\)"),
    "scores second": (saved(label_tensor().flip(0) - 1.5), "class ids from -0.5 to 1.5; expected whole"),
    "id too large": (broken(id=4), "class ids from 0 to 4"),
    "negative id": (broken(id=-1), "class ids from -1 to 2"),
    "NaN score": (broken(score=float("nan")), "has NaN or infinite values"),
    "infinite score": (broken(score=-float("inf")), "has NaN or infinite values"),
    "NaN id": (broken(id=float("nan")), "has NaN or infinite values"),
    "duplicate class": (broken(id=2), "names a class twice in a cell"),
    "beyond float16": (saved(label_tensor() * torch.tensor([1e5, 1]).view(2, 1, 1, 1)), "float16|65504"),
    "truncated legacy": (truncated_legacy, "cannot be read"),
    "one byte": (lambda path: path.write_bytes(b"\x80"), "cannot be read"),
    "no cells": (saved(label_tensor()[..., :0]), "."),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_label_files_are_named(case, tmp_path, monkeypatch):
    write, message = BROKEN_FILES[case]
    monkeypatch.chdir(tmp_path)
    write_label_files(tmp_path / "maps", ["a/1", "b/1", "b/2"])
    write(tmp_path / "maps" / "b" / "1.pt")
    with pytest.raises(SystemExit, match=rf"(?s)import_original_labels: .*maps/b/1.pt .*{message}.*--on_error empty"):
        import_labels(tmp_path / "maps", tmp_path / "labels", "--class_names", class_file(tmp_path))
    assert not (tmp_path / "was-run").exists()


def test_broken_label_files_get_empty_labels_if_asked(tmp_path, capsys):
    maps = write_label_files(tmp_path / "maps", ["cat/1", "dog/1", "eel/1", "fox/1"])
    truncated(tmp_path / "maps" / "dog" / "1.pt")
    options = ("--class_names", class_file(tmp_path), "--on_error", "empty")
    import_labels(tmp_path / "maps", tmp_path / "labels", *options)
    assert "1 x unreadable label file: dog/1.JPEG" in capsys.readouterr().out
    record = json.loads((tmp_path / "labels" / "token_labels.json").read_text())
    assert (record["report"]["num_images"], record["report"]["num_empty_labels"]) == (4, 1)
    images = write_images(tmp_path / "images", ["cat/1", "dog/1", "eel/1", "fox/1"])
    opened = open_datasets(
        DataArguments(str(images), token_labels=str(tmp_path / "labels"), eval_fraction=0.3), seed=0
    )
    tones = [round(np.asarray(row["image"])[0, 0, 0] / 9) for row in opened.train]
    assert len(tones) == 2
    assert 1 not in tones
    assert_same_cells(opened.label_maps.fetch(range(2)), LabelMaps(maps.ids[tones], maps.scores[tones]))


def test_first_label_file_may_be_broken_too(tmp_path):
    write_label_files(tmp_path / "maps", ["cat/1", "dog/1"])
    truncated(tmp_path / "maps" / "cat" / "1.pt")
    options = ("--class_names", class_file(tmp_path), "--on_error", "empty")
    import_labels(tmp_path / "maps", tmp_path / "labels", *options)
    assert load(tmp_path / "labels")["image_note"][:] == ["unreadable label file", ""]


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_second_run_continues_with_identical_bytes(tmp_path):
    write_label_files(tmp_path / "maps", [f"{CLASSES[number % 4]}/{number}" for number in range(10)])
    options = ("--class_names", class_file(tmp_path), "--rows_per_shard", "3")
    import_labels(tmp_path / "maps", tmp_path / "labels", *options)
    whole = content_of(tmp_path / "labels")
    assert [name for name in whole if name.endswith("parquet")] == [f"data/train-0000{n}.parquet" for n in range(4)]
    kept = (tmp_path / "labels" / "data" / "train-00000.parquet").stat().st_mtime_ns
    (tmp_path / "labels" / "data" / "train-00001.parquet").unlink()
    damaged = tmp_path / "labels" / "data" / "train-00003.parquet"
    damaged.write_bytes(damaged.read_bytes()[:50])
    import_labels(tmp_path / "maps", tmp_path / "labels", *options)
    assert content_of(tmp_path / "labels") == whole
    assert (tmp_path / "labels" / "data" / "train-00000.parquet").stat().st_mtime_ns == kept
    import_labels(tmp_path / "maps", tmp_path / "again", *options)
    assert content_of(tmp_path / "again") == whole


OTHER_RUNS = {
    "image_suffix": ("--image_suffix", ".png"),
    "score_type": ("--score_type", "int8"),
    "class_names_sha256": (),
    "files_sha256": (),
}


@pytest.mark.parametrize("setting", OTHER_RUNS)
def test_second_run_with_other_settings_is_refused(setting, tmp_path):
    write_label_files(tmp_path / "maps", ["cat/1", "dog/1"])
    names = ("--class_names", class_file(tmp_path))
    import_labels(tmp_path / "maps", tmp_path / "labels", *names)
    if setting == "class_names_sha256":
        class_file(tmp_path, ("cat", "dog", "emu", "fox"))
    if setting == "files_sha256":
        (tmp_path / "maps" / "dog" / "1.pt").rename(tmp_path / "maps" / "dog" / "2.pt")
    with pytest.raises(SystemExit, match=rf"(?s)other settings.*\n  {setting}: "):
        import_labels(tmp_path / "maps", tmp_path / "labels", *names, *OTHER_RUNS[setting])


def test_other_class_names_and_suffix_are_used(tmp_path):
    write_label_files(tmp_path / "maps", ["a/deep/1", "top"])
    classes = class_file(tmp_path, ("  eins", "zwei ", "", "drei, die dritte", "vier"))
    options = ("--class_names", classes, "--image_suffix", ".png", "--score_type", "int8", "--split", "validation")
    import_labels(tmp_path / "maps", tmp_path / "labels", *options)
    labels = load(tmp_path / "labels", "validation")
    assert LabelMapReader(labels).class_names == ["eins", "zwei", "drei, die dritte", "vier"]
    assert labels["image_key"][:] == ["deep/1.png", "top.png"]
    assert labels.features["token_label_scores"].feature.feature.feature.dtype == "uint8"


def test_keys_that_repeat_are_named(tmp_path):
    write_label_files(tmp_path / "maps", ["part1/a/1", "part2/a/1"])
    with pytest.raises(SystemExit, match="Several images have the same key: 'a/1.JPEG'"):
        import_labels(tmp_path / "maps", tmp_path / "labels", "--class_names", class_file(tmp_path))


def test_missing_label_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match="There is no folder .*maps"):
        import_labels(tmp_path / "maps", tmp_path / "labels")
    (tmp_path / "maps").mkdir()
    with pytest.raises(SystemExit, match=r"There is no .pt file in .*maps or its folders"):
        import_labels(tmp_path / "maps", tmp_path / "labels")
    with pytest.raises(SystemExit, match="--on_error: invalid choice: 'skip'"):
        import_labels(tmp_path / "maps", tmp_path / "labels", "--on_error", "skip")
    assert not (tmp_path / "labels").exists()


@pytest.mark.slow
def test_programs_run_as_programs(tmp_path):
    write_label_files(tmp_path / "maps", [f"cat/{number}" for number in range(5)])
    checked = sound_set(tmp_path / "checked")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(program: str, *options: object) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "dataset_scripts" / program), *map(str, options)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)

    options = ("--class_names", class_file(tmp_path), "--rows_per_shard", 3, "--num_workers", 1)
    runs = [
        start("import_original_labels.py", tmp_path / "maps", "--output_dir", tmp_path / "labels", *options),
        start("check_token_labels.py", checked),
    ]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "5 label maps of 3 x 2 x 5" in outputs[0]
    assert "8 label maps, 0 of them empty" in outputs[1]
    assert len(load(tmp_path / "labels")) == 5


LAYOUT = LabelSetLayout(CLASSES, *MAP_SHAPE[:1], MAP_SHAPE[1:])
KEYS = [f"{CLASSES[number % 4]}/{number}.JPEG" for number in range(8)]


def sound_set(folder: Path, maps: LabelMaps | None = None, layout: LabelSetLayout = LAYOUT, **columns) -> Path:
    """Eight maps in shards of three."""
    maps = maps or random_maps(8, len(CLASSES), MAP_SHAPE)
    return write_label_set(folder, table_of(maps, layout, **{"keys": KEYS[: len(maps)], **columns}), layout, 3)


def run_check(capsys, *options: object) -> tuple[int, str]:
    """Exit code and output of the program."""
    with pytest.raises(SystemExit) as caught:
        check_labels.main([str(option) for option in options])
    return caught.value.code, capsys.readouterr().out


def test_sound_label_set_passes(tmp_path, capsys):
    maps = random_maps(8, len(CLASSES), MAP_SHAPE)
    maps.scores[0, 0, 0, 0], maps.scores[7, 2, 1, 4] = 30.5, -20.25
    notes, empty = (
        ["grayscale", "grayscale; CMYK: odd", *[""] * 5, "unreadable: no image"],
        [False] * 6 + [True, False],
    )
    folder = sound_set(tmp_path / "labels", maps, notes=notes, is_empty=empty, outside_mass=[0.25] * 7 + [None])
    code, output = run_check(capsys, folder)
    assert code == 0
    for line in (
        "8 label maps, 1 of them empty",
        "maps of 2 x 5 cells, 3 of 4 classes in each",
        "scores from -20.25 to 30.50",
        "2 x grayscale",
        "1 x CMYK",
        "1 x unreadable",
    ):
        assert line in output.splitlines()
    assert "25.0 % by the annotator itself" in output
    assert "PROBLEM" not in output


def replace_shard(change: Callable[[Path], object], shard: int = 1) -> Callable[[Path], None]:
    return lambda folder: change(folder / "data" / f"train-{shard:05d}.parquet")


def shard_of(layout: LabelSetLayout, shape=MAP_SHAPE, keys=KEYS[3:6]) -> Callable[[Path], None]:
    maps = random_maps(3, len(layout.class_names), shape)
    return lambda path: write_shard(path, table_of(maps, layout, keys=keys))


def bad_score(path: Path) -> None:
    maps = random_maps(3, len(CLASSES), MAP_SHAPE)
    maps.scores[1, 0, 1, 3] = np.nan
    write_shard(path, table_of(maps, LAYOUT, keys=KEYS[3:6]))


DAMAGE = {
    "truncated": (replace_shard(lambda path: path.write_bytes(path.read_bytes()[:-9])), "train-00001.*damaged"),
    "holes": (
        replace_shard(lambda path: path.write_bytes(path.read_bytes()[:4] + bytes(900) + path.read_bytes()[904:])),
        "train-00001.parquet: damaged, cannot be read",
    ),
    "missing": (replace_shard(Path.unlink), "train-00001.parquet is missing"),
    "last missing": (replace_shard(Path.unlink, 2), r"token_labels.json counts 8 maps, 6 could be read"),
    "other K": (
        replace_shard(shard_of(LabelSetLayout(CLASSES, 2, (2, 5)), (2, 2, 5))),
        "train-00001.parquet: other columns, map size, K or classes than train-00000.parquet",
    ),
    "other classes": (
        replace_shard(shard_of(LabelSetLayout(("cat", "dog", "emu", "fox"), 3, (2, 5)))),
        "train-00001.parquet: other columns",
    ),
    "duplicate key": (replace_shard(shard_of(LAYOUT, keys=["x", KEYS[0], "y"])), "key 'cat/0.JPEG' comes more than once"),
    "NaN": (replace_shard(bad_score), "train-00001.parquet, image cat/4.JPEG: scores are NaN or infinite"),
    "unfinished": (
        lambda folder: (folder / "token_labels.json").write_text('{"settings": {"k": 3, "map_size": [2, 5]}}'),
        "has no report: the set is not finished",
    ),
    "other record": (
        lambda folder: (folder / "token_labels.json").write_text(
            '{"settings": {"k": 5, "map_size": [2, 5]}, "report": {"num_images": 8}}'
        ),
        r"says K 5 and map size \[2, 5\], maps are \(3, 2, 5\)",
    ),
    "damaged record": (lambda folder: (folder / "token_labels.json").write_text("{"), "token_labels.json is damaged"),
    "record of a list": (lambda folder: (folder / "token_labels.json").write_text("[]"), "token_labels.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_ends_with_exit_code_1(case, tmp_path, capsys):
    damage, message = DAMAGE[case]
    folder = sound_set(tmp_path / "labels")
    damage(folder)
    code, output = run_check(capsys, folder)
    assert code == 1
    assert re.search(f"(?m)^PROBLEM: .*{message}", output)


def test_only_the_first_problems_are_listed(tmp_path):
    maps = random_maps(40, len(CLASSES), MAP_SHAPE)
    maps.scores[:] = np.inf
    folder = sound_set(tmp_path / "labels", maps, keys=[f"row:{row}" for row in range(40)])
    problems = check_label_set(folder).problems
    assert len(problems) == 21
    assert problems[1] == "train-00000.parquet, image row:1: scores are NaN or infinite"
    assert problems[-1] == "... (further problems are not listed)"


def test_folder_without_shards_is_named(tmp_path):
    folder = sound_set(tmp_path / "labels")
    with pytest.raises(SystemExit, match="has no label set of split 'test': there is no data/test-"):
        check_labels.main([str(folder), "--split", "test"])


def maps_of_classes(first: list[int], second: list[int]) -> LabelMaps:
    """Maps whose cells name class `first` with score 8, `second` with 3 and the next class with 0."""
    columns = [[a, b, next(c for c in range(4) if c not in (a, b))] for a, b in zip(first, second)]
    ids = np.broadcast_to(np.array(columns)[:, :, None, None], (len(first), *MAP_SHAPE))
    scores = np.broadcast_to(np.float16([8, 3, 0]).reshape(1, 3, 1, 1), ids.shape)
    return LabelMaps(ids.copy(), scores.copy())


def test_agreement_with_the_human_labels_by_hand(tmp_path, capsys):
    """Labels 0 1 2 3 0 1 2 3. First classes agree in 5 of 8 maps; one more names its label second; one not at all, and
    one only as the third class."""
    first = [0, 1, 2, 3, 0, 3, 0, 0]
    second = [1, 0, 0, 0, 1, 1, 1, 1]  # maps 6 and 7 have third classes 2 and 2
    folder = sound_set(tmp_path / "labels", maps_of_classes(first, second))
    images = write_images(tmp_path / "images", [key.removesuffix(".JPEG") for key in KEYS])
    code, output = run_check(capsys, folder, "--dataset", images)
    assert code == 0
    assert "all 8 images that can be trained on have a label map" in output
    assert "62.5 % of maps have the human label as their first class, 87.5 % name it" in output
    assert "4 of 4 classes are the first of a map; most often: cat 4" in output


def test_sets_of_all_classes_say_nothing_of_naming(tmp_path, capsys):
    maps = random_maps(8, len(CLASSES), (len(CLASSES), 2, 3))
    folder = sound_set(tmp_path / "labels", maps, LabelSetLayout(CLASSES, len(CLASSES), (2, 3)))
    images = write_images(tmp_path / "images", [key.removesuffix(".JPEG") for key in KEYS])
    _, output = run_check(capsys, folder, "--dataset", images)
    assert "have the human label as their first class\n" in output and "name it" not in output
    assert "in the training targets" in output


def test_first_class_of_a_map_is_that_of_its_mean():
    """Class 2 wins one cell of four by far, class 1 three of four; the mean scores are 5 and 3."""
    ids = np.array([[1, 1, 1, 2], [2, 2, 2, 1]]).reshape(1, 2, 1, 4)
    scores = np.array([[4, 4, 4, 20], [0, 0, 0, 0]], dtype=np.float16).reshape(1, 2, 1, 4)
    assert top_classes_of(PaletteMaps.from_ids(ids, scores), 4).tolist() == [2]
    scores[0, 0, 0, 3] = 8
    assert top_classes_of(PaletteMaps.from_ids(ids, scores), 4).tolist() == [1]


FOREIGN = {
    "keys": (["cat/10", "dog/11", "eel/12", "fox/13"], (), "4 of 4 images have no label map: 'cat/10.JPEG'"),
    "classes": (["cat/0", "dog/1", "eel/2", "gnu/3"], (), "3: 'fox' in the label set, 'gnu' in the data"),
    "fewer classes": (["cat/0", "dog/1", "eel/2"], (), "4 classes, the data has 3, and they are not the same"),
    "key column": (["cat/0", "dog/1", "eel/2", "fox/3"], ("--key_column", "id"), "no column 'id' to take keys from"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_images_are_a_problem(case, tmp_path, capsys):
    names, options, message = FOREIGN[case]
    images = write_images(tmp_path / "images", names)
    code, output = run_check(capsys, sound_set(tmp_path / "labels"), "--dataset", images, *options)
    assert code == 1
    assert re.search(f"(?m)^PROBLEM: .*{message}", output)


def test_missing_images_are_an_error(tmp_path):
    folder = sound_set(tmp_path / "labels")
    with pytest.raises(SystemExit, match="lvvit check: There is no dataset at .*pets"):
        check_labels.main([str(folder), "--dataset", str(tmp_path / "pets")])


def flat_set(folder: Path, score: float, outside: float | None) -> Path:
    """Three of 1000 classes, all with one score."""
    maps = random_maps(8, 1000, MAP_SHAPE)
    maps.scores[:] = score
    layout = LabelSetLayout(tuple(f"class {index}" for index in range(1000)), 3, (2, 5))
    return sound_set(folder, maps, layout, outside_mass=[outside] * 8)


@pytest.mark.parametrize("outside", [0.05, None])
def test_temperature_is_proposed_for_flat_targets(outside, tmp_path, capsys):
    """3 exp(2 / T) / (3 exp(2 / T) + 997) is 0.95 (the annotator's own) or 0.9 (the default) at this T."""
    wanted = outside or 0.1
    expected = 2 / np.log((1 - wanted) / wanted * 997 / 3)
    folder = flat_set(tmp_path / "labels", 2.0, outside)
    report = check_label_set(folder)
    assert report.temperature == pytest.approx(expected, rel=1e-3)
    assert report.stored_mass == pytest.approx(997 / (997 + 3 * np.exp(2)), rel=1e-4)
    code, output = run_check(capsys, folder)
    assert code == 0
    assert re.search(f"WARNING: the targets are flat.*--label_temperature {expected:.2g},", output)


def test_no_temperature_is_proposed_where_scores_are_below_the_classes_not_named(tmp_path, capsys):
    folder = flat_set(tmp_path / "negative", -4.0, 0.1)
    assert check_label_set(folder).temperature == 0
    _, output = run_check(capsys, folder)
    assert "No --label_temperature mends it: annotate again with --scores relative." in output


def test_no_temperature_is_proposed_for_sharp_targets(tmp_path):
    assert check_label_set(flat_set(tmp_path / "sharp", 9.0, None)).temperature is None  # 4 % outside
    assert check_label_set(flat_set(tmp_path / "honest", 2.0, 0.95)).temperature is None  # as flat as the annotator


def test_contact_sheet_is_written(tmp_path, capsys, monkeypatch):
    maps = random_maps(8, len(CLASSES), MAP_SHAPE)
    maps.boxes = np.full((8, 4), np.nan, dtype=np.float32)  # the center square
    maps.boxes[0] = [-0.25, 0, 1.25, 1]
    folder = sound_set(tmp_path / "labels", maps)
    images = write_images(tmp_path / "images", [key.removesuffix(".JPEG") for key in KEYS])
    drawn, save = [], check_labels.save_contact_sheet

    def save_and_keep(path, *parts):
        drawn.append(parts)
        save(path, *parts)

    monkeypatch.setattr(check_labels, "save_contact_sheet", save_and_keep)
    sheet = tmp_path / "sheet.png"
    code, output = run_check(capsys, folder, "--dataset", images, "--contact_sheet", sheet, "--num_pictures", 3)
    assert (code, f"contact sheet -> {sheet}" in output) == (0, True)
    parts, pairs, labels, names = drawn[0]
    assert [covered.size for _, covered in parts] == [(60, 20), (20, 20), (20, 20)]
    assert (len(pairs), labels, names) == (3, ["cat", "dog", "fox"], list(CLASSES))
    assert Image.open(sheet).size[0] > 3 * 150


def test_contact_sheet_needs_images(tmp_path):
    with pytest.raises(SystemExit, match="--contact_sheet needs --dataset"):
        check_labels.main([str(tmp_path), "--contact_sheet", "sheet.png"])


def test_set_of_empty_labels_only_is_no_crash(tmp_path, capsys):
    folder = sound_set(tmp_path / "labels", is_empty=[True] * 8)
    images = write_images(tmp_path / "images", [key.removesuffix(".JPEG") for key in KEYS])
    _, output = run_check(capsys, folder, "--dataset", images)
    assert "8 label maps, 8 of them empty" in output
