"""Masks, their check before training, and the joint augmentation of images and masks."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit.data.images import SampleError
from modeling_lvvit.data.masks import MaskEncoding, read_mask
from modeling_lvvit.segmentation.arguments import SegmentationDataArguments
from modeling_lvvit.segmentation.data import open_segmentation_data
from modeling_lvvit.segmentation.dataset import ClassCounts, SegmentationDataset
from modeling_lvvit.segmentation.trainer import collate_crops, finish_crops
from modeling_lvvit.segmentation.transforms import SegmentationAugmentation, evaluation_size
from support.segmentation_rows import (
    COLORS,
    NAMES,
    PLAIN,
    crops_of,
    mask_bytes,
    masked_rows,
    rows_of,
    samples_of,
    scene,
)


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        (MaskEncoding(3), {0: 0, 2: 2, 3: -1, 255: 255}),
        (MaskEncoding(3, reduce_labels=True), {0: 255, 1: 0, 3: 2, 4: -1, 255: 255}),
        (MaskEncoding(2, values=(0, 255)), {0: 0, 255: 1, 7: -1}),  # binary masks: 255 is a class here
        (MaskEncoding(3, ignore_index=9), {9: 255, 2: 2, 255: -1}),
        (MaskEncoding(300, ignore_index=400), {255: 255, 400: -100}),
    ],
)
def test_mask_values_stand_for_classes(encoding, expected):
    table = encoding.table()
    assert {value: int(table[value]) for value in expected} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 3, "ignore_index": 1}, "value of one of the 3 classes"),
        ({"num_labels": 300}, "choose another one, for example 65535"),
        ({"num_labels": 3, "ignore_index": 3, "reduce_labels": True}, "value of one of the 3 classes"),
        ({"num_labels": 2, "ignore_index": 9, "values": (0, 9)}, "value of one of the 2 classes"),
        ({"num_labels": 3, "values": (0, 1)}, "must be 3 different values"),
        ({"num_labels": 2, "values": (7, 7)}, "must be 2 different values"),
        ({"num_labels": 2, "values": (0, 1), "reduce_labels": True}, "not both"),
    ],
)
def test_impossible_codings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskEncoding(**settings)


def encoded(image: Image.Image, file_format: str = "PNG") -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return {"bytes": buffer.getvalue(), "path": None}


def test_masks_are_read_as_ids_whatever_their_kind_of_image():
    ids = np.array([[0, 1, 2], [3, 2, 1]], dtype=np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    assert palette.mode == "P"
    for image in (Image.fromarray(ids), palette, Image.fromarray(np.dstack([ids] * 3))):
        assert read_mask(encoded(image)).tolist() == ids.tolist()
    assert read_mask(encoded(Image.fromarray(ids > 1))).tolist() == (ids > 1).astype(int).tolist()
    wide = np.array([[0, 256], [1000, 65535]], dtype=np.uint16)
    assert read_mask(encoded(Image.fromarray(wide))).tolist() == wide.tolist()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK"])
def test_color_masks_are_refused(mode):
    image = Image.new(mode, (3, 2), tuple(range(10, 10 + len(Image.new(mode, (1, 1)).getbands()))))
    file_format = "TIFF" if mode == "CMYK" else "PNG"
    with pytest.raises(ValueError, match=f"mode {mode}; expected one channel with class ids.*--colors"):
        read_mask(encoded(image, file_format))


def broken_rows() -> datasets.Dataset:
    images, masks = zip(*(scene(30, 44, np.random.default_rng(seed)) for seed in range(7)))
    files = [mask_bytes(mask) for mask in masks]
    files[1] = mask_bytes(np.zeros((44, 30), dtype=np.uint8))
    files[2] = mask_bytes(np.full((30, 44), 4, dtype=np.uint8))
    files[3] = mask_bytes(images[3])
    files[4] = None
    files[5] = files[5][:40]
    return rows_of(list(images), files)


def test_every_unusable_mask_is_named_before_training():
    with pytest.raises(ValueError) as caught:
        samples_of(broken_rows()).check_rows()
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [f"row {row} ({row}.png)" for row in range(1, 6)]
    assert "1_mask.png is 30 x 44 pixels (width x height), its image 44 x 30" in lines[0]
    assert "has the values 4; expected 0, 1, 2, 3 for 4 classes, and 255, which is ignored" in lines[1]
    assert "mode RGB" in lines[2] and "no mask" in lines[3] and "cannot be used" in lines[4]


def test_unusable_masks_are_named_in_training_too():
    samples = samples_of(broken_rows())
    for row in (1, 2, 3, 4, 5):
        with pytest.raises(SampleError, match=f"Row {row} of the training data"):
            samples[row]
    assert samples[0]["labels"].shape == (30, 44)


def test_masks_without_any_class_are_refused():
    rows = rows_of([np.zeros((8, 8, 3), np.uint8)], [mask_bytes(np.full((8, 8), 255, np.uint8))])
    with pytest.raises(ValueError, match="No pixel of the training masks has a class"):
        samples_of(rows).check_rows()


def test_images_are_checked_in_their_upright_size():
    """A camera's image of 6 x 4 pixels that lies on its side, and a mask of 4 x 6."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(buffer, format="JPEG", exif=exif)
    kind = datasets.Image().pa_type
    table = rows_of([np.zeros((6, 4, 3), np.uint8)], [mask_bytes(np.zeros((6, 4), np.uint8))]).data.table
    images = [{"bytes": buffer.getvalue(), "path": "camera.jpg"}]
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    columns = [datasets.table.pa.array(images, kind), table["annotation"]]
    rows = datasets.Dataset(datasets.table.pa.Table.from_arrays(columns, schema=features.arrow_schema))
    samples = samples_of(rows)
    samples.check_rows()
    assert samples[0]["pixel_values"].shape == (3, 6, 4)


