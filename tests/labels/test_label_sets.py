"""The stored form of label sets, their source of maps, and their writer. Other test files borrow the makers above."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from modeling_lvvit.data.files.shard_folder import default_rows_per_shard
from modeling_lvvit.labels.columns import IDS_COLUMN, SCORES_COLUMN, LabelMapError, label_map_features, to_arrow
from modeling_lvvit.labels.packing import unpacked_rows
from modeling_lvvit.labels.reader import LabelMapReader, covered_region, label_class_names
from modeling_lvvit.labels.storage import (
    BOX_COLUMN,
    INDEX_COLUMN,
    KEY_COLUMN,
    NOTE_COLUMN,
    PALETTE_COLUMN,
    LabelMaps,
    compact,
    read_maps,
    write_atomically,
    write_shard,
)
from modeling_lvvit.labels.writer import LabelSetWriter
from support.label_sets import (
    MAP_SHAPE,
    NUM_CLASSES,
    assert_same_cells,
    by_class,
    layout_of,
    load,
    random_maps,
    table_of,
    write_label_set,
)


NAN = float("nan")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The cache of datasets mistakes folders of one name for each other (see test_label_join.py)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def changed(table: pa.Table, name: str, change: Callable[[list], object]) -> pa.Table:
    """The table with one column changed in place as Python lists."""
    values = table[name].to_pylist()
    change(values)
    position = table.column_names.index(name)
    return table.set_column(position, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize("num_classes, id_type", [(7, "int16"), (21_841, "int16"), (40_000, "int32")])
def test_float16_round_trip_is_lossless(num_classes, id_type):
    maps = random_maps(5, num_classes)
    maps.ids[0, 0, 0, 0] = num_classes - 1
    maps.ids[0, 1:, 0, 0] = [0, 1]
    maps.scores[1, :, 2, 3] = [65504, -65504, 6e-8]  # the ends of float16 and its smallest step
    stored = read_maps(table_of(maps, layout_of(maps, num_classes)), num_classes)
    assert_same_cells(stored, maps)
    assert stored.ids.dtype == id_type
    assert stored.scores.dtype == np.float16


def test_classes_of_a_cell_are_stored_in_ascending_order():
    maps = LabelMaps(np.array([6, 0, 4]).reshape(1, 3, 1, 1), np.float16([3, 2, 1]).reshape(1, 3, 1, 1))
    row = table_of(maps).to_pylist()[0]
    assert row[PALETTE_COLUMN] == [0, 4, 6]
    assert row[INDEX_COLUMN] == [[[0]], [[1]], [[2]]]
    assert row[SCORES_COLUMN] == [[[2.0]], [[1.0]], [[3.0]]]


def test_int8_scores_are_off_by_at_most_three_sixteenths_and_clipped():
    maps = random_maps(1, shape=(3, 40, 55))
    maps.scores[:] = np.linspace(-41, 72, maps.scores.size, dtype=np.float16).reshape(maps.scores.shape)
    with pytest.warns(UserWarning, match="from -41.0 to 72.0 are cut to what int8 holds, -32.25 to 63.375"):
        stored = read_maps(table_of(maps, layout_of(maps, score_type="int8")), NUM_CLASSES)
    ids, scores = by_class(maps.ids, maps.scores.astype(np.float64))
    our_ids, our_scores = by_class(stored.ids, stored.scores)
    assert np.array_equal(our_ids, ids)
    assert stored.scores.dtype == np.float16
    assert (our_scores.min(), our_scores.max()) == (-32.25, 63.375)
    assert np.abs(our_scores - scores.clip(-32.25, 63.375)).max() <= 0.1875
    assert np.array_equal(our_scores / 0.375, np.rint(our_scores / 0.375))


def test_map_that_names_more_than_256_classes_is_kept():
    ids = np.arange(5 * 12 * 10).reshape(1, 5, 12, 10)  # 600 classes
    maps = LabelMaps(ids, np.arange(600, dtype=np.float16).reshape(ids.shape))
    table = table_of(maps, layout_of(maps, 1000))
    assert table[PALETTE_COLUMN][0].as_py() == list(range(600))
    assert_same_cells(read_maps(table, 1000), maps)


def test_map_that_names_more_classes_than_positions_is_refused():
    ids = np.arange(256 * 257).reshape(1, 1, 256, 257)
    with pytest.raises(ValueError, match="names 65792 classes; at most 65,536"):
        compact(ids, np.zeros(ids.shape, dtype=np.float16), [False])
    ids[0, 0, 255] = 0
    palettes, index, _ = compact(ids, np.zeros(ids.shape, dtype=np.float16), [False])
    assert np.array_equal(palettes[0][index], ids)


def test_empty_labels_are_stored_without_classes_and_named():
    maps = random_maps(4)
    maps.scores[2] = NAN  # whatever was there
    table = table_of(maps, is_empty=[False, False, True, False])
    assert table[PALETTE_COLUMN].to_pylist()[2] == []
    assert np.array_equal(table[SCORES_COLUMN].to_pylist()[2], np.zeros(MAP_SHAPE))
    with pytest.raises(LabelMapError, match="empty label") as caught:
        read_maps(table, NUM_CLASSES)
    assert caught.value.row == 2
    others = table.filter(pa.array([True, True, False, True]))
    assert_same_cells(read_maps(others, NUM_CLASSES), LabelMaps(maps.ids[[0, 1, 3]], maps.scores[[0, 1, 3]]))


def test_boxes_that_are_nan_are_stored_as_null():
    maps = random_maps(3)
    maps.boxes = np.float32([[0.25, 0, 0.75, 1], [NAN] * 4, [-0.5, 0, 1.5, 1]])
    table = table_of(maps)
    assert table[BOX_COLUMN].to_pylist() == [[0.25, 0, 0.75, 1], None, [-0.5, 0, 1.5, 1]]
    assert np.array_equal(read_maps(table, NUM_CLASSES).boxes, maps.boxes, equal_nan=True)
    assert np.array_equal(read_maps(table.slice(1), NUM_CLASSES).boxes, maps.boxes[1:], equal_nan=True)


def test_maps_without_boxes_cover_their_images():
    assert read_maps(table_of(random_maps(2)), NUM_CLASSES).boxes.tolist() == [[0, 0, 1, 1]] * 2


def test_slices_and_chunks_expand_alike():
    maps = random_maps(6)
    maps.boxes = np.float32([[NAN] * 4, [0, 0, 0.5, 1], [NAN] * 4, [0, 0, 1, 1], [0, 0.5, 1, 1], [NAN] * 4])
    table = table_of(maps)
    pieces = pa.concat_tables([table.slice(4), table.slice(1, 2)])  # two chunks: rows 4, 5, 1, 2
    rows = [4, 5, 1, 2]
    stored = read_maps(pieces, NUM_CLASSES)
    assert_same_cells(stored, LabelMaps(maps.ids[rows], maps.scores[rows]))
    assert np.array_equal(stored.boxes, maps.boxes[rows], equal_nan=True)


def smooth_maps(count: int, side: int = 18, num_classes: int = 1000, k: int = 5) -> LabelMaps:
    """Maps as annotators make them: 40 classes with fields of 4 x 4 values, interpolated linearly, and a little noise."""
    rng = np.random.default_rng(0)
    distance = (np.arange(side)[:, None] + 0.5) * 4 / side - 0.5 - np.arange(4)
    weights = np.maximum(0, 1 - np.abs(distance))
    weights /= weights.sum(axis=1, keepdims=True)  # (side, 4)
    classes = rng.random((count, num_classes)).argsort(axis=1)[:, :40]
    fields = rng.normal(0, 2.5, (count, 40, 4, 4)) + rng.uniform(0, 5, (count, 40, 1, 1))
    scores = weights @ fields @ weights.T + rng.normal(0, 0.05, (count, 40, side, side))
    top = np.argsort(-scores, axis=1)[:, :k]
    ids = np.take_along_axis(classes[:, :, None, None], top, axis=1)
    return LabelMaps(ids, np.take_along_axis(scores, top, axis=1).astype(np.float16))


def test_smooth_maps_take_little_room(tmp_path):
    """Measured: 27 and 12 % of the 8 KiB that the ids and scores of one of the authors' files take on a disk."""
    maps = smooth_maps(512)
    for score_type, share in (("float16", 0.28), ("int8", 0.125)):
        path = tmp_path / f"{score_type}.parquet"
        keys = [f"n{row % 10:08d}/{row}.JPEG" for row in range(512)]
        write_shard(path, table_of(maps, layout_of(maps, 1000, score_type), keys=keys, hashes=list(range(512))))
        assert path.stat().st_size <= share * 8192 * 512
    assert_same_cells(read_maps(pq.read_table(tmp_path / "float16.parquet"), 1000), maps)


