"""Packed label maps: links and steps by hand, exact round trips, older sets, damage and size."""

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_lvvit.labels.checks.report import check_label_set
from modeling_lvvit.labels.columns import INDEX_COLUMN, SCORES_COLUMN, to_arrow, to_numpy
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.labels.packing import (
    LINKS_COLUMN,
    MAX_K,
    STEPS_COLUMN,
    climb_steps,
    follow_links,
    is_packed,
    link_classes,
    pack,
    packed_leaves,
    score_steps,
    unpack,
)
from modeling_lvvit.labels.reader import LabelMapReader
from modeling_lvvit.labels.storage import PALETTE_COLUMN, LabelMaps, write_shard
from support.label_sets import NUM_CLASSES, layout_of, load, random_maps, table_of, write_label_set


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The cache of datasets mistakes folders of one name for each other (see test_label_join.py)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def few_classes_are_packed(monkeypatch):
    """Small maps are easier to look at."""
    monkeypatch.setattr("modeling_lvvit.labels.packing.tables.MIN_CLASSES", 2)


def rough_maps(count: int, side: int = 18, num_classes: int = 1000, k: int = 5) -> LabelMaps:
    """Maps of an annotator that is unsure, about 108 classes each: 300 classes with fields of 6 x 6 values, and much noise."""
    rng = np.random.default_rng(0)
    distance = (np.arange(side)[:, None] + 0.5) * 6 / side - 0.5 - np.arange(6)
    weights = np.maximum(0, 1 - np.abs(distance))
    weights /= weights.sum(axis=1, keepdims=True)  # (side, 6)
    ids, best = [], []
    for _ in range(count):
        classes = rng.permutation(num_classes)[:300]
        fields = rng.normal(0, 2, (300, 6, 6)) + rng.exponential(1.5, (300, 1, 1))
        scores = 4 + weights @ fields @ weights.T + rng.normal(0, 1.3, (300, side, side))
        top = np.argsort(-scores, axis=0)[:k]
        ids.append(classes[top])
        best.append(np.take_along_axis(scores, top, axis=0))
    return LabelMaps(np.array(ids), np.array(best).astype(np.float16))


def bits(table: pa.Table) -> tuple[list, np.ndarray, np.ndarray]:
    """Everything about the maps of a table that reading must give back."""
    scores = to_numpy(table[SCORES_COLUMN])
    return table[PALETTE_COLUMN].to_pylist(), to_numpy(table[INDEX_COLUMN]), scores.view(f"u{scores.itemsize}")


def assert_comes_back(table: pa.Table) -> pa.Table:
    packed = pack(table)
    assert is_packed(packed.column_names)
    unpacked = unpack(packed)
    assert unpacked.schema.equals(table.schema, check_metadata=True)
    for ours, expected in zip(bits(unpacked), bits(table)):
        assert np.array_equal(ours, expected) if isinstance(ours, np.ndarray) else ours == expected
    others = [name for name in table.column_names if name not in (PALETTE_COLUMN, INDEX_COLUMN, SCORES_COLUMN)]
    assert unpacked.select(others).equals(table.select(others))
    return packed


def test_links_by_hand():
    classes = np.array([[7, 3, 5], [7, 3, 3]]).reshape(1, 1, 2, 3)  # K = 1
    links, palettes = link_classes(classes)
    # 3: the next class of the palette; 1: first choice; the last cell: its left one (3) comes before its upper one (5)
    assert links.tolist() == [[[[3, 3, 3], [1, 2, 1]]]]
    assert palettes[0].tolist() == [7, 3, 5]
    assert follow_links(links).tolist() == [[[[0, 1, 2], [0, 1, 1]]]]


def test_choices_are_counted_without_those_that_a_cell_has_named():
    left, cell = [4, 9], [9, 4]  # K = 2, one row of two cells
    links, palettes = link_classes(np.array([left, cell]).T.reshape(1, 2, 1, 2))
    assert links[0, :, 0, 0].tolist() == [5, 5]  # new, new
    assert links[0, :, 0, 1].tolist() == [2, 1]  # the second of the left cell; then its first is the only one
    assert palettes[0].tolist() == [4, 9]