def test_class_weights_make_up_for_frequencies():
    """Class 0: 60 of 100 pixels, class 1: 30 of 100; class 2: 10 of the 50 of the only mask it is in; class 3 nowhere."""
    counts = ClassCounts(np.zeros(4, dtype=np.int64))
    counts.add(np.array([25, 15, 10, 0]), 3)
    counts.add(np.array([35, 15, 0, 0]), 2)
    assert counts.pixels.tolist() == [60, 30, 10, 0] and counts.ignored == 5
    assert counts.median_frequency_weights() == pytest.approx([0.3 / 0.6, 1.0, 0.3 / 0.2, 1.0])


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((600, 800), (512, 2048), (512, 683)),
        ((100, 1000), (512, 2048), (205, 2048)),
        ((37, 41), (None, None), (37, 41)),
        ((1, 4000), (8, None), (8, 32000)),
    ],
)
def test_evaluation_size(size, settings, expected):
    assert evaluation_size(size, *settings) == expected


def colors_of(sample: dict[str, torch.Tensor]) -> np.ndarray:
    """The class whose color is nearest, 4 for black."""
    pixels = sample["pixel_values"].permute(1, 2, 0).numpy().astype(float)
    return ((pixels[..., None, :] - COLORS.astype(float)) ** 2).sum(-1).argmin(-1)


def test_image_and_mask_stay_together():
    """Scale, crop and mirror image: off the borders between classes every pixel has the color of its label."""
    augmentation = SegmentationAugmentation((0.5, 2.0), 1.0, 0.5, 0.0)
    samples = crops_of(masked_rows(), augmentation)
    flips = set()
    for epoch in range(4):
        samples.start_epoch(0, epoch)
        for sample in samples.__getitems__(list(range(12))):
            labels = sample["labels"].numpy()
            shown = np.where(labels == 255, 4, labels)
            is_inside = np.ones(labels.shape, dtype=bool)
            for shift in ((0, 2), (0, -2), (2, 0), (-2, 0)):
                is_inside &= np.roll(shown, shift, axis=(0, 1)) == shown
            is_inside[:2], is_inside[-2:], is_inside[:, :2], is_inside[:, -2:] = False, False, False, False
            is_inside &= shown != 4  # the border around small images
            assert (colors_of(sample) == shown)[is_inside].mean() > 0.999
            flips.add(tuple(labels.ravel()[:8]))
    assert len(flips) > 5