def test_load_dataset_gives_back_equal_maps(tmp_path):
    maps = random_maps(9)
    maps.boxes = np.float32([[0, 0, 0.5, 1]] * 9)
    maps.boxes[[1, 8]] = NAN
    layout = layout_of(maps)
    hashes = [None, *range(-4, 4)]
    labels = load(write_label_set(tmp_path / "labels", table_of(maps, layout, hashes=hashes), layout))
    assert unpacked_rows(labels).features == layout.features
    assert labels["image_hash"][:] == hashes
    stored = LabelMapReader(labels).fetch(range(9))
    assert_same_cells(stored, maps)
    assert np.array_equal(stored.boxes, maps.boxes, equal_nan=True)


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "train-00000.parquet"
    write_shard(path, table_of(random_maps(2)))
    before = path.read_bytes()

    def write(file):
        file.write(b"half a ")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "new", write)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def plain_rows(maps: LabelMaps) -> datasets.Dataset:
    """The same maps as two columns of an image dataset."""
    features = label_map_features(*maps.ids.shape[1:], "int32")
    columns = [to_arrow(maps.ids.astype(np.int32)), to_arrow(maps.scores)]
    return datasets.Dataset(pa.Table.from_arrays(columns, schema=features.arrow_schema))


def compact_rows(maps: LabelMaps, **columns) -> datasets.Dataset:
    return datasets.Dataset(table_of(maps, **columns))


