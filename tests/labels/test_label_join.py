"""Label sets find their images: keys, class names, training rows; and maps that cover a region of their image."""

import math
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.ops import roi_align

from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.open_data import OpenedData, open_datasets
from modeling_lvvit.data.classes.class_labels import check_class_names
from modeling_lvvit.data.image_keys import path_keys, read_keys, row_keys
from modeling_lvvit.data.images import content_hash
from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps
from modeling_lvvit.labels.label_maps import build_palette, decode
from modeling_lvvit.labels.label_set import JoinedLabels, LabelSet
from modeling_lvvit.labels.sparse_targets import SparseTargets
from modeling_lvvit.labels.storage import LabelMaps, LabelSetLayout
from modeling_lvvit.token_labeling import AugmentationConfig, TokenLabelDataset, TrainTransform
from modeling_lvvit.token_labeling.losses import token_labeling_loss
from modeling_lvvit.token_labeling.sparse_cross_entropy import soft_cross_entropy
from support.images import encode_image
from support.label_sets import layout_of, random_maps, table_of, write_label_set


CLASSES = ("cat", "dog", "eel")
K, ROWS, COLUMNS = 2, 2, 4  # K != classes, rows != columns


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def image_bytes(number: int) -> bytes:
    """Image `number`, of class `number % 3`: red tells the class, green the number."""
    color = np.uint8([80 * (number % 3), 10 * number, 0])
    return encode_image(np.tile(color, (6 + number % 4, 8, 1)), "PNG")


