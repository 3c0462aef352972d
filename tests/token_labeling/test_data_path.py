"""From a row to a batch: columns, transforms, samples, collator, checks."""

import random
from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.open_data import has_dense_columns, open_datasets
from modeling_lvvit.data.sampling import seed_generators
from modeling_lvvit.labels.columns import IDS_COLUMN, SCORES_COLUMN, scale_problems, to_numpy
from modeling_lvvit.token_labeling import (
    AugmentationConfig,
    TokenLabelCollator,
    TokenLabelDataset,
    TrainTransform,
    finish_images,
)
from modeling_lvvit.token_labeling.augmentation.collator import draw_mix_box
from support.images import encode_image, labelled_table
from support.models import MAP_COLUMNS, MAP_ROWS, NUM_CLASSES, K
from support.samples import finished, plain_transform, samples_of


def with_column(name: str, change: Callable[[list], list], column_type: pa.DataType | None = None) -> datasets.Dataset:
    """The test table with one column changed as Python lists."""
    table = labelled_table()
    position = table.column_names.index(name)
    column_type = column_type or table.schema.field(name).type
    values = change(table[name].to_pylist())
    table = table.replace_schema_metadata(None).set_column(position, name, pa.array(values, column_type))
    return datasets.Dataset(table).cast_column("image", datasets.Image())


def test_columns_come_back_as_written(labelled_rows, tmp_path):
    pq.write_table(labelled_rows.data.table, tmp_path / "train.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train")
    for rows in (labelled_rows, loaded):
        ids = to_numpy(rows.with_format("arrow")[:][IDS_COLUMN])
        assert ids.shape == (12, K, MAP_ROWS, MAP_COLUMNS)
        assert ids.dtype == np.int16
        assert ids[3].tolist() == labelled_rows[3][IDS_COLUMN]
    assert to_numpy(loaded.with_format("arrow")[:][SCORES_COLUMN]).dtype == np.float16


@pytest.mark.parametrize("kind", ["variable lists", "Array3D"])
def test_other_layouts_of_dense_columns_are_read(kind, labelled_rows):
    shape = (K, MAP_ROWS, MAP_COLUMNS)
    features = labelled_rows.features.copy()
    for name, value in ((IDS_COLUMN, "int16"), (SCORES_COLUMN, "float16")):
        nested = datasets.List(datasets.List(datasets.List(datasets.Value(value))))
        features[name] = datasets.Array3D(shape, value) if kind == "Array3D" else nested
    rows = datasets.Dataset.from_list(labelled_rows.to_list(), features=features)
    expected = samples_of(labelled_rows).label_map(5)
    for ours, reference in zip(samples_of(rows).label_map(5), expected):
        assert np.array_equal(ours, reference)


def test_shuffled_rows_keep_image_and_map_together(labelled_rows):
    order = [7, 2, 9]
    shuffled = samples_of(labelled_rows.select(order))
    for position, row in enumerate(order):
        assert np.array_equal(shuffled.label_map(position)[0], samples_of(labelled_rows).label_map(row)[0])
        assert np.array_equal(
            np.asarray(shuffled.read_image(position)), np.asarray(samples_of(labelled_rows).read_image(row))
        )


def test_flip_mirrors_image_and_map():
    image = np.zeros((40, 60, 3), dtype=np.uint8)
    image[:, :30] = 255  # left half white
    ids = np.arange(6, dtype=np.int16).reshape(1, 2, 3)
    transform = plain_transform(horizontal_flip=1.0, crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5))
    sample = transform(Image.fromarray(image), ids, ids.astype(np.float16))
    assert finished(sample)[0, 16, 40] > 0.9  # now the right half is white
    assert finished(sample)[0, 16, 8] < -0.9
    assert sample["token_label_index"].tolist() == [[[2, 1, 0], [5, 4, 3]]]