def test_plain_columns_and_compact_form_give_equal_maps():
    maps = random_maps(8)
    plain, stored = LabelMapReader(plain_rows(maps)), LabelMapReader(compact_rows(maps))
    assert (plain.is_compact, stored.is_compact) == (False, True)
    for images in ([5, 0, 0], range(2, 6)):
        assert_same_cells(stored.fetch(images), plain.fetch(images))
        assert_same_cells(plain.fetch(images), LabelMaps(maps.ids[list(images)], maps.scores[list(images)]))
    assert plain.fetch([1]).boxes is None
    assert plain.problems([3, 4], NUM_CLASSES) == stored.problems([3, 4], NUM_CLASSES) == ([], MAP_SHAPE)


@pytest.mark.parametrize("make_rows", [plain_rows, compact_rows])
def test_selections_compose(make_rows):
    maps = random_maps(8)
    source = LabelMapReader(make_rows(maps))
    first = source.select(np.array([6, 1, 4, 3]))
    second = first.select(np.array([2, 0]))
    assert [len(part) for part in (source, first, second)] == [8, 4, 2]
    assert_same_cells(second.fetch([0, 1]), LabelMaps(maps.ids[[4, 6]], maps.scores[[4, 6]]))
    assert_same_cells(first.fetch([3]), LabelMaps(maps.ids[[3]], maps.scores[[3]]))


def test_order_of_images_is_followed():
    maps = random_maps(5)
    source = LabelMapReader(compact_rows(maps), row_of=np.array([4, 4, 2]))
    assert len(source) == 3
    assert_same_cells(source.fetch([2, 0]), LabelMaps(maps.ids[[2, 4]], maps.scores[[2, 4]]))


def test_source_without_regions_covers_whole_images():
    maps = random_maps(3)
    maps.boxes = np.float32([[0.25, 0, 0.75, 1]] * 3)
    source = LabelMapReader(compact_rows(maps)).select(np.array([2, 1]))
    assert source.fetch([0]).boxes.tolist() == [[0.25, 0, 0.75, 1]]
    whole = source.without_regions()
    assert whole.fetch([0]).boxes is None
    assert_same_cells(whole.fetch([0, 1]), source.fetch([0, 1]))
    assert source.fetch([0]).boxes is not None