def numbers_and_classes(samples: TokenLabelDataset) -> list[tuple[int, int, int, int, int]]:
    """What colors, label maps and labels of all samples say: number and class twice, class once more."""
    told = []
    for row, label in enumerate(samples.labels(len(samples))):
        red, green, _ = np.asarray(samples.read_image(row))[0, 0].tolist()
        ids, scores = samples.label_map(row)
        best = int(scores[:, 0, 0].argmax())
        told.append((green // 10, int(scores[best, 0, 0]), red // 80, int(ids[best, 0, 0]), label))
    return told


def maps_of(numbers: list[int]) -> LabelMaps:
    """Maps that say class `number % 3` with score `number`, and the next class with a lower score."""
    numbers = np.array(numbers).reshape(-1, 1, 1, 1)
    ids = np.concatenate([numbers % 3, (numbers + 1) % 3], axis=1)
    scores = np.concatenate([numbers, numbers - 9], axis=1)
    wide = np.ones((1, 1, ROWS, COLUMNS))
    return LabelMaps((ids * wide).astype(np.int64), (scores * wide).astype(np.float16))


def key_of(number: int) -> str:
    return f"{CLASSES[number % 3]}/{number}.png"


def labels_table(numbers: list[int], class_names=CLASSES, **columns) -> pa.Table:
    layout = LabelSetLayout(tuple(class_names), K, (ROWS, COLUMNS))
    known = {"keys": [key_of(number) for number in numbers]}
    known["hashes"] = [content_hash(image_bytes(number)) for number in numbers]
    return table_of(maps_of(numbers), layout, **{**known, **columns})


def label_rows(numbers: list[int], **columns) -> datasets.Dataset:
    return datasets.Dataset(labels_table(numbers, **columns))


def image_rows(numbers: list[int], folder: str | None = "/data/train", **columns: list) -> datasets.Dataset:
    """Images in memory; `folder` is what their paths begin with, `None` for images without path."""
    paths = [None if folder is None else f"{folder}/{key_of(number)}" for number in numbers]
    images = [{"bytes": image_bytes(number), "path": path} for number, path in zip(numbers, paths)]
    labels = [number % 3 for number in numbers]
    rows = datasets.Dataset.from_dict({"image": images, "label": labels, **columns})
    return rows.cast(
        datasets.Features(
            {**rows.features, "image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
        )
    )


def assert_joined(joined: JoinedLabels, images: datasets.Dataset) -> None:
    """Every image has the map of its number."""
    images = images if joined.images is None else images.select(joined.images)
    samples = TokenLabelDataset(images, lambda image, *label_map: {}, label_maps=joined.label_maps)
    told = numbers_and_classes(samples)
    assert told == [(number, number, number % 3, number % 3, number % 3) for number, *_ in told]


def test_labels_in_the_order_of_the_images_need_no_index():
    images = image_rows([0, 1, 2, 3, 4])
    joined = LabelSet(label_rows([0, 1, 2, 3, 4])).join(images)
    assert joined.label_maps.row_of is None
    assert joined.images is None
    assert joined.class_names == list(CLASSES)
    assert_joined(joined, images)


@pytest.mark.parametrize("numbers", [[4, 0, 3], [3, 4, 1, 0, 2, 5, 6]])
def test_shuffled_labels_and_parts_find_their_images(numbers, caplog):
    order, images = [5, 2, 6, 4, 0, 1, 3], image_rows(numbers)
    joined = LabelSet(label_rows(order)).join(images)
    assert joined.label_maps.row_of.tolist() == [order.index(number) for number in numbers]
    assert not caplog.records  # the files are those that were annotated
    assert_joined(joined, images)


def test_images_that_were_reordered_find_their_labels():
    images = image_rows([0, 1, 2, 3, 4]).select([3, 1, 4])
    assert_joined(LabelSet(label_rows([0, 1, 2, 3, 4])).join(images), images)


@pytest.mark.parametrize("folder", ["/elsewhere", "zip://train", "C:\\data"])
def test_labels_survive_a_move_of_the_images(folder):
    images = image_rows([2, 0, 1], folder)
    if folder.startswith("zip"):
        images = image_rows([2, 0, 1])
        table = images.data.table
        values = [
            {**value, "path": f"zip:/{value['path']}::https://host/d.zip"} for value in table["image"].to_pylist()
        ]
        table = table.set_column(0, table.schema.field("image"), pa.array(values, table.schema.field("image").type))
        images = datasets.Dataset(table)
    assert_joined(LabelSet(label_rows([0, 1, 2])).join(images), images)


def test_other_folders_around_the_same_file_names_are_joined():
    keys = [f"all/{number}.png" for number in (2, 0, 1)]
    images = image_rows([0, 1, 2])
    assert_joined(LabelSet(label_rows([2, 0, 1], keys=keys)).join(images), images)


def test_file_names_that_repeat_are_no_keys():
    """cat/a.png and dog/a.png must not find katze/a.png and hund/a.png."""
    images = image_rows([0, 1], name=["cat/a.png", "dog/a.png"])
    labels = label_rows([0, 1], keys=["katze/a.png", "hund/a.png"])
    with pytest.raises(ValueError, match="2 of 2 images have no label map: 'cat/a.png', 'dog/a.png'"):
        LabelSet(labels).join(images, key_column="name")


def test_missing_keys_are_named():
    with pytest.raises(
        ValueError, match="2 of 4 images have no label map: 'eel/2.png', 'cat/3.png'.*2 keys like 'dog/1"
    ):
        LabelSet(label_rows([1, 0])).join(image_rows([0, 1, 2, 3]))


def test_duplicate_keys_are_named_on_both_sides():
    keys = ["cat/0.png", "dog/1.png", "dog/1.png"]
    with pytest.raises(ValueError, match="more than once in the label set: 'dog/1.png'"):
        LabelSet(label_rows([0, 1, 2], keys=keys)).join(image_rows([0, 1]))
    with pytest.raises(ValueError, match="more than once in the image data: 'cat/0.png'"):
        LabelSet(label_rows([0, 1])).join(image_rows([0, 1, 0]))
    with pytest.raises(ValueError, match="more than once in the label set"):  # even where the orders agree
        LabelSet(label_rows([0, 1, 0])).join(image_rows([0, 1, 0]))


@pytest.mark.parametrize("names", [["a", "b", "c"], [30, 10, 20]])
def test_key_column_is_used(names):
    images = image_rows([2, 0, 1], None, name=names)
    keys = [str(names[position]) for position in (1, 2, 0)]
    assert_joined(LabelSet(label_rows([0, 1, 2], keys=keys)).join(images, key_column="name"), images)


def test_key_column_without_values_is_refused():
    images = image_rows([0, 1, 2], name=["a", None, "c"])
    with pytest.raises(ValueError, match="Row 1 has no value in column 'name'"):
        read_keys(images, "image", "name")
    with pytest.raises(ValueError, match=r"no column 'id' to take keys from; the data has \['image'"):
        read_keys(images, "image", "id")


def test_keys_of_several_chunks_are_one_column():
    images = datasets.concatenate_datasets([image_rows(part) for part in ([0, 1, 2], [3, 4, 5], [6])])
    assert read_keys(images, "image").num_chunks == 3
    assert read_keys(images, "image").to_pylist() == [key_of(number) for number in range(7)]
    assert read_keys(images.select([5, 0, 3]), "image").to_pylist() == [key_of(number) for number in (5, 0, 3)]
    order = [6, 1, 0, 4, 2, 5, 3]
    joined = LabelSet(label_rows(order, is_empty=[number == 3 for number in order])).join(images)
    assert joined.images.tolist() == [0, 1, 2, 4, 5, 6]
    assert_joined(joined, images)
    with pytest.raises(ValueError, match="Row 4 has no value in column 'name'"):
        read_keys(image_rows([0, 1, 2, 3, 4], name=[*"abcd", None]), "image", "name")
    with pytest.raises(ValueError, match=r"in the image data: 'cat/0.png', 'dog/1.png'\."):
        LabelSet(label_rows([0, 1, 2])).join(image_rows([0, 1, 2, 1, 0]))


@pytest.mark.parametrize("pattern", [r"\d+", r"(\d+)", r"(\d+)\.png$", r"^[a-z]+/(\d+)"])
def test_key_pattern_cuts_the_key_out_of_both_sides(pattern):
    images = image_rows([2, 0, 1], "/photos")
    keys = [f"annotated/{number}.png" for number in (0, 1, 2)]
    assert_joined(LabelSet(label_rows([0, 1, 2], keys=keys)).join(images, key_pattern=pattern), images)


GROUPED = [
    r"(?:all|cat|dog|eel)/(\d+)", r"(\d+)\.(png|jpg)", r"(?P<number>\d+)", r"[(]?(\d+)", r"\(?(\d+)", r"(?i)(\d+)\.PNG",
    r"((\d)\d*)", r"(?<=/)\d+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", GROUPED)
def test_first_group_of_a_key_pattern_is_the_key(pattern):
    images = image_rows([2, 0, 1])
    keys = [f"all/{number}.png" for number in (0, 1, 2)]
    assert_joined(LabelSet(label_rows([0, 1, 2], keys=keys)).join(images, key_pattern=pattern), images)


def test_bad_key_patterns_are_named():
    labels, images = label_rows([0, 1]), image_rows([0, 1])
    with pytest.raises(ValueError, match=r"`key_pattern` '\(' is no regular expression"):
        LabelSet(labels).join(images, key_pattern="(")
    with pytest.raises(ValueError, match=r"`key_pattern` 'dog.*' does not match the key 'cat/0.png'"):
        LabelSet(labels).join(images, key_pattern="dog.*")
    with pytest.raises(ValueError, match="does not match the key 'cat/0.png'"):  # its group takes no part
        LabelSet(labels).join(images, key_pattern=r"dog/(\d)|cat/\d")


def test_row_numbers_are_keys_of_images_without_paths():
    images = image_rows([3, 1, 4, 2], None)
    keys = [f"row:{row}" for row in range(4)]
    assert read_keys(images, "image").to_pylist() == keys
    assert row_keys(2, 4).to_pylist() == keys[2:]
    joined = LabelSet(label_rows([3, 1, 4, 2], keys=keys)).join(images)
    assert joined.label_maps.row_of is None
    assert_joined(joined, images)
    with_paths = image_rows([3, 1, 4, 2])  # --number_rows
    assert_joined(LabelSet(label_rows([3, 1, 4, 2], keys=keys)).join(with_paths), with_paths)


def test_row_numbers_need_equal_counts():
    labels = label_rows([0, 1, 2], keys=["row:0", "row:1", "row:2"])
    with pytest.raises(ValueError, match="knows its 3 images by their number only, but there are 2"):
        LabelSet(labels).join(image_rows([0, 1], None))


def test_row_numbers_of_changed_images_are_refused():
    labels = label_rows([0, 1, 2, 3], keys=[f"row:{row}" for row in range(4)])
    with pytest.raises(ValueError, match="2 of 4 images looked at are not those that were annotated, first row 1"):
        LabelSet(labels).join(image_rows([0, 2, 1, 3], None))


def test_changed_images_with_paths_are_a_warning(caplog):
    hashes = [content_hash(image_bytes(0)), 17, None]
    joined = LabelSet(label_rows([0, 1, 2], hashes=hashes)).join(image_rows([0, 1, 2]))
    assert len(joined.label_maps) == 3
    assert "1 of 3 image files looked at are not byte for byte those that were annotated (first row 1)" in caplog.text
    caplog.clear()
    LabelSet(label_rows([0, 1, 2])).join(image_rows([0, 1, 2]))
    assert not caplog.records


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 4, 1, 0, 2]])
def test_images_with_empty_labels_are_left_out(order, caplog):
    images = image_rows([0, 1, 2, 3, 4])
    joined = LabelSet(label_rows(order, is_empty=[number in (1, 3) for number in order])).join(images)
    assert joined.images.tolist() == [0, 2, 4]
    assert "2 images have an empty label and are left out: 'dog/1.png', 'cat/3.png'" in caplog.text
    assert_joined(joined, images)