def test_classes_that_no_neighbor_names_are_positions_of_the_palette():
    links, palettes = link_classes(np.array([[4, 9], [1, 2], [9, 4]]).T.reshape(1, 2, 1, 3))  # three cells
    assert palettes[0].tolist() == [4, 1, 9, 2]  # the map of first classes comes first
    assert links[0, :, 0].tolist() == [[5, 5, 5], [2 * 2 + 2 + 2, 5, 2 * 2 + 2 + 0]]


def test_steps_by_hand():
    values = np.uint16([[[10, 12], [9, 20]], [[4, 12], [8, 5]]]).reshape(1, 2, 2, 2)
    steps = score_steps(values)
    assert steps[0, 0].tolist() == [[6, 0], [1, 15]]
    # the last class: as it is, from the left, from above, and from (3 * (8 + 12) - 2 * 4) // 4 = 13
    assert steps[0, 1].tolist() == [[4, 8], [4, 2**16 - 8]]
    assert np.array_equal(climb_steps(steps), values)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 1, 7), (3, 2, 7, 1), (2, 3, 5, 4)])
def test_steps_of_any_values_come_back(dtype, shape):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    assert np.array_equal(climb_steps(score_steps(values)), values)


@pytest.mark.parametrize("score_type", ["float16", "int8"])
@pytest.mark.parametrize(
    "num_classes, shape",
    [(7, (3, 4, 6)), (40_000, (3, 4, 6)), (7, (7, 3, 2)), (9, (1, 5, 4)), (30, (MAX_K, 2, 9)), (5, (2, 1, 1))],
)
def test_random_maps_come_back(num_classes, shape, score_type):
    maps = random_maps(9, num_classes, shape)
    assert_comes_back(table_of(maps, layout_of(maps, num_classes, score_type), is_empty=[0, 1, 0, 0, 0, 0, 0, 0, 1]))


SCORES = {
    "equal": np.float16(3),
    "zeros": np.float16(0),
    "both zeros": np.tile(np.float16([0, -0.0]), 108),
    "negative": -np.arange(216).astype(np.float16),
    "ends": np.resize(np.float16([65504, -65504, 6e-8, -6e-8, 1]), 216),
    "not finite": np.resize(np.float16([np.nan, np.inf, -np.inf, 2]), 216),
    "ascending": np.linspace(-20, 30, 216).astype(np.float16),
}


@pytest.mark.parametrize("case", SCORES)
def test_unusual_scores_come_back_bit_for_bit(case):
    maps = random_maps(3)
    maps.scores[:] = np.resize(SCORES[case], maps.scores.shape)
    assert_comes_back(table_of(maps))


def test_slices_and_many_rows_come_back(monkeypatch):
    monkeypatch.setattr("modeling_lvvit.labels.packing.tables.ROWS_AT_ONCE", 4)
    table = table_of(random_maps(11))
    assert_comes_back(table.slice(3, 7))
    packed = pack(table)
    assert bits(unpack(pa.concat_tables([packed.slice(9), packed.slice(2, 3)])))[0] == [
        palette for rows in (table.slice(9), table.slice(2, 3)) for palette in rows[PALETTE_COLUMN].to_pylist()
    ]
    assert len(unpack(packed.slice(0, 0))) == 0


def test_sets_of_few_classes_are_stored_as_they_are(monkeypatch):
    monkeypatch.setattr("modeling_lvvit.labels.packing.tables.MIN_CLASSES", 17)
    for num_classes, packed in ((16, False), (17, True)):
        maps = random_maps(2, num_classes)
        assert is_packed(pack(table_of(maps, layout_of(maps, num_classes))).column_names) == packed


def test_what_would_not_come_back_is_stored_as_it_is(tmp_path):
    many = random_maps(2, 40, (MAX_K + 1, 2, 3))
    table = table_of(many, layout_of(many, 40))
    assert pack(table) is table
    write_shard(tmp_path / "many.parquet", table)
    assert pq.read_table(tmp_path / "many.parquet").equals(table)
    outside = table_of(random_maps(2))
    index = to_numpy(outside[INDEX_COLUMN]).copy()
    index[1, 0, 0, 0] = 99
    position = outside.column_names.index(INDEX_COLUMN)
    outside = outside.set_column(position, outside.schema.field(INDEX_COLUMN), to_arrow(index))
    assert pack(outside) is outside