REGIONS = {
    "wide": (np.full(4, np.nan), (100, 50), (0.25, 0, 0.75, 1)),
    "tall": (np.full(4, np.nan), (60, 240), (0, 0.375, 1, 0.625)),
    "square": (np.full(4, np.nan), (80, 80), (0, 0, 1, 1)),
    "no boxes": (None, (100, 50), (0, 0, 1, 1)),
    "its own": (np.float32([-0.5, 0.25, 1.5, 0.75]), (100, 50), (-0.5, 0.25, 1.5, 0.75)),
}


@pytest.mark.parametrize("case", REGIONS)
def test_covered_region_is_the_center_square_or_the_box(case):
    box, (width, height), expected = REGIONS[case]
    assert covered_region(box, width, height) == expected


def set_cell(row: int, rank: int, value) -> Callable[[list], None]:
    def change(values: list) -> None:
        values[row][rank][2][5] = value

    return change


PROBLEMS = {
    "position": (INDEX_COLUMN, set_cell(2, 0, 7), "position 7 is outside its palette of 7 classes"),
    "class too large": (PALETTE_COLUMN, lambda v: v[2].__setitem__(-1, 7), r"class id 7 is outside \[0, 7\)"),
    "negative class": (PALETTE_COLUMN, lambda v: v[2].__setitem__(0, -1), r"class id -1 is outside \[0, 7\)"),
    "palette names twice": (PALETTE_COLUMN, lambda v: v[2].__setitem__(1, v[2][0]), "its palette names a class twice"),
    "NaN score": (SCORES_COLUMN, set_cell(2, 1, NAN), "scores are NaN or infinite"),
    "infinite score": (SCORES_COLUMN, set_cell(2, 1, -np.inf), "scores are NaN or infinite"),
    "class twice": (INDEX_COLUMN, lambda v: [m.__setitem__(1, m[0]) for m in (v[2],)], "a cell names a class twice"),
    "empty box": (BOX_COLUMN, lambda v: v.__setitem__(2, [0.5, 0, 0.5, 1]), r"map_box \[0.5, 0.0, 0.5, 1.0\] is no"),
    "box upside down": (BOX_COLUMN, lambda v: v.__setitem__(2, [0, 1, 1, 0]), "map_box .* is no region"),
    "infinite box": (BOX_COLUMN, lambda v: v.__setitem__(2, [-np.inf, 0, 1, 1]), "map_box .* is no region"),
    "empty label": (PALETTE_COLUMN, lambda v: v.__setitem__(2, []), "it has an empty label"),
    "no palette": (PALETTE_COLUMN, lambda v: v.__setitem__(2, None), "it has no palette"),
    "no positions": (INDEX_COLUMN, lambda v: v.__setitem__(2, None), "it has no label map"),
    "half a box": (BOX_COLUMN, lambda v: v.__setitem__(2, [0, 0, NAN, 1]), "map_box .* is no region"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_broken_maps_are_named_by_their_offset(case):
    name, change, message = PROBLEMS[case]
    source = LabelMapReader(datasets.Dataset(changed(table_of(random_maps(6)), name, change)))
    assert source.problems([3, 4, 1], NUM_CLASSES) == ([], MAP_SHAPE)
    problems, _ = source.problems([5, 2, 0], NUM_CLASSES)
    assert {offset for offset, _ in problems} == {1}
    assert re.search(message, problems[0][1])


def test_all_broken_maps_are_named_in_order():
    table = changed(table_of(random_maps(6)), INDEX_COLUMN, lambda v: [set_cell(row, 0, 99)(v) for row in (4, 1)])
    problems, shape = LabelMapReader(datasets.Dataset(table)).problems(range(6), NUM_CLASSES)
    assert [row for row, _ in problems] == [1, 4]
    assert shape is None


def test_source_names_missing_columns():
    rows = compact_rows(random_maps(2)).remove_columns(PALETTE_COLUMN)
    with pytest.raises(ValueError, match=f"no column '{PALETTE_COLUMN}'; the data has \\['image_key'"):
        LabelMapReader(rows)
    with pytest.raises(ValueError, match=f"no column '{IDS_COLUMN}', '{SCORES_COLUMN}'"):
        LabelMapReader(datasets.Dataset.from_dict({"image": [1, 2]}))


def test_class_names_are_those_of_the_palette():
    assert label_class_names(compact_rows(random_maps(2))) == [f"class {index}" for index in range(NUM_CLASSES)]
    assert label_class_names(plain_rows(random_maps(2))) is None


def writer_of(folder: Path, rows_per_shard: int = 4, **settings) -> LabelSetWriter:
    layout = layout_of(random_maps(1))
    return LabelSetWriter(folder, "train", layout, {"annotator": "dice", **settings}, {"dice": "6"}, rows_per_shard)


def test_begin_makes_a_folder_and_continues_it(tmp_path):
    writer = writer_of(tmp_path / "a" / "labels")
    writer.begin()
    record = json.loads(writer.record.read_text())
    assert record["versions"] == {"dice": "6"}
    assert record["settings"] == {
        "annotator": "dice", "split": "train", "k": 3, "map_size": [4, 6], "score_type": "float16",
        "rows_per_shard": 4, "num_classes": 7, "format": 2,
    }  # fmt: skip
    writer.write(1, table_of(random_maps(3)))
    with pytest.raises(ValueError, match="Another run is writing"):
        writer_of(tmp_path / "a" / "labels").begin()
    writer.release()
    writer_of(tmp_path / "a" / "labels").begin()
    assert [writer.is_written(shard) for shard in (0, 1)] == [False, True]
    assert json.loads(writer.record.read_text()) == record


OTHER_SETTINGS = {
    "rows_per_shard: 4 there, 5 now": {"rows_per_shard": 5},
    "annotator: 'dice' there, 'coin' now": {"annotator": "coin"},
    "revision: None there, 'main' now": {"revision": "main"},
}


@pytest.mark.parametrize("message", OTHER_SETTINGS)
def test_other_settings_are_refused_and_named(message, tmp_path):
    writer_of(tmp_path).begin()
    before = (tmp_path / "token_labels.json").read_bytes()
    with pytest.raises(
        ValueError, match=rf"(?s)other settings, as token_labels.json there says.*folder\.\n  {message}$"
    ):
        writer_of(tmp_path, **OTHER_SETTINGS[message]).begin()
    assert (tmp_path / "token_labels.json").read_bytes() == before


def test_unfinished_set_of_an_older_format_is_refused(tmp_path):
    writer = writer_of(tmp_path)
    writer.begin()
    writer.release()
    record = json.loads(writer.record.read_text())
    del record["settings"]["format"]
    writer.record.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"(?s)other settings.*format: None there, 2 now"):
        writer_of(tmp_path).begin()


def test_other_versions_are_a_warning(tmp_path, caplog):
    writer_of(tmp_path).begin()
    writer = writer_of(tmp_path)
    writer.versions = {"dice": "7"}
    writer.begin()
    assert "begun with {'dice': '6'}; now {'dice': '7'}" in caplog.text


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"smile")
    with pytest.raises(ValueError, match="photos holds other files"):
        writer_of(tmp_path / "photos").begin()
    with pytest.raises(ValueError, match="me.jpg is a file; a label set is a folder"):
        writer_of(tmp_path / "photos" / "me.jpg").begin()
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["me.jpg"]
    (tmp_path / "empty").mkdir()
    writer_of(tmp_path / "empty").begin()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"versions": {}}', "null"])