def test_crop_box_tells_where_the_pixels_come_from():
    """On an image whose color is its position, the crop's corner colors are the box."""
    rows, columns = np.mgrid[0:100, 0:150]
    image = np.stack([columns / 149, rows / 99, 0 * rows], axis=-1)
    transform = plain_transform(crop_scale=(0.2, 0.4))
    for seed in range(5):
        seed_generators(seed)
        sample = transform(Image.fromarray(np.uint8(255 * image)))
        left, top, right, bottom = sample["crop_box"].tolist()
        pixels = sample["pixel_values"] / 255
        assert pixels[0, 16, 0].item() == pytest.approx(left, abs=0.03)
        assert pixels[0, 16, -1].item() == pytest.approx(right, abs=0.03)
        assert pixels[1, 0, 24].item() == pytest.approx(top, abs=0.03)
        assert pixels[1, -1, 24].item() == pytest.approx(bottom, abs=0.03)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_crops_of_tiny_images_are_not_empty(size):
    for seed in range(40):
        seed_generators(seed)
        left, top, right, bottom = plain_transform()(Image.new("RGB", size))["crop_box"].tolist()
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1


def equal_samples(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_a_sample_hangs_on_seed_epoch_and_row_alone(labelled_rows):
    """Not on what was drawn before, and nothing that is drawn later depends on it."""
    samples = samples_of(labelled_rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3))
    samples.start_epoch(3, 1)
    before = torch.get_rng_state(), random.getstate()
    first = [samples[row] for row in range(4)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    second = samples.__getitems__([3, 1])
    assert equal_samples(first[1], second[1]) and equal_samples(first[3], second[0])
    for seed, epoch in ((3, 2), (4, 1)):
        samples.start_epoch(seed, epoch)
        assert not torch.equal(samples[1]["pixel_values"], first[1]["pixel_values"])


def test_workers_and_later_epochs_give_the_same_samples(labelled_rows):
    """Workers that outlive an epoch are told of the next one."""
    samples = samples_of(labelled_rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3))
    collator = TokenLabelCollator((4, 6), mix_methods=("token", "cutmix", "mixup"))
    loaders = [
        torch.utils.data.DataLoader(
            samples, 5, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
        )
        for workers in (0, 2)
    ]
    for epoch in range(2):
        samples.start_epoch(0, epoch)
        for first, second in zip(*loaders):
            assert equal_samples(first, second)
            assert torch.equal(finish_images(first)["pixel_values"], finish_images(second)["pixel_values"])


@pytest.mark.parametrize("strengths", [{"horizontal_flip": 2}, {"crop_scale": (0, 1)}, {"color_jitter": -1}])
def test_impossible_strengths_are_refused(strengths):
    with pytest.raises(ValueError, match=next(iter(strengths))):
        AugmentationConfig(**strengths)


def test_collator_makes_a_training_batch(labelled_rows):
    samples = samples_of(labelled_rows).__getitems__([0, 1, 2])
    batch = TokenLabelCollator((4, 6))(samples)
    assert batch["pixel_values"].shape == (3, 3, 32, 48)
    assert batch["mix_mask"].shape == (3, 4, 6)
    ids = batch["token_label_palette"].gather(1, batch["token_label_index"].long().flatten(1))
    assert ids.view(3, K, MAP_ROWS, MAP_COLUMNS)[1].tolist() == labelled_rows[1][IDS_COLUMN]


def test_collator_does_not_mix_evaluation_samples():
    batch = TokenLabelCollator((4, 6))([{"pixel_values": torch.zeros(3, 32, 48), "labels": 1}] * 2)
    assert set(batch) == {"pixel_values", "labels"}


def test_mix_boxes_stay_on_the_grid_and_have_the_published_area():
    """The mean over the published rule on 14 x 14 tokens, by summation over all draws of it, is 0.271."""
    torch.manual_seed(0)
    areas = []
    for _ in range(2000):
        left, top, right, bottom = draw_mix_box((14, 14), alpha=1.0)
        assert 0 <= left <= right <= 14
        assert 0 <= top <= bottom <= 14
        areas.append((right - left) * (bottom - top) / 196)
    assert np.mean(areas) == pytest.approx(0.271, abs=0.015)


def test_mix_box_by_hand(monkeypatch):
    """Kept share 0.75: half of 10 rows and of 6 columns, 5 and 3; from the center (7, 1) two rows and one column each way."""
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(0.75))
    center = iter((7, 1))
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(next(center)))
    assert draw_mix_box((10, 6), alpha=1.0) == (0, 5, 2, 9)