PATHS = {
    "/data/train/cat/1.jpg": "cat/1.jpg",
    "1.jpg": "1.jpg",
    "/1.jpg": "1.jpg",
    "zip://train/cat/1.jpg::https://host/a/b.zip": "cat/1.jpg",
    "zip://1.jpg::/data/b.zip": "1.jpg",
    "C:\\data\\cat\\1.jpg": "cat/1.jpg",
    "hf://datasets/me/pets@main/train/kätzchen/1 (2).jpg": "kätzchen/1 (2).jpg",
}


@pytest.mark.parametrize("path", PATHS)
def test_keys_are_the_last_two_parts_of_a_path(path):
    assert path_keys(pa.array([path])).to_pylist() == [PATHS[path]]
    rows = datasets.Dataset.from_dict({"image": [path]})
    for column in (rows, rows.cast_column("image", datasets.Image())):
        assert read_keys(column, "image").to_pylist() == [PATHS[path]]


def test_image_without_path_among_others_is_named():
    images = datasets.concatenate_datasets([image_rows([0, 1]), image_rows([2], None)])
    with pytest.raises(ValueError, match="Row 2 has no path, though the first row has one"):
        LabelSet(label_rows([0, 1, 2])).join(images)


def test_label_set_without_keys_is_refused():
    with pytest.raises(ValueError, match="no column 'image_key'; it has"):
        LabelSet(label_rows([0, 1]).remove_columns("image_key")).join(image_rows([0, 1]))