def test_damaged_record_is_named(content, tmp_path):
    (tmp_path / "token_labels.json").write_text(content)
    with pytest.raises(ValueError, match="token_labels.json is damaged"):
        writer_of(tmp_path).begin()


def test_run_that_was_killed_while_it_began_is_continued(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".token_labels.json.a1b2c3d_.partial").write_bytes(b"{")
    writer = writer_of(tmp_path)
    writer.begin()
    writer.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "token_labels.json"]


def test_partial_files_of_a_killed_run_are_removed(tmp_path):
    writer_of(tmp_path).begin()
    for path in (
        tmp_path / "data" / ".train-00001.parquet.a1b2c3d_.partial",
        tmp_path / ".README.md.z9y8x7w6.partial",
    ):
        path.write_bytes(b"half")
    writer = writer_of(tmp_path)
    writer.begin()
    writer.release()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "data",
        "token_labels.json",
    ]


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_damaged_shard_is_made_again(keep, tmp_path, caplog):
    writer = writer_of(tmp_path)
    writer.begin()
    writer.write(0, table_of(random_maps(4)))
    content = writer.path(0).read_bytes()
    writer.path(0).write_bytes(content[:keep])
    assert not writer.is_written(0)
    assert "train-00000.parquet is damaged" in caplog.text
    assert not writer.path(0).exists()
    writer.write(0, table_of(random_maps(4)))
    assert writer.path(0).read_bytes() == content