def test_small_images_get_a_border_that_does_not_count():
    """30 x 44 pixels at scale 0.5 in a crop of 32 x 48: 15 rows and 22 columns."""
    sample = crops_of(masked_rows(1), SegmentationAugmentation((0.5, 0.5), 1.0, 0.0, 0.0))[0]
    assert sample["pixel_values"].shape == (3, 32, 48) and sample["labels"].dtype == torch.int32
    assert (sample["labels"][15:] == 255).all() and (sample["labels"][:, 22:] == 255).all()
    pixel_values = finish_crops(collate_crops([sample]))["pixel_values"][0]
    assert (pixel_values[:, 15:] == 0).all() and (pixel_values[:, :, 22:] == 0).all()
    assert torch.equal(pixel_values[:, :15, :22], sample["normalization"](sample["pixel_values"])[:, :15, :22])
    assert (sample["labels"][:15, :22] != 255).any()


def test_a_crop_of_the_whole_image_is_the_image():
    rows = masked_rows(1, sizes=((32, 48),))
    crop, whole = crops_of(rows, PLAIN)[0], samples_of(rows)[0]
    assert torch.equal(crop["pixel_values"], whole["pixel_values"])
    assert torch.equal(crop["labels"], whole["labels"])


def test_crops_of_a_single_class_are_drawn_anew():
    """Class 1 fills the right tenth of a long image: a plain crop mostly misses it."""
    mask = np.zeros((32, 480), dtype=np.uint8)
    mask[:, 432:] = 1
    rows = rows_of([COLORS[mask]], [mask_bytes(mask)])

    def share_with_both(max_class_share: float) -> float:
        samples = crops_of(rows, SegmentationAugmentation((1.0, 1.0), max_class_share, 0.0, 0.0))
        found = []
        for epoch in range(60):
            samples.start_epoch(0, epoch)
            found.append(len(samples[0]["labels"].unique()) > 1)
        return float(np.mean(found))

    assert share_with_both(1.0) < 0.25
    assert share_with_both(0.75) > 0.35


def test_samples_hang_on_seed_epoch_and_row_alone():
    samples = crops_of(masked_rows())

    def drawn(seed: int, epoch: int, rows: list[int]) -> torch.Tensor:
        samples.start_epoch(seed, epoch)
        return torch.stack([sample["pixel_values"] for sample in samples.__getitems__(rows)])

    torch.manual_seed(1)
    first = drawn(0, 2, [3, 7])
    torch.manual_seed(2)
    assert torch.equal(drawn(0, 2, [7, 5, 3])[[2, 0]], first)
    assert not torch.equal(drawn(0, 3, [3, 7]), first) and not torch.equal(drawn(1, 2, [3, 7]), first)


def test_color_changes_touch_the_image_only():
    rows = masked_rows(1, sizes=((32, 48),))
    changed = crops_of(rows, SegmentationAugmentation((1.0, 1.0), 1.0, 0.0, 1.0))[0]
    plain = crops_of(rows, PLAIN)[0]
    assert torch.equal(changed["labels"], plain["labels"])
    assert (changed["pixel_values"].int() - plain["pixel_values"]).abs().max() > 2