def test_class_names_may_be_equal_synonyms_or_wordnet_ids():
    wordnet = ["n01440764", "n01443537"]
    for label_names, names in (
        (["tench", "goldfish"], ["tench", "goldfish"]),
        (["Tench", "gold-fish"], ["tench", "gold_fish"]),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["tench", "goldfish"]),
        (wordnet, ["tench", "goldfish"]),
        (["tench", "goldfish"], wordnet),
        (None, ["anything", "at all"]),
    ):
        check_class_names(label_names, names)


def test_other_class_names_are_named():
    for label_names, names, message in (
        (
            CLASSES,
            ["cat", "eel", "dog"],
            "1: 'dog' in the label set, 'eel' in the data; 2: 'eel' in the label set, 'dog'",
        ),
        (CLASSES, ["cat", "dog"], "3 classes, the data has 2, and they are not the same ones. Annotate"),
        (["n01440764", "n01443537"], ["goldfish", "tench"], "0: 'n01440764' in the label set, 'goldfish' in the data"),
    ):
        with pytest.raises(ValueError, match=message):
            check_class_names(list(label_names), names)


def image_folder(root: Path, numbers: list[int], classes=CLASSES, split: str = "train") -> Path:
    for number in numbers:
        folder = root / split / classes[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(image_bytes(number))
    return root


def label_folder(root: Path, numbers: list[int], class_names=CLASSES, **columns) -> Path:
    table = labels_table(numbers, class_names, **columns)
    return write_label_set(root, table, LabelSetLayout(tuple(class_names), K, (ROWS, COLUMNS)))


def training_samples(opened: OpenedData) -> TokenLabelDataset:
    return TokenLabelDataset(opened.train, lambda image, *label_map: {}, label_maps=opened.label_maps)


def test_held_out_and_first_rows_keep_image_and_map_together(tmp_path):
    """12 images, one without label: 3 are held out and 8 stay, of which 5 are kept."""
    images = image_folder(tmp_path / "pets", list(range(12)))
    order = np.random.default_rng(0).permutation(12).tolist()
    labels = label_folder(tmp_path / "labels", order, is_empty=[number == 7 for number in order])
    arguments = DataArguments(str(images), token_labels=str(labels), eval_fraction=0.25, max_train_samples=5)
    seen = set()
    for seed in (0, 1):
        opened = open_datasets(arguments, seed=seed)
        samples = training_samples(opened)
        samples.check_rows(3)
        told = numbers_and_classes(samples)
        assert told == [(number, number, number % 3, number % 3, number % 3) for number, *_ in told]
        assert (len(told), len(opened.evaluation)) == (5, 3)
        seen |= {number for number, *_ in told}
    assert 7 not in seen
    assert len(seen) > 5  # the seeds hold out different rows


def test_evaluation_split_needs_no_labels(tmp_path):
    images = image_folder(tmp_path / "pets", [5, 1, 3, 0, 2, 4])
    image_folder(images, [6, 7, 8], split="validation")
    labels = label_folder(tmp_path / "labels", [0, 1, 2, 3, 4, 5])
    opened = open_datasets(DataArguments(str(images), token_labels=str(labels)), seed=0)
    assert (len(opened.train), len(opened.evaluation), opened.eval_name) == (6, 3, "validation")
    assert sorted(number for number, *_ in numbers_and_classes(training_samples(opened))) == [0, 1, 2, 3, 4, 5]
    plain = open_datasets(DataArguments(str(images), token_labels=str(labels), use_token_labels=False), seed=0)
    assert plain.label_maps is None


def test_class_ids_get_the_names_of_the_label_set(tmp_path):
    images = image_rows([0, 1, 2, 3])
    images = images.cast_column("label", datasets.Value("int64"))
    images.to_parquet(tmp_path / "images.parquet")
    labels = label_folder(tmp_path / "labels", [3, 2, 1, 0])
    arguments = DataArguments(str(tmp_path / "images.parquet"), token_labels=str(labels), eval_fraction=0.25)
    opened = open_datasets(arguments, seed=0)
    assert opened.train.features["label"].names == opened.evaluation.features["label"].names == list(CLASSES)


def test_other_classes_of_the_images_are_refused(tmp_path):
    images = image_folder(tmp_path / "pets", [0, 1, 2], ("cat", "dog", "emu"))
    labels = label_folder(tmp_path / "labels", [0, 1, 2], keys=["cat/0.png", "dog/1.png", "emu/2.png"])
    with pytest.raises(ValueError, match="2: 'eel' in the label set, 'emu' in the data"):
        open_datasets(DataArguments(str(images), token_labels=str(labels)), seed=0)


def test_maps_of_other_classes_are_a_warning(tmp_path, caplog):
    """Keys match, but map `number` belongs to image `number - 2` and names the two classes that this is not."""
    images = image_folder(tmp_path / "pets", [0, 1, 2, 3])
    keys = [key_of(number) for number in (0, 1, 2, 3)]
    wrong = label_folder(tmp_path / "wrong", [1, 2, 3, 4], keys=keys, hashes=[None] * 4)
    right = label_folder(tmp_path / "right", [0, 1, 2, 3])
    for labels in (right, wrong):
        assert "label maps name the class" not in caplog.text
        open_datasets(DataArguments(str(images), token_labels=str(labels)), seed=0)
    assert (
        "0.0 % of 4 label maps have the human label as their first class, 0.0 % name it: most maps have another"
        in caplog.text
    )


def test_unfinished_label_set_is_refused(tmp_path):
    folder = label_folder(tmp_path / "labels", [0, 1, 2])
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="labels is not finished. Start the program that writes it again"):
        LabelSet.open(str(folder), "train")