def test_full_disk_is_named_and_leaves_finished_shards(tmp_path, monkeypatch):
    writer = writer_of(tmp_path)
    writer.begin()
    writer.write(0, table_of(random_maps(4)))

    def write_table(table, file, **options):
        file.write(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", write_table)
    with pytest.raises(OSError, match="train-00001.parquet cannot be written: No space left on device.*make room"):
        writer.write(1, table_of(random_maps(4)))
    assert [path.name for path in (tmp_path / "data").glob("[!.]*")] == ["train-00000.parquet"]
    assert not list((tmp_path / "data").glob("*.partial"))


def test_duplicate_keys_are_named_in_the_end(tmp_path):
    writer = writer_of(tmp_path)
    writer.begin()
    writer.write(0, table_of(random_maps(4), keys=["a/1", "a/2", "b/1", "b/2"]))
    writer.write(1, table_of(random_maps(2), keys=["c/1", "a/2"]))
    with pytest.raises(ValueError, match="Several images have the same key: 'a/2'. Take keys"):
        writer.finish(2)
    assert "report" not in json.loads(writer.record.read_text())


def test_shards_of_another_run_are_refused(tmp_path):
    writer = writer_of(tmp_path)
    writer.begin()
    for shard in (0, 1):
        writer.write(shard, table_of(random_maps(2), keys=[f"{shard}/1", f"{shard}/2"]))
    with pytest.raises(ValueError, match="train-00001.parquet does not belong to this label set of 1 shards"):
        writer.finish(1)


def test_report_counts_notes_empty_labels_and_mass(tmp_path):
    writer = writer_of(tmp_path)
    writer.begin()
    notes = ["grayscale", "", "grayscale; transparency dropped", "unreadable: no image"]
    empty, outside = [False, False, False, True], [0.25, 0.5, 0.75, None]
    writer.write(0, table_of(random_maps(4), notes=notes, is_empty=empty, outside_mass=outside))
    report = writer.finish(1)["report"]
    assert (report["num_images"], report["num_empty_labels"], report["mean_outside_mass"]) == (4, 1, 0.5)
    assert report["bytes_per_image"] == round(writer.path(0).stat().st_size / 4, 1)
    assert report["notes"] == {
        "grayscale": {"count": 2, "first": ["row:0", "row:2"]},
        "transparency dropped": {"count": 1, "first": ["row:2"]},
        "unreadable: no image": {"count": 1, "first": ["row:3"]},
    }


@pytest.mark.parametrize("split", ["train", "validation", "trainval"])
def test_card_is_yaml_and_the_folder_loads(split, tmp_path):
    maps = random_maps(6)
    layout = layout_of(maps)
    table = table_of(maps, layout, notes=["grayscale", *[""] * 5], outside_mass=[0.5] * 6)
    folder = write_label_set(tmp_path / "labels", table, layout, split=split)
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(head)["pretty_name"] == "Dice"
    for part in ("# Dice", "6 images a map of 4 x 6 cells", "| annotator | dice |", "1 x grayscale: row:0", "0.5 to"):
        assert part in text
    assert "{{" not in text
    labels = load(folder, split)
    assert labels[KEY_COLUMN][:] == [f"row:{row}" for row in range(6)]
    assert labels[NOTE_COLUMN][0] == "grayscale"


@pytest.mark.parametrize("num_rows, expected", [(1, 64), (4096, 64), (4097, 65), (100_000, 1563), (1_281_167, 4096)])
def test_shards_are_neither_tiny_nor_huge(num_rows, expected):
    assert default_rows_per_shard(num_rows) == expected