@pytest.mark.parametrize("score_type", ["float16", "int8"])
def test_set_of_the_older_form_and_the_same_set_packed_read_alike(score_type, tmp_path):
    maps = random_maps(6)
    maps.boxes = np.float32([[0, 0, 0.5, 1], *[[np.nan] * 4] * 5])
    maps.scores[:] = (
        np.rint(maps.scores.astype(np.float32) / 0.75) * 0.75
    )  # what the old and the new form of int8 can hold
    layout = layout_of(maps, score_type=score_type)
    folder = write_label_set(tmp_path / "new", table_of(maps, layout), layout, rows_per_shard=6)
    plain = table_of(maps)
    if score_type == "int8":  # quarters, signed
        quarters = np.rint(to_numpy(plain[SCORES_COLUMN]).astype(np.float32) * 4).astype(np.int8)
        plain = plain.set_column(plain.column_names.index(SCORES_COLUMN), SCORES_COLUMN, to_arrow(quarters))
        plain = plain.replace_schema_metadata(None)
    (tmp_path / "old" / "data").mkdir(parents=True)
    pq.write_table(plain, tmp_path / "old" / "data" / "train-00000.parquet")
    new, old = (LabelSet.open(str(path), "train") for path in (folder, tmp_path / "old"))
    new, old = (LabelMapReader(labels.rows).fetch([5, 0, 2]) for labels in (new, old))
    assert np.array_equal(new.index, old.index) and np.array_equal(new.scores, old.scores)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(new.palettes, old.palettes))
    assert np.array_equal(new.boxes, old.boxes, equal_nan=True)


def test_files_are_packed_and_read_from_mapped_memory(tmp_path):
    maps = random_maps(6)
    layout = layout_of(maps)
    rows = load(write_label_set(tmp_path / "labels", table_of(maps, layout), layout))
    assert {LINKS_COLUMN, STEPS_COLUMN} <= set(rows.column_names)
    reader = LabelMapReader(rows)
    expected = LabelMapReader(datasets.Dataset(table_of(maps))).fetch(range(6))
    stored = reader.fetch(range(6))
    assert np.array_equal(stored.index, expected.index) and np.array_equal(stored.scores, expected.scores)
    assert reader._mapped.is_usable and reader.rows.cache_files


@pytest.mark.parametrize("link", [9999, 0, 6])
def test_damaged_links_are_named_by_the_check(link, tmp_path):
    maps = random_maps(6)
    layout = layout_of(maps)
    folder = write_label_set(tmp_path / "labels", table_of(maps, layout), layout, rows_per_shard=6)
    path = folder / "data" / "train-00000.parquet"
    table = pq.read_table(path)
    links = table[LINKS_COLUMN].to_pylist()
    links[3]["0"][0][0] = link  # has no neighbors, so that every link to one is damaged
    position = table.column_names.index(LINKS_COLUMN)
    table = table.set_column(
        position, table.schema.field(LINKS_COLUMN), pa.array(links, table.schema.field(LINKS_COLUMN).type)
    )
    pq.write_table(table, path)
    (problem,) = [text for text in check_label_set(folder).problems if "image row:3" in text]
    assert "is outside its palette" in problem


def test_rough_maps_take_less_room(tmp_path):
    """Measured: 36 and 22 % of the 8 KiB of the authors' files; 88 and 84 % of what the older form takes."""
    maps = rough_maps(192)
    for score_type, share, of_older in (("float16", 0.365, 0.89), ("int8", 0.225, 0.85)):
        table, path = table_of(maps, layout_of(maps, 1000, score_type)), tmp_path / "maps.parquet"
        write_shard(path, table)
        size = path.stat().st_size
        leaves = [name + ".list.element" * 3 for name in (INDEX_COLUMN, SCORES_COLUMN)]
        options = {
            "compression": "zstd",
            "compression_level": 19,
            "use_dictionary": [PALETTE_COLUMN + ".list.element"],
        }
        pq.write_table(table, path, column_encoding=dict.fromkeys(leaves, "BYTE_STREAM_SPLIT"), **options)
        assert size <= share * 8192 * 192
        assert size <= of_older * path.stat().st_size


def test_every_map_of_a_rank_is_a_column_of_the_file():
    maps = random_maps(2, NUM_CLASSES, (2, 4, 6))
    leaves = packed_leaves(pack(table_of(maps, layout_of(maps))).schema)
    assert leaves == [
        f"{name}.{rank}.list.element.list.element" for name in (LINKS_COLUMN, STEPS_COLUMN) for rank in "01"
    ]