def test_missing_label_set_and_split_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no label set at .*labels"):
        LabelSet.open(str(tmp_path / "labels"), "train")
    folder = label_folder(tmp_path / "labels", [0, 1, 2])
    with pytest.raises(ValueError, match=r"has no split 'trainval'; it has \['train'\]"):
        LabelSet.open(str(folder), "trainval")


@pytest.mark.parametrize("split", ["train", "trainval"])
def test_label_set_that_was_made_again_is_read_anew(split, tmp_path):
    layout = LabelSetLayout(CLASSES, K, (ROWS, COLUMNS))
    for parent, numbers in (("a", [0, 1, 2]), ("b", [3, 4, 5])):
        folder = write_label_set(tmp_path / parent / "labels", labels_table(numbers), layout, split=split)
        labels = LabelSet.open(str(folder), split)
        assert labels.rows["image_key"][:] == [key_of(number) for number in numbers]


def test_label_set_of_empty_labels_only_is_refused(tmp_path):
    images = image_folder(tmp_path / "pets", [0, 1, 2])
    labels = label_folder(tmp_path / "labels", [0, 1, 2], is_empty=[True] * 3)
    with pytest.raises(ValueError, match="no training rows|too few|empty"):
        open_datasets(DataArguments(str(images), token_labels=str(labels)), seed=0)


