"""`lvvit cache`: a copy of a dataset with smaller images, what is in it, and how it is stopped, continued and joined."""

import io
import logging
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from modeling_lvvit.annotators import annotate
from modeling_lvvit.data.image_keys import read_keys
from modeling_lvvit.data.images import decode_image, read_orientation
from modeling_lvvit.data.reduced_copy import program
from modeling_lvvit.data.sources import open_splits
from modeling_lvvit.labels.label_set import LabelSet
from support.classifiers import save_annotator
from support.image_files import ORIENTATION, encode
from support.images import encode_image
from support.programs import ROOT, environment_of


HEIGHT, WIDTH = 90, 120
SIDE = 40


def photograph(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Smooth colors, as JPEG keeps them, that differ between corners; uint8 `(height, width, 3)`."""
    down, right = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    channels = [down + 0 * right, 0 * down + right, (down * right + seed / 7) % 1]
    return np.uint8(np.stack(channels, axis=-1) * 220 + 20)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(Image.fromarray(photograph()), "JPEG", exif=exif.tobytes(), quality=95)


def large_files() -> dict[str, bytes]:
    """Files of more than `SIDE` pixels -> the file."""
    image = Image.fromarray(photograph())
    opacity = Image.fromarray(photograph()[..., 1])
    files = {
        "a photo": encode(image, "JPEG", quality=95),
        "cmyk": encode(image.convert("CMYK"), "JPEG", quality=95),
        "gray": encode(image.convert("L"), "PNG"),
        "16 bits": encode_image(photograph()[..., 0].astype(np.uint16) * 257, "PNG"),
        "transparent": encode(Image.merge("RGBA", (*image.split(), opacity)), "PNG"),
        "palette": encode(image.quantize(64), "PNG"),
        "one bit": encode(Image.fromarray(photograph()[..., 1] > 120), "PNG"),
        "webp": encode(image, "WEBP", quality=95),
        "tall": encode(Image.fromarray(photograph(120, 2)), "PNG"),
    }
    return files | {f"turned {number}": turned(number) for number in range(2, 9)}


def save_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """An image folder; the names of files have splits and classes."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def cache(source: Path, output: Path, *more: str) -> Path:
    program.main([str(source), "--output_dir", str(output), "--max_side", str(SIDE), "--num_workers", "2", *more])
    return output


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def values(folder: Path, split: str = "train") -> list[dict]:
    rows = open_splits(str(folder))[split].cast_column("image", datasets.Image(decode=False))
    return [row["image"] for row in rows]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Three splits, classes, and names that a shell would not like."""
    small = encode(Image.fromarray(photograph(30, 40)), "JPEG", quality=80)
    files = {f"train/Katze ü/{name}.img.jpg": content for name, content in large_files().items()}
    files |= {"train/Hund #1/small.jpg": small, "train/Hund #1/b [2]*?.png": encode_image(photograph(8, 9), "PNG")}
    files |= {"val/Katze ü/1.jpg": small, "val/Hund #1/1.jpg": encode_image(photograph()), "test/Katze ü/7.jpg": small}
    return save_folder(tmp_path_factory.mktemp("source") / "photographs", files)


@pytest.fixture(scope="module")
def copy(source, tmp_path_factory) -> Path:
    return cache(source, tmp_path_factory.mktemp("copy") / "small")


def test_copy_opens_as_its_source(source, copy):
    ours, theirs = open_splits(str(copy)), open_splits(str(source))
    assert list(ours) == list(theirs) == ["train", "validation", "test"]
    for split in theirs:
        assert ours[split].features["label"] == theirs[split].features["label"]
        assert ours[split]["label"] == theirs[split]["label"]
        assert read_keys(ours[split], "image").to_pylist() == read_keys(theirs[split], "image").to_pylist()
    assert next(iter(open_splits(str(copy), streaming=True)["test"]))["image"].size == (40, 30)
    assert not any(str(source.parent) in value["path"] for value in values(copy))


def test_images_look_like_those_of_the_source(source, copy):
    """Upright, in the colors of `decode_image`, at most `SIDE` pixels, in the same shape."""
    for ours, theirs in zip(values(copy), values(source)):
        image, original = decode_image(ours), decode_image(theirs)
        assert max(image.size) == min(SIDE, max(original.size)), theirs["path"]
        expected = original.resize(image.size, Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
        assert difference.mean() < 4, (theirs["path"], difference.mean())
        if max(original.size) <= SIDE:
            assert ours["bytes"] == Path(theirs["path"]).read_bytes()


def test_orientation_stays_as_label_maps_of_stored_pixels_know_it(source, copy):
    names = [Path(value["path"]).name for value in values(source)]
    orientations = {name: read_orientation(value) for name, value in zip(names, values(copy))}
    assert [orientations[f"turned {number}.img.jpg"] for number in range(2, 9)] == list(range(2, 9))
    assert orientations["a photo.img.jpg"] == 1


def test_columns_keys_and_missing_paths_are_kept(tmp_path):
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["b", "a"]), "name": datasets.Value("string"),
         "tags": datasets.List(datasets.Value("int32"))}
    )  # fmt: skip
    rows = [{"bytes": encode_image(photograph(seed=seed)), "path": None} for seed in range(5)]
    columns = [pa.array(rows, datasets.Image().pa_type), pa.array([1, 0, 1, None, 0]), pa.array(list("vwxyz"))]
    columns.append(pa.array([[1], [], [2, 3], None, [4]], pa.list_(pa.int32())))
    (tmp_path / "source").mkdir()
    parquet.write_table(
        pa.Table.from_arrays(columns, schema=features.arrow_schema), tmp_path / "source" / "dev.parquet"
    )
    copy = cache(tmp_path / "source" / "dev.parquet", tmp_path / "copy", "--image_column_name", "photo")
    ours = open_splits(str(copy))["train"]
    assert ours.features == datasets.Features({**features, "source_hash": datasets.Value("int64")})
    assert ours["kind"] == [1, 0, 1, None, 0] and list(ours["tags"])[2:] == [[2, 3], None, [4]]
    assert read_keys(ours, "photo").to_pylist() == [f"row:{row}" for row in range(5)]
    again = open_splits(str(cache(copy, tmp_path / "again", "--max_side", "20", "--image_column_name", "photo")))
    assert again["train"][0]["photo"].size == (20, 15) and again["train"]["source_hash"] == ours["source_hash"]


def test_split_names_of_a_source_stay(tmp_path, monkeypatch, caplog):
    """Also those that a folder of Parquet files would call otherwise; one without rows is left out, with a word."""
    rows = datasets.Dataset.from_dict({"image": [{"bytes": encode_image(photograph()), "path": "1.jpg"}]})
    rows = rows.cast_column("image", datasets.Image())
    splits = datasets.DatasetDict({"val": rows, "dev": rows, "extra.part": rows, "none": rows.select([])})
    monkeypatch.setattr(program, "open_splits", lambda *_: splits)
    logging.getLogger(program.__name__).addHandler(caplog.handler)
    assert list(open_splits(str(cache(tmp_path / "x", tmp_path / "copy")))) == ["val", "dev", "extra.part"]
    assert "Split none of" in caplog.text and "has no rows and is left out" in caplog.text


def test_summary_counts_and_record_has_no_time(source, copy, tmp_path, capsys):
    cache(source, tmp_path / "copy")
    text = capsys.readouterr().out
    assert "21 images: 17 made smaller (longer side 40 pixels), 4 copied byte for byte" in text
    assert "one core decodes an image in " in text
    assert everything(tmp_path / "copy") == everything(copy)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy" / "data").iterdir()}
    cache(source, tmp_path / "copy")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "copy" / "data").iterdir()} == before
    assert everything(tmp_path / "copy") == everything(copy)


def test_a_copy_does_not_depend_on_where_its_source_lies(source, copy, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "moved" / "photographs")
    monkeypatch.chdir(tmp_path / "moved" / "photographs" / "train")
    assert everything(cache(Path("../../photographs"), tmp_path / "copy")) == everything(copy)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max_side", "41"), "max_side: 40 there, 41 now"),
        (("--quality", "80"), "quality: 90 there, 80 now"),
        (("--rows_per_shard", "2"), "splits: "),
        (("--image_column_name", "photo"), "no column 'photo'"),
        (("--max_side", "0"), "--max_side must be at least 1"),
        (("--quality", "101"), "--quality must lie in 1 to 100"),
    ],
)
def test_other_settings_are_refused(source, copy, more, message):
    before = everything(copy)
    with pytest.raises(SystemExit, match=message):
        cache(source, copy, *more)
    assert everything(copy) == before


def test_other_images_are_refused(source, copy, tmp_path):
    shutil.copytree(source, tmp_path / "photographs")
    shutil.copytree(copy, tmp_path / "copy")
    (tmp_path / "photographs" / "val" / "Hund #1" / "1.jpg").write_bytes(encode_image(photograph(seed=3)))
    with pytest.raises(SystemExit, match="copy of other images: row 0 of split validation is another file now"):
        cache(tmp_path / "photographs", tmp_path / "copy")
    (tmp_path / "photographs" / "val" / "Hund #1" / "1.jpg").unlink()
    with pytest.raises(SystemExit, match="other settings"):
        cache(tmp_path / "photographs", tmp_path / "copy")


def test_a_folder_in_the_source_is_refused(source):
    with pytest.raises(SystemExit, match="lies in .* and would be read with it"):
        cache(source, source / "small")


def test_masks_are_refused(tmp_path):
    files = {"cat/1.jpg": encode_image(photograph()), "masks/1.png": encode_image(photograph()[..., 0], "PNG")}
    folder = save_folder(tmp_path / "source", files)
    (folder / "metadata.csv").write_text("file_name,mask_file_name\ncat/1.jpg,masks/1.png\n")
    with pytest.raises(SystemExit, match="more columns of images: mask. Masks must have the size of their images"):
        cache(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("height", [HEIGHT, 20])
def test_a_damaged_file_is_named_and_the_copy_goes_on_once_it_is_mended(height, tmp_path, monkeypatch):
    good = {f"cat/{row:02}.jpg": encode_image(photograph(height, 30 + 4 * row, seed=row)) for row in range(12)}
    whole = cache(save_folder(tmp_path / "whole" / "source", good), tmp_path / "expected", "--rows_per_shard", "5")
    files = {**good, "cat/07.jpg": good["cat/07.jpg"][:-200]}
    folder = save_folder(tmp_path / "source", files)
    with pytest.raises(SystemExit, match=r"Row 7 of split train \(.*cat/07.jpg\): .*[Tt]runcated.*Mend the file"):
        cache(folder, tmp_path / "copy", "--rows_per_shard", "5")
    written = tmp_path / "copy" / "data" / "train-00000-of-00003.parquet"
    time_written = written.stat().st_mtime_ns
    with pytest.raises(ValueError, match="copy is not finished"):
        open_splits(str(tmp_path / "copy"))
    (folder / "cat" / "07.jpg").write_bytes(good["cat/07.jpg"])
    cache(folder, tmp_path / "copy", "--rows_per_shard", "5")
    assert everything(tmp_path / "copy") == everything(whole)
    assert written.stat().st_mtime_ns == time_written


def test_a_missing_or_damaged_shard_is_made_again(source, copy, tmp_path):
    shutil.copytree(copy, tmp_path / "copy")
    first, second = sorted((tmp_path / "copy" / "data").iterdir())[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"lacks 1 files, first {first.name}"):
        open_splits(str(tmp_path / "copy"))
    cache(source, tmp_path / "copy")
    assert everything(tmp_path / "copy") == everything(copy)


def test_what_the_copy_hides_is_said(tmp_path, caplog):
    """Damage inside a JPEG that libjpeg gets over, dark 16-bit images and dropped transparency."""
    content = bytearray(encode(Image.fromarray(photograph()), "JPEG", quality=95))
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    dark = encode_image(photograph()[..., 0].astype(np.uint16), "PNG")
    transparent = encode(Image.fromarray(photograph()).convert("RGBA"), "PNG")
    files = {"a/1.jpg": bytes(content), "a/2.png": dark, "a/3.png": transparent}
    logging.getLogger(program.__name__).addHandler(caplog.handler)
    cache(save_folder(tmp_path / "source", files), tmp_path / "copy")
    assert "libjpeg reports damage in 1 of the images" in caplog.text and "a/1.jpg): " in caplog.text
    assert "transparency dropped: 1 of 3 images" in caplog.text
    assert "The largest value of 16-bit grayscale is 240 of 65535" in caplog.text


@pytest.fixture(scope="module")
def annotator(tmp_path_factory) -> Path:
    return save_annotator(tmp_path_factory.mktemp("annotator"), ["Hund #1", "Katze ü"])


def label(source: Path, annotator: Path, output: Path, *more: str) -> LabelSet:
    annotate.main([str(source), "--annotator", str(annotator), "--output_dir", str(output), *more])
    return LabelSet.open(str(output), "train")


def test_label_sets_join_the_copy_and_its_source(source, copy, annotator, tmp_path, caplog):
    rows = {"source": open_splits(str(source))["train"], "copy": open_splits(str(copy))["train"]}
    sets = {
        "source": label(source, annotator, tmp_path / "source"),
        "copy": label(copy, annotator, tmp_path / "copy"),
    }
    assert sets["source"].keys.to_pylist() == sets["copy"].keys.to_pylist()
    logging.getLogger("modeling_lvvit.labels.label_set").addHandler(caplog.handler)
    for labels, images in (("source", "source"), ("source", "copy"), ("copy", "copy")):
        joined = sets[labels].join(rows[images])
        assert len(joined.label_maps) == len(rows[images]) and joined.class_names == ["Hund #1", "Katze ü"]
    assert not caplog.records
    sets["copy"].join(rows["source"])
    assert "not byte for byte those that were annotated" in caplog.text


def test_label_sets_of_numbered_rows_join_the_copy(source, copy, annotator, tmp_path):
    labels = label(source, annotator, tmp_path / "source", "--number_rows")
    rows = open_splits(str(copy))["train"]
    assert len(labels.join(rows).label_maps) == len(rows)
    with pytest.raises(ValueError, match="not those that were annotated, first row 0"):
        labels.join(rows.select(range(len(rows) - 1, -1, -1)))
    with pytest.raises(ValueError, match="knows images by their number only"):
        label(copy, annotator, tmp_path / "copy", "--number_rows").join(open_splits(str(source))["train"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_copy_is_continued_byte_for_byte(number, tmp_path):
    files = {f"{'ab'[row % 2]}/{row:03}.jpg": encode_image(photograph(seed=row)) for row in range(160)}
    folder = save_folder(tmp_path / "source", files)
    options = ("--rows_per_shard", "2")
    whole = cache(folder, tmp_path / "whole", *options)
    command = ["-m", "modeling_lvvit.cli.command", "cache", str(folder), "--output_dir", str(tmp_path / "copy")]
    command += ["--max_side", str(SIDE), "--num_workers", "2", *options]
    data = tmp_path / "copy" / "data"
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment_of(tmp_path), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and (not data.is_dir() or len(list(data.glob("*.parquet"))) < 5):
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    assert len(list(data.glob("*.parquet"))) < 80
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert process.returncode == 130 and "lvvit cache: interrupted" in errors
    cache(folder, tmp_path / "copy", *options)  # at once: no process of the other one holds the lock
    assert everything(tmp_path / "copy") == everything(whole)


def test_a_second_run_is_refused_while_one_writes(source, tmp_path, monkeypatch):
    messages = []

    def while_it_writes(*_) -> None:
        with pytest.raises(SystemExit) as refusal:
            monkeypatch.undo()
            cache(source, tmp_path / "copy")
        messages.append(str(refusal.value))

    monkeypatch.setattr(program.CopyWriter, "check_source", while_it_writes)
    cache(source, tmp_path / "copy")
    assert "Another run is writing to" in messages[0]


def test_thin_colored_lines_stay(tmp_path):
    """Colors are stored at full resolution."""
    pixels = np.zeros((80, 80, 3), dtype=np.uint8)
    pixels[:, ::4, 0] = pixels[:, 1::4, 0] = pixels[:, 2::4, 2] = pixels[:, 3::4, 2] = 255  # red and blue by turns
    copy = cache(save_folder(tmp_path / "source", {"a/1.png": encode_image(pixels, "PNG")}), tmp_path / "copy")
    image = np.asarray(Image.open(io.BytesIO(values(copy)[0]["bytes"])), dtype=int)
    assert (image[:, ::2, 0] - image[:, 1::2, 0]).mean() > 180