def break_image(row: int, content: bytes | None) -> datasets.Dataset:
    def change(values):
        values[row] = {"bytes": content, "path": "broken.jpg"} if content is not None else None
        return values

    return with_column("image", change)


def whole_jpeg() -> bytes:
    return encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def set_cell(value, row: int = 4):
    def change(values):
        values[row][1][2][3] = value
        return values

    return change


BROKEN_ROWS = {
    "missing image": (lambda: break_image(4, None), r"row 4.*no image"),
    "truncated JPEG": (lambda: break_image(4, whole_jpeg()[:-200]), r"row 4 \(broken.jpg\).*cannot be decoded"),
    "no image file": (lambda: break_image(4, b"hello"), r"row 4 \(broken.jpg\).*cannot be decoded"),
    "class id too large": (lambda: with_column(IDS_COLUMN, set_cell(NUM_CLASSES)), r"row 4.*class id 7 is outside \[0, 7\)"),
    "negative class id": (lambda: with_column(IDS_COLUMN, set_cell(-1)), r"row 4.*class id -1"),
    "NaN score": (lambda: with_column(SCORES_COLUMN, set_cell(float("nan"))), r"row 4.*NaN"),
    "label too large": (lambda: with_column("label", lambda v: [*v[:4], 9, *v[5:]]), r"row 4.*class id 9"),
    "missing label": (lambda: with_column("label", lambda v: [*v[:4], None, *v[5:]]), r"row 4.*class id None"),
    "missing map": (lambda: with_column(IDS_COLUMN, lambda v: [*v[:4], None, *v[5:]]), r"row 4 .*it has no label map"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_ROWS)
def test_broken_rows_are_named_before_training(case):
    make_rows, message = BROKEN_ROWS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        samples_of(make_rows()).check_rows(NUM_CLASSES)


def test_whole_rows_pass_the_check(labelled_rows):
    samples_of(labelled_rows).check_rows(NUM_CLASSES)


def test_missing_file_is_named(labelled_rows, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "gone.jpg")], "label": [0]})
    samples = TokenLabelDataset(rows.cast_column("image", datasets.Image()), plain_transform())
    with pytest.raises(ValueError, match=r"row 0 .*gone.jpg.*does not exist"):
        samples.check_rows(NUM_CLASSES)


def test_broken_image_is_named_when_it_is_read():
    with pytest.raises(ValueError, match=r"Row 4 of the train data \(broken.jpg\)"):
        samples_of(break_image(4, whole_jpeg()[:-200])).__getitems__([3, 4])


def test_wrong_rank_is_refused():
    flat = with_column(IDS_COLUMN, lambda v: [m[0] for m in v], pa.list_(pa.list_(pa.int16(), MAP_COLUMNS), MAP_ROWS))
    with pytest.raises(ValueError, match=r"rank 3.*got rank 2"):
        samples_of(flat)


def test_k_mismatch_is_refused():
    fewer = pa.list_(pa.list_(pa.list_(pa.int16(), MAP_COLUMNS), MAP_ROWS), K - 1)
    with pytest.raises(ValueError, match=r"same \[K, rows, columns\]"):
        samples_of(with_column(IDS_COLUMN, lambda v: [m[:-1] for m in v], fewer))


def test_k_mismatch_of_single_rows_is_named():
    nested = pa.list_(pa.list_(pa.list_(pa.int16())))
    rows = with_column(IDS_COLUMN, lambda v: [*v[:4], v[4][:-1], *v[5:]], nested)
    with pytest.raises(ValueError, match=r"row 4 .*its label map has another shape"):
        samples_of(rows).check_rows(NUM_CLASSES)


def test_float_ids_are_refused():
    nested = pa.list_(pa.list_(pa.list_(pa.float32())))
    with pytest.raises(ValueError, match="must hold integers"):
        samples_of(with_column(IDS_COLUMN, lambda v: v, nested))


def test_missing_column_is_named(labelled_rows):
    with pytest.raises(ValueError, match=r"no column 'photo'; it has \['image'"):
        TokenLabelDataset(labelled_rows, plain_transform(), image_column="photo")