# An image of 100 x 50 pixels whose map of 4 x 6 cells covers the pixels 10 to 70 and 10 to 40. Cells are 10 x 7.5 pixels.
IMAGE_SIZE, MAP_BOX = (100, 50), (0.1, 0.2, 0.7, 0.8)
CELLS = torch.arange(24).view(4, 6)  # every cell has a class of its own
CROPS = {  # pixels left, top, right, bottom; rows and columns of the map; the same crop for the mirrored image
    "whole": ((10, 10, 70, 40), slice(0, 4), slice(0, 6)),
    "left": ((10, 10, 40, 40), slice(0, 4), slice(0, 3)),
    "right": ((40, 10, 70, 40), slice(0, 4), slice(3, 6)),
    "top": ((10, 10, 70, 25), slice(0, 2), slice(0, 6)),
    "bottom": ((10, 25, 70, 40), slice(2, 4), slice(0, 6)),
    "inner": ((20, 10, 40, 25), slice(0, 2), slice(1, 3)),
}


def train_crop(monkeypatch, pixels, mirrored: bool, map_box=MAP_BOX, size=IMAGE_SIZE) -> dict[str, torch.Tensor]:
    """A training sample of a given crop."""
    left, top, right, bottom = pixels
    params = (top, left, bottom - top, right - left)
    monkeypatch.setattr(
        "modeling_lvvit.token_labeling.augmentation.transforms.RandomResizedCropAndInterpolation.get_params",
        lambda *_: params,
    )
    plain = AugmentationConfig(horizontal_flip=float(mirrored), rand_augment="none", random_erasing=0.0)
    ids = CELLS.numpy()[None].astype(np.int16)
    image = Image.new("RGB", size)
    return TrainTransform((16, 24), [0.5] * 3, [0.5] * 3, plain)(image, ids, ids.astype(np.float16) + 30, map_box)


def token_classes(sample: dict[str, torch.Tensor], grid_size: tuple[int, int]) -> torch.Tensor:
    palette, index = build_palette(sample["token_label_index"][None])
    scores, box = sample["token_label_scores"][None], sample["crop_box"][None]
    _, tokens = crop_label_maps(palette, index, scores, CropGeometry(box), grid_size, 24)
    return tokens.top_class().view(grid_size)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("crop", CROPS)
def test_crops_get_the_cells_of_their_region(crop, mirrored, monkeypatch):
    (left, top, right, bottom), rows, columns = CROPS[crop]
    expected = CELLS[rows, columns]
    if mirrored:  # the same things, seen in the mirror
        left, right, expected = 100 - right, 100 - left, expected.flip(1)
    sample = train_crop(monkeypatch, (left, top, right, bottom), mirrored)
    assert torch.equal(token_classes(sample, tuple(expected.shape)), expected)


