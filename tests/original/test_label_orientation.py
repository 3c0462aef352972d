"""The authors' label files show images as their files store them; training turns images, and their maps with them."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.open_data import open_datasets
from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.original import label_import
from modeling_lvvit.token_labeling.augmentation.transforms import AugmentationConfig, TrainTransform
from modeling_lvvit.token_labeling.dataset import TokenLabelDataset
from modeling_lvvit.token_labeling.stream import TokenLabelStream
from modeling_lvvit.visualization import check_labels


NAMES = [f"{'cat' if orientation < 5 else 'dog'}/{orientation}" for orientation in range(1, 9)]
CLASSES = ["cat", "dog", *"abcdef"]  # class k has the color of the bits of k
BLOCK = 10  # pixels of a token, a cell, and a block of one color


@pytest.fixture(autouse=True)
def own_cache_and_threads(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(label_import, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))


def colors_of(pixels: np.ndarray) -> np.ndarray:
    """Class of each block of an image `[height, width, 3]`."""
    centers = pixels[BLOCK // 2 :: BLOCK, BLOCK // 2 :: BLOCK] > 127
    return centers @ np.array([1, 2, 4])


def write_data(folder: Path, cells: tuple[int, int] = (4, 4)) -> Path:
    """Images of 4 x 6 blocks, one for each Exif orientation, and a label set made of the authors' files of them."""
    generator = np.random.default_rng(0)
    for orientation, name in enumerate(NAMES, start=1):
        blocks = generator.integers(0, 8, (4, 6))
        pixels = np.uint8((blocks[..., None] >> np.arange(3) & 1) * 255).repeat(BLOCK, 0).repeat(BLOCK, 1)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for path in (folder / "images" / "train" / f"{name}.JPEG", folder / "maps" / f"{name}.pt"):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / "train" / f"{name}.JPEG", "PNG", exif=exif)
        with Image.open(folder / "images" / "train" / f"{name}.JPEG") as stored:  # as the authors do, it is not turned
            ids = colors_of(np.asarray(stored))[:, 1:5]
        ids = ids[: cells[0], : cells[1]]
        torch.save(torch.from_numpy(np.stack([np.full(ids.shape, 9), ids])[:, None].astype(np.float16)), path)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    options = ["--class_names", str(folder / "classes.txt"), "--num_workers", "1"]
    label_import.main([str(folder / "maps"), "--output_dir", str(folder / "labels"), *options])
    return folder


def rows_of(folder: Path) -> datasets.Dataset:
    """Rows of all images, with the classes of the label set."""
    paths = [str(folder / "images" / "train" / f"{name}.JPEG") for name in NAMES]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    return datasets.Dataset.from_dict({"image": paths, "label": [0] * 4 + [1] * 4}, features=features)


def plain(image: Image.Image, *label_map) -> dict:
    """The whole image, pixel for pixel."""
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (image.width / image.height,) * 2}
    config = AugmentationConfig(horizontal_flip=0.0, rand_augment="none", random_erasing=0.0, **whole)
    return TrainTransform(image.size[::-1], [0.5] * 3, [0.5] * 3, config)(image, *label_map)


def assert_tokens_show_their_classes(sample: dict) -> None:
    """The class of the color of every token that the map covers is its most probable one."""
    expected = colors_of(sample["pixel_values"].permute(1, 2, 0).numpy().astype(float))
    geometry = CropGeometry(sample["crop_box"][None])
    palette, index, scores = (sample[f"token_label_{name}"][None] for name in ("palette", "index", "scores"))
    _, tokens = crop_label_maps(palette.long(), index, scores, geometry, expected.shape, len(CLASSES))
    covered = geometry.covered_tokens(expected.shape)[0].numpy()
    assert covered.sum() == 16
    assert (tokens.top_class()[0].numpy() == expected.flatten())[covered].all()


def test_maps_turn_with_the_image_in_all_eight_orientations(tmp_path, caplog):
    write_data(tmp_path)
    labels = LabelSet.open(str(tmp_path / "labels"), "train")
    rows = rows_of(tmp_path)
    samples = TokenLabelDataset(rows, plain, label_maps=labels.join(rows).label_maps)
    with caplog.at_level(logging.WARNING):
        samples.check_rows(len(CLASSES))
    assert "7 of 8 label maps of the train data show images as their files store them; they are turned" in caplog.text
    for sample in samples.__getitems__(list(range(8))):
        assert_tokens_show_their_classes(sample)
    assert {samples[row]["pixel_values"].shape[1] for row in (0, 3, 4, 7)} == {40, 60}


def test_maps_of_whole_images_and_those_of_a_stream_turn_too(tmp_path):
    write_data(tmp_path)
    labels = LabelSet.open(str(tmp_path / "labels"), "train")
    rows = rows_of(tmp_path)
    whole = labels.join(rows).label_maps.without_regions()
    inner = [
        np.asarray(TokenLabelDataset(rows, plain, label_maps=maps).label_map(row)[0])
        for row in range(8)
        for maps in (whole, labels.join(rows).label_maps)
    ]
    assert all(np.array_equal(*pair) for pair in zip(inner[::2], inner[1::2]))
    stream = iter(TokenLabelStream(rows.to_iterable_dataset(), plain, "image", "label", labels))
    for _ in range(8):
        assert_tokens_show_their_classes(next(stream))


def test_contact_sheet_draws_turned_maps(tmp_path, monkeypatch):
    write_data(tmp_path)
    args = check_labels.CheckArguments(
        str(tmp_path / "labels"), dataset_name="unused", contact_sheet=str(tmp_path / "s.png")
    )
    labels, rows = LabelSet.open(str(tmp_path / "labels"), "train"), rows_of(tmp_path)
    samples = TokenLabelDataset(rows, plain, label_maps=labels.join(rows).label_maps)
    drawn = []
    monkeypatch.setattr(check_labels, "save_contact_sheet", lambda path, *shown: drawn.append(shown))
    check_labels.draw(args, samples, samples.label_maps, CLASSES)
    images, maps, *_ = drawn[0]
    for (_, square), (ids, _) in zip(images, maps):
        assert np.array_equal(colors_of(np.asarray(square)), ids[0])


def test_maps_that_are_not_square_cannot_lie_on_their_side(tmp_path):
    write_data(tmp_path, cells=(3, 4))
    labels, rows = LabelSet.open(str(tmp_path / "labels"), "train"), rows_of(tmp_path)
    samples = TokenLabelDataset(rows, plain, label_maps=labels.join(rows).label_maps)
    with pytest.raises(ValueError, match=r"row 4 .*/dog/5.JPEG\): its map of 3 x 4 cells cannot be turned"):
        samples.check_rows(len(CLASSES))


def test_maps_of_the_upright_image_stay(tmp_path):
    """Those that annotate.py wrote, with a region or of the whole image, were made from turned images."""
    write_data(tmp_path)
    rows = rows_of(tmp_path)
    opened = open_datasets(DataArguments(str(tmp_path / "images"), eval_fraction=0.5), seed=0)
    assert opened.label_maps is None
    boxes = [[0.0, 0.0, 1.0, 1.0]] * 8
    ids = np.arange(16).reshape(1, 4, 4) % 8
    rows = rows.add_column("token_label_ids", [ids.tolist()] * 8).add_column("map_box", boxes)
    rows = rows.add_column("token_label_scores", [np.ones(ids.shape).tolist()] * 8)
    samples = TokenLabelDataset(rows, plain, ids_column="token_label_ids", scores_column="token_label_scores")
    assert all(np.array_equal(samples.label_map(row)[0], ids) for row in range(8))