def test_only_one_dense_column_is_refused(labelled_rows):
    with pytest.raises(ValueError, match="need both"):
        has_dense_columns(labelled_rows.remove_columns(SCORES_COLUMN), DataArguments().dense_columns)


def write_image_folder(root, count: int = 4) -> None:
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                (folder / f"{index}.jpg").write_bytes(whole_jpeg())


def test_image_folder_opens(tmp_path):
    write_image_folder(tmp_path / "pets")
    opened = open_datasets(DataArguments(dataset_name=str(tmp_path / "pets")), seed=0)
    train, evaluation = opened.train, opened.evaluation
    assert train.features["label"].names == ["cat", "dog"]
    assert (len(train), len(evaluation)) == (8, 8)


def test_parquet_file_opens_and_is_split(tmp_path, labelled_rows):
    path = tmp_path / "all.parquet"
    pq.write_table(labelled_rows.data.table, path)
    opened = open_datasets(DataArguments(dataset_name=str(path), eval_fraction=0.25), seed=0)
    train, evaluation, name = opened.train, opened.evaluation, opened.eval_name
    assert name == "25 % of train, held out"
    assert (len(train), len(evaluation)) == (9, 3)


def test_class_names_as_text_become_ids(tmp_path, labelled_rows):
    names = ["no", "yes"] * 6
    rows = labelled_rows.remove_columns("label").add_column("kind", names)
    rows.to_parquet(tmp_path / "train.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path), label_column_name="kind")
    opened = open_datasets(arguments, seed=0)
    train, evaluation = opened.train, opened.evaluation
    assert train.features["kind"].names == evaluation.features["kind"].names == ["no", "yes"]


def test_wrong_path_and_split_are_named(tmp_path, labelled_rows):
    with pytest.raises(FileNotFoundError, match=r"no dataset at .*missing"):
        open_datasets(DataArguments(dataset_name=str(tmp_path / "missing")), seed=0)
    with pytest.raises(FileNotFoundError, match="some/name is neither a local folder or Parquet file"):
        open_datasets(DataArguments(dataset_name="some/name"), seed=0)
    labelled_rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['train'\]"):
        open_datasets(DataArguments(dataset_name=str(tmp_path), eval_split="dev"), seed=0)


def test_duplicate_class_in_a_cell_is_named():
    def change(values):
        values[4][1][2][3] = values[4][0][2][3]
        return values

    with pytest.raises(ValueError, match=r"row 4 .*a cell names a class twice"):
        samples_of(with_column(IDS_COLUMN, change)).check_rows(NUM_CLASSES)


def test_scores_below_the_unnamed_classes_are_refused():
    """Logarithms of probabilities: classes that a cell does not name have score 0, and would get all of it."""
    rows = with_column(SCORES_COLUMN, lambda values: (np.array(values) * 0 - np.arange(K)[:, None, None]).tolist())
    with pytest.raises(ValueError, match=r"row 0 .*no score of its map is above 0.*about 10 to logarithms"):
        samples_of(rows).check_rows(NUM_CLASSES)
    assert scale_problems(np.full((2, 3, 2, 2), -0.5), num_classes=3) == []  # every class is named
    assert scale_problems(np.zeros((2, 3, 2, 2)), num_classes=4) == []  # nothing is known


def test_more_ranks_than_classes_are_refused(labelled_rows):
    with pytest.raises(ValueError, match=r"\[3, 6, 5\] needs 1 <= K <= 2"):
        samples_of(labelled_rows).check_rows(2)


def test_shapes_are_compared_beyond_one_block(monkeypatch):
    monkeypatch.setattr("modeling_lvvit.data.image_dataset.ROWS_PER_CHECK", 4)
    nested = {IDS_COLUMN: pa.int16(), SCORES_COLUMN: pa.float16()}
    table = labelled_table()
    for name, value_type in nested.items():
        kind = pa.list_(pa.list_(pa.list_(value_type)))
        values = [m if row < 8 else m[:2] for row, m in enumerate(table[name].to_pylist())]
        table = table.replace_schema_metadata(None).set_column(
            table.column_names.index(name), name, pa.array(values, kind)
        )
    rows = datasets.Dataset(table).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"row 8 .*\[2, 6, 5\], earlier rows \[3, 6, 5\]"):
        samples_of(rows).check_rows(NUM_CLASSES)