@pytest.mark.parametrize("mirrored", [False, True])
def test_maps_that_reach_beyond_the_image_are_cut(mirrored, monkeypatch):
    """Images that the annotator saw with borders: the outer columns, or rows, of the map show the border."""
    flip = [1] if mirrored else []
    sample = train_crop(monkeypatch, (0, 0, 100, 50), mirrored, (-0.25, 0, 1.25, 1))
    assert torch.equal(token_classes(sample, (4, 4)), CELLS[:, 1:5].flip(flip))
    sample = train_crop(monkeypatch, (0, 0, 100, 50), mirrored, (0, -0.5, 1, 1.5))
    assert torch.equal(token_classes(sample, (2, 6)), CELLS[1:3].flip(flip))
    sample = train_crop(monkeypatch, (0, 0, 100, 50), mirrored, (-0.5, 0, 1, 1))  # a border on the left only
    assert torch.equal(token_classes(sample, (4, 4)), CELLS[:, 2:].flip(flip))


def test_places_within_a_region_by_hand(monkeypatch):
    sample = train_crop(monkeypatch, (10, 20, 20, 40), False, (0.1, 0.2, 0.7, 1.2), size=(100, 50))
    assert sample["crop_box"].tolist() == pytest.approx([0.0, 0.2, 1 / 6, 0.6])


def test_center_square_of_a_wide_image_is_where_the_map_lies(monkeypatch):
    maps = LabelMaps(CELLS.numpy()[None, None], np.full((1, 1, 4, 6), 30, np.float16), np.full((1, 4), np.nan))
    layout = layout_of(maps, 24)
    content = encode_image(np.zeros((40, 160, 3), np.uint8), "PNG")
    images = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None}], "label": [1]})
    images = images.cast_column("image", datasets.Image())
    labels = datasets.Dataset(table_of(maps, layout, keys=["row:0"]))
    joined = LabelSet(labels).join(images)
    plain = AugmentationConfig(horizontal_flip=0.0, rand_augment="none", random_erasing=0.0)
    transform = TrainTransform((16, 16), [0.5] * 3, [0.5] * 3, plain)
    monkeypatch.setattr(
        "modeling_lvvit.token_labeling.augmentation.transforms.RandomResizedCropAndInterpolation.get_params",
        lambda *_: (0, 60, 40, 20),
    )
    sample = TokenLabelDataset(images, transform, label_maps=joined.label_maps)[0]
    assert sample["crop_box"].tolist() == [0, 0, 0.5, 1]
    assert torch.equal(token_classes(sample, (4, 3)), CELLS[:, :3])
    whole = TokenLabelDataset(images, transform, label_maps=joined.label_maps.without_regions())[0]
    assert whole["crop_box"].tolist() == [0.375, 0, 0.5, 1]


def test_class_token_of_a_crop_partly_outside_learns_the_covered_part():
    ids = (torch.arange(6) // 3).expand(1, 1, 4, 6).contiguous()  # left half class 0, right half class 1
    scores = 3 + torch.arange(24.0).view(1, 1, 4, 6)
    palette, index = build_palette(ids)
    targets = []
    for box in ([-1.0, -0.5, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]):
        cls, tokens = crop_label_maps(palette, index, scores, CropGeometry(torch.tensor([box])), (2, 3), 5)
        targets.append((cls.to_dense()[0], tokens.top_class()[0]))
    assert torch.equal(targets[0][0], targets[1][0])
    mean = torch.tensor([scores[0, 0, :2, :3].mean(), 0, 0, 0, 0])
    torch.testing.assert_close(targets[0][0], mean.softmax(0))
    assert targets[0][1].tolist() == [0] * 6  # tokens outside have the labels of the nearest cell


def test_tokens_outside_have_the_scores_of_the_nearest_cell():
    """Token columns at -1/2, -1/6, 1/6 and 1/2 of a map of three columns: its first cell three times, then the second."""
    ids, scores = torch.tensor([0, 1, 2]).view(1, 1, 1, 3), torch.tensor([2.0, 4.0, 8.0]).view(1, 1, 1, 3)
    box = torch.tensor([[-2 / 3, 0.0, 2 / 3, 1.0]])
    _, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(box), (1, 4), 5)
    first, second = torch.tensor([2.0, 0, 0, 0, 0]).softmax(0), torch.tensor([0, 4.0, 0, 0, 0]).softmax(0)
    torch.testing.assert_close(tokens.to_dense()[0], torch.stack([first, first, first, second]))