@pytest.mark.parametrize(
    "settings", [{"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"photometric": 1.5}, {"max_class_share": -0.1}]
)
def test_impossible_strengths_are_refused(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        SegmentationAugmentation(**settings)


def opened(folder, **options):
    return open_segmentation_data(SegmentationDataArguments(str(folder), **options), seed=0)


@pytest.fixture
def stored(tmp_path):
    """12 training and 3 test rows in Parquet files, without class names."""
    masked_rows(12).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    masked_rows(3, seed=1).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    return tmp_path


def test_class_names_are_found_beside_the_data(stored):
    (stored / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    found = opened(stored)
    assert found.class_names == NAMES and found.mask_column == "annotation"
    assert (len(found.train), len(found.evaluation), found.eval_name) == (12, 3, "test")


def test_given_class_names_hold_over_those_beside_the_data(stored):
    (stored / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    (stored / "names.txt").write_text("a\nb\n\nc\nd\n")
    assert opened(stored, class_names=[str(stored / "names.txt")]).class_names == ["a", "b", "c", "d"]
    assert opened(stored, class_names=["e", "f", "g", "h"]).class_names == ["e", "f", "g", "h"]


def test_classes_without_names_are_counted(stored):
    found = opened(stored)
    assert found.class_names == ["0", "1", "2", "3"] and found.encoding == MaskEncoding(4)
    assert opened(stored, reduce_labels=True).class_names == ["0", "1", "2"]
    assert opened(stored, mask_values=[3, 2, 1, 0]).encoding.values == (3, 2, 1, 0)


def test_binary_masks_of_0_and_255_get_an_explanation(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    rows_of([COLORS[mask % 4]] * 3, [mask_bytes(mask)] * 3).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"have the values \[0\] besides 255.*`mask_values`.*0 255"):
        opened(tmp_path / "train.parquet")
    found = opened(tmp_path / "train.parquet", mask_values=[0, 255], eval_fraction=0.3)
    assert found.class_names == ["0", "1"] and (len(found.train), len(found.evaluation)) == (2, 1)
    assert samples_of(found.train, encoding=found.encoding).check_rows().pixels.tolist() == [64, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_column_name": "masks"}, "no column 'masks' of images; it has image .Image., annotation .Image."),
        ({"image_column_name": "photo"}, "Name it with `image_column`"),
        ({"test_split": "testing"}, "no split 'testing'"),
        ({"class_names": ["one"]}, "two or more different names"),
        ({"class_names": ["nowhere.txt"]}, "no file of class names nowhere.txt"),
        ({"max_eval_samples": 0}, "no evaluation rows"),
    ],
)
def test_unfit_data_is_refused(stored, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(stored, **options)


def test_trained_models_are_evaluated_on_the_split_there_is(stored, tmp_path_factory):
    def split_of(folder, **options) -> str:
        return open_segmentation_data(
            SegmentationDataArguments(str(folder), **options), 0, NAMES, evaluate_only=True
        ).eval_name

    assert split_of(stored) == "test" and split_of(stored, eval_split="train") == "train"
    masked_rows(2).to_parquet(tmp_path_factory.mktemp("one") / "street.parquet")
    assert split_of(tmp_path_factory.getbasetemp() / "one0" / "street.parquet") == "train"
    with pytest.raises(ValueError, match="no split dev; it has .*`eval_split`"):
        split_of(stored, eval_split="dev")


def test_image_folders_name_masks_in_their_metadata(tmp_path):
    lines = ["file_name,mask_file_name"]
    for row in range(3):
        image, mask = scene(30, 44, np.random.default_rng(row))
        Image.fromarray(image).save(tmp_path / f"{row}.png")
        Image.fromarray(mask).save(tmp_path / f"{row}_mask.png")
        lines.append(f"{row}.png,{row}_mask.png")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    found = opened(tmp_path, eval_fraction=0.3)
    assert (found.mask_column, len(found.train), len(found.evaluation)) == ("mask", 2, 1)
    assert found.class_names == ["0", "1", "2", "3"]


def test_columns_of_other_kinds_are_no_masks(tmp_path):
    masked_rows(4).rename_column("annotation", "label").to_parquet(tmp_path / "train.parquet")
    assert opened(tmp_path / "train.parquet").mask_column == "label"
    datasets.Dataset.from_dict({"image": ["a", "b"], "label": [1, 0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="no column of masks that is known by its name.*lvvit masks"):
        opened(tmp_path / "train.parquet")


def test_columns_of_paths_are_masks_when_they_are_named(stored, tmp_path):
    pixels, mask = scene(30, 44, np.random.default_rng(0))
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    Image.fromarray(pixels).save(paths[0])
    Image.fromarray(mask).save(paths[1])
    for kind in ("string", "large_string"):
        features = datasets.Features({"image": datasets.Value(kind), "path": datasets.Value(kind)})
        rows = datasets.Dataset.from_dict({"image": [paths[0]] * 2, "path": [paths[1]] * 2}, features=features)
        rows.to_parquet(tmp_path / "train.parquet")
        found = opened(tmp_path / "train.parquet", mask_column_name="path")
        samples = SegmentationDataset(found.train, lambda image, ids: {"ids": ids}, found.encoding, "image", "path")
        samples.check_rows()
        assert samples[0]["ids"].tolist() == mask.tolist()


def test_a_single_class_is_refused_wherever_it_is_named(stored):
    (stored / "id2label.json").write_text('{"0": "road"}')
    with pytest.raises(ValueError, match="two or more different names"):
        opened(stored)


@pytest.mark.parametrize("content", ['{"1": "a"}', "[1, 2]", "{", '"a"'])
def test_damaged_files_of_class_names_are_named(stored, content):
    (stored / "id2label.json").write_text(content)
    with pytest.raises(ValueError, match="id2label.json holds no class names"):
        opened(stored)