def test_damaged_png_is_named():
    content = encode_image(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "PNG")
    with pytest.raises(ValueError, match=r"row 4 .*cannot be decoded"):
        samples_of(break_image(4, content[:4000] + content[-12:])).check_rows(NUM_CLASSES)


def test_sixteen_bit_grayscale_keeps_its_tones():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    content = encode_image(values, "PNG")
    image = samples_of(break_image(4, content)).read_image(4)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 100, 255]


def test_training_split_never_serves_as_evaluation(tmp_path, labelled_rows):
    labelled_rows.to_parquet(tmp_path / "test.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path), train_split="test")
    opened = open_datasets(arguments, seed=0)
    train, evaluation = opened.train, opened.evaluation
    assert len(train) + len(evaluation) == 12
    with pytest.raises(ValueError, match="both training and evaluation"):
        open_datasets(DataArguments(dataset_name=str(tmp_path), train_split="test", eval_split="test"), seed=0)


BAD_LABELS = {
    "floats": (pa.array([0.5] * 12), "must hold class ids or names, got double"),
    "missing": (pa.array([None] + [1] * 11, pa.int64()), "Row 0 .* has no label"),
    "huge ids": (pa.array([3_000_000_000] * 12), "stay below 1,000,000"),
    "negative ids": (pa.array([-1] * 12), "count from 0"),
    "one class": (pa.array(["cat"] * 12), "a classifier needs two"),
    "lists": (pa.array([[0.5]] * 12), "must hold lists of class names or of class ids, got lists of double"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_columns_that_are_no_labels_are_refused(case, tmp_path):
    column, message = BAD_LABELS[case]
    table = labelled_table().select(["image"]).replace_schema_metadata(None).append_column("kind", column)
    pq.write_table(table, tmp_path / "train.parquet")
    arguments = DataArguments(dataset_name=str(tmp_path), label_column_name="kind")
    with pytest.raises(ValueError, match=message):
        open_datasets(arguments, seed=0)


def test_large_strings_are_class_names(tmp_path):
    names = pa.array(["no", "yes"] * 6, pa.large_string())
    table = labelled_table().select(["image"]).replace_schema_metadata(None).append_column("kind", names)
    pq.write_table(table, tmp_path / "train.parquet")
    opened = open_datasets(DataArguments(dataset_name=str(tmp_path), label_column_name="kind"), seed=0)
    train = opened.train
    assert train.features["kind"].names == ["no", "yes"]


@pytest.mark.parametrize("options", [{"max_train_samples": 0}, {"max_eval_samples": -1}])
def test_no_rows_are_refused(options, tmp_path, labelled_rows):
    labelled_rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="There are no (training|evaluation) rows"):
        open_datasets(DataArguments(dataset_name=str(tmp_path), **options), seed=0)


def test_mistyped_dense_columns_are_refused(labelled_rows):
    arguments = DataArguments(token_label_ids_column="tl_ids", token_label_scores_column="tl_scores")
    with pytest.raises(ValueError, match="need both 'tl_ids' and 'tl_scores'"):
        has_dense_columns(labelled_rows, arguments.dense_columns)


def test_floating_point_images_are_named():
    content = encode_image(np.zeros((8, 8), dtype=np.float32), "TIFF")
    with pytest.raises(ValueError, match=r"row 4 .*save the images with 8 or 16 bits"):
        samples_of(break_image(4, content)).check_rows(NUM_CLASSES)


def test_labels_that_are_no_ids_are_refused(labelled_rows):
    rows = labelled_rows.remove_columns("label").add_column("label", [0.5] * 12)
    with pytest.raises(ValueError, match="must hold class ids, got double"):
        TokenLabelDataset(rows, plain_transform())


@pytest.mark.parametrize("file_format", ["TIFF", "BMP", "GIF", "WEBP", "PNG", "JPEG"])
def test_whole_files_of_every_format_pass(file_format):
    content = encode_image(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8), file_format)
    samples_of(break_image(4, content)).check_rows(NUM_CLASSES)
    assert samples_of(break_image(4, content)).read_image(4).size == (30, 20)