def test_covered_tokens_by_hand():
    boxes = torch.tensor([[-0.5, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.5], [0.2, 0.2, 0.9, 0.9], [2.0, 0.0, 3.0, 1.0]])
    expected = [
        [0, 0, 1, 1, 0, 0, 1, 1],  # columns at -0.375, -0.125, 0.125, 0.375
        [1, 1, 1, 1, 0, 0, 0, 0],  # rows at 0.75, 1.25
        [1] * 8,
        [0] * 8,
    ]
    covered = CropGeometry(boxes).covered_tokens((2, 4))
    assert covered.dtype == torch.bool
    assert covered.int().tolist() == expected


def test_crops_inside_the_map_are_those_of_roi_align():
    generator = torch.Generator().manual_seed(2)
    maps = random_maps(12, num_classes=9, shape=(3, 7, 10))
    ids, scores = torch.from_numpy(maps.ids), torch.from_numpy(maps.scores)
    corners = torch.rand(12, 2, 2, generator=generator) * 0.4 + torch.tensor([[0.0], [0.6]])
    boxes = torch.stack((corners[:, 0, 0], corners[:, 0, 1], corners[:, 1, 0], corners[:, 1, 1]), dim=1)
    boxes[:3] = torch.tensor([[0.0, 0, 1, 1], [0, 0.5, 0.5, 1], [0.3, 0, 1, 0.4]])  # at the borders
    regions = torch.cat((torch.arange(12.0).unsqueeze(1), boxes * torch.tensor([10, 7, 10, 7]) - 0.5), dim=1)
    dense = decode(ids, scores, 9)
    cls, tokens = crop_label_maps(*build_palette(ids), scores, CropGeometry(boxes), (3, 4), 9)
    for targets, grid_size in ((cls, (1, 1)), (tokens, (3, 4))):
        expected = roi_align(dense, regions, grid_size).flatten(2).mT.softmax(-1)
        torch.testing.assert_close(targets.to_dense().view(expected.shape), expected, rtol=1e-5, atol=2e-6)
    assert CropGeometry(boxes).covered_tokens((3, 4)).all()


def test_loss_is_the_mean_of_the_counted_tokens():
    """Targets class 0 of two; logits (0, log 3) cost log 4, logits (0, 0) cost log 2."""
    targets = SparseTargets(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 3, 1), torch.zeros(2, 3), 2)
    logits = torch.zeros(2, 3, 2)
    logits[0, 1, 1] = logits[1, 2, 1] = math.log(3)
    counted = torch.tensor([[True, True, False], [False, False, True]])
    losses = token_labeling_loss(logits, torch.ones(2), targets, 1.0, 0.5, counted)
    expected = (math.log(2) + 2 * math.log(4)) / 3
    assert losses["token_loss"].item() == pytest.approx(expected)
    assert losses["loss"].item() == pytest.approx(1 + 0.5 * expected)
    whole = token_labeling_loss(logits, torch.ones(2), targets)["token_loss"]
    assert whole.item() == pytest.approx(soft_cross_entropy(logits, targets).mean().item())
    everything = token_labeling_loss(logits, torch.ones(2), targets, counted_tokens=torch.ones(2, 3, dtype=torch.bool))
    assert everything["token_loss"].item() == pytest.approx(whole.item())


def test_loss_without_counted_tokens_is_zero():
    targets = SparseTargets(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 3, 1), torch.zeros(2, 3), 2)
    logits = torch.randn(2, 3, 2, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    losses = token_labeling_loss(logits, torch.ones(2), targets, counted_tokens=nothing)
    losses["loss"].backward()
    assert losses["token_loss"].item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
