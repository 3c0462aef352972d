"""Masks as people have them: classes that are ignored, values that are no classes, files that Exif turns."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.data.masks import MaskEncoding
from modeling_lvvit.segmentation import train as program
from modeling_lvvit.segmentation.arguments import SegmentationDataArguments
from modeling_lvvit.segmentation.data import check_samples, open_segmentation_data
from modeling_lvvit.segmentation.metrics import SegmentationScores
from modeling_lvvit.segmentation.report import headline
from support.programs import TINY
from support.segmentation_rows import rows_of, samples_of


TWO = ["background", "thing"]
BINARY = np.zeros((40, 48), dtype=np.uint8)
BINARY[:, 12:24] = 1  # a quarter
LYING = 6  # Exif orientation of a camera held upright


def encoded(values: np.ndarray | Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer, image = io.BytesIO(), values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def turned(orientation: int = LYING) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def rows_with(masks: list[bytes], images: list[bytes] | None = None):
    height, width = np.asarray(Image.open(io.BytesIO(masks[0]))).shape[:2]
    return rows_of(images or [np.zeros((height, width, 3), np.uint8)] * len(masks), masks)


def samples_with(masks: list[bytes], encoding: MaskEncoding, images: list[bytes] | None = None):
    return samples_of(rows_with(masks, images), encoding=encoding)


def stored(folder, masks: list[bytes], evaluation: list[bytes] | None = None):
    rows_with(masks).to_parquet(folder / "train.parquet")
    rows_with(evaluation or masks).to_parquet(folder / "validation.parquet")
    return folder


def palette_mask(ids: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.fromarray(ids)
    image.putpalette(colors)
    return image


@pytest.mark.parametrize(
    "mask",
    [
        encoded(255 * BINARY),
        encoded(Image.fromarray(255 * BINARY).convert("RGB")),
        encoded(palette_mask(255 * BINARY, [0, 0, 0] * 255 + [255, 0, 0])),
    ],
    ids=["L", "RGB", "palette"],
)
def test_masks_of_which_one_class_is_left_are_refused(mask):
    message = (
        r"of the class 'background'. 25 % of the pixels of the training masks are ignored \(`ignore_index` 255\). "
        r"If 255 is a class, give `mask_values` 0 255"
    )
    with pytest.raises(ValueError, match=message):
        check_samples({"training": samples_with([mask] * 2, MaskEncoding(2))}, TWO)
    counts = check_samples({"training": samples_with([mask] * 2, MaskEncoding(2, values=(0, 255)))}, TWO)
    assert counts.pixels.tolist() == [2 * 1440, 2 * 480] and counts.ignored == 0


def test_zero_that_is_ignored_though_it_is_a_class_is_named():
    with pytest.raises(ValueError, match="75 % .* ignored: 0 is no class with `reduce_labels`. .* leave that out"):
        samples = samples_with([encoded(BINARY)], MaskEncoding(2, reduce_labels=True))
        check_samples({"training": samples}, TWO)
    with pytest.raises(ValueError, match="--ignore_index 0 is the value of one .* give --reduce_labels true"):
        MaskEncoding(2, ignore_index=0)


def test_masks_without_ignored_pixels_may_lack_classes_too():
    with pytest.raises(ValueError, match="class 'background'. None is ignored."):
        check_samples({"training": samples_with([encoded(0 * BINARY)], MaskEncoding(2))}, TWO)


def test_evaluation_masks_of_other_values_are_named(caplog):
    """Training has 0 and 1, evaluation 0 and 255."""
    samples = {"training": samples_with([encoded(BINARY)], MaskEncoding(2))}
    samples["evaluation"] = samples_with([encoded(255 * BINARY)], MaskEncoding(2))
    check_samples(samples, TWO)
    assert "All pixels of the evaluation masks that count are of the class 'background'. 25 %" in caplog.text


def test_many_ignored_pixels_are_named(caplog):
    mask = np.where(np.arange(48) < 20, 255, BINARY).astype(np.uint8)
    counts = check_samples({"training": samples_with([encoded(mask)], MaskEncoding(2))}, TWO)
    assert counts.ignored_share == pytest.approx(20 / 48)
    assert "42 % of the pixels of the training masks are ignored (`ignore_index` 255)" in caplog.text
    assert "If 255 is a class, give `mask_values` 0 1 255." in caplog.text


def test_usual_masks_need_no_words(caplog):
    mask = BINARY.copy()
    mask[:, 11] = 255
    images = [encoded(np.zeros((40, 48, 3), np.uint8), "JPEG", exif=turned(1))]
    check_samples({"training": samples_with([encoded(mask)], MaskEncoding(2), images)}, TWO)
    assert caplog.text == ""


SOFT = np.asarray(
    Image.fromarray(255 * BINARY).resize((480, 400), Image.Resampling.BICUBIC).rotate(5, Image.Resampling.BICUBIC)
)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (encoded(128 * BINARY), r"values 0, 128 only, .* too few to count 129 classes by. `mask_values` 0 128"),
        (encoded(65535 * BINARY.astype(np.uint16)), "too few to count 65536 classes by. `mask_values` 0 65535"),
        (encoded(255 * BINARY, "JPEG"), "JPEG files, which change values: .*--nearest_values 0 255"),
        (encoded(SOFT), "most in between are of few pixels: .*--nearest_values 0 255"),
    ],
    ids=["sparse", "16 bits", "JPEG", "soft borders"],
)  # fmt: skip
def test_values_that_count_no_classes_are_refused(mask, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_segmentation_data(SegmentationDataArguments(str(stored(tmp_path, [mask] * 2))), seed=0)


@pytest.mark.parametrize("highest", [39, 20])
def test_many_classes_without_names_are_counted(highest, tmp_path):
    """The first and the last of 40 classes have most of the pixels; or as in Pascal VOC background and the ignored 255."""
    mask = np.zeros((40, 48), np.uint8)
    mask[20:], mask[0, : highest + 1] = 39 if highest == 39 else 255, np.arange(highest + 1)
    opened = open_segmentation_data(SegmentationDataArguments(str(stored(tmp_path, [encoded(mask)] * 2))), seed=0)
    assert len(opened.class_names) == highest + 1


def test_classes_that_only_evaluation_has_are_counted_and_named(tmp_path, caplog):
    third = np.where(np.arange(48) > 40, 2, BINARY).astype(np.uint8)
    folder = stored(tmp_path, [encoded(BINARY)] * 2, [encoded(third)])
    opened = open_segmentation_data(SegmentationDataArguments(str(folder)), seed=0)
    assert opened.class_names == ["0", "1", "2"]
    parts = {"training": opened.train, "evaluation": opened.evaluation}
    check_samples({name: samples_of(rows, encoding=opened.encoding) for name, rows in parts.items()}, ["0", "1", "2"])
    assert (
        "No training mask has 2" in caplog.text and "The evaluation has 1 of them, which will score 0" in caplog.text
    )


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (encoded(SOFT), "Values in between come from resizing with a smooth filter.*--nearest_values"),
        (encoded(255 * BINARY, "JPEG", quality=30), "come from the compression of JPEG"),
        (
            encoded(2 * BINARY),
            "has the values 2; .* Where 0 is no class and 1 the first one, give --reduce_labels true",
        ),
    ],
    ids=["soft borders", "JPEG", "ADE20K"],
)
def test_unknown_values_are_explained(mask, message):
    with pytest.raises(ValueError, match=message):
        samples_with([mask], MaskEncoding(2)).check_rows()


def test_jpeg_masks_of_valid_ids_are_named(caplog):
    mask = 20 * np.kron(BINARY[::8, ::8], np.ones((8, 8), np.uint8))
    samples_with([encoded(mask), encoded(mask, "JPEG", quality=95)], MaskEncoding(30)).check_rows()
    assert "1 of the 2 training masks are JPEG files (row 1 is the first)" in caplog.text


def test_palettes_that_number_colors_anew_are_named(caplog):
    same = [palette_mask(BINARY, [0, 0, 0, 255, 0, 0])] * 2
    samples_with([encoded(mask) for mask in same], MaskEncoding(2)).check_rows()
    assert "palette" not in caplog.text
    other = palette_mask(1 - BINARY, [255, 0, 0, 0, 0, 0])
    samples_with([encoded(mask) for mask in (*same, other)], MaskEncoding(2)).check_rows()
    assert "1 of the 3 training masks have a palette" in caplog.text
    assert "0 is [0, 0, 0] in row 0 and [255, 0, 0] in row 2" in caplog.text and "--colors" in caplog.text


def test_a_mask_left_lying_by_exif_is_explained():
    image = encoded(np.zeros((40, 48, 3), np.uint8), "JPEG", exif=turned())
    message = r"is 48 x 40 pixels .*, its image 40 x 48 once turned upright, as its Exif orientation \(6\) says"
    with pytest.raises(ValueError, match=message):
        samples_with([encoded(BINARY)], MaskEncoding(2), [image]).check_rows()


@pytest.mark.parametrize(
    ("side", "orientations", "is_unclear"),
    [
        (40, (6, 1), True),  # square
        (40, (1, 6), True),
        (48, (3, 1), True),  # upside down
        (48, (6, 8), True),
        (40, (6, 6), False),
        (48, (6, 1), False),  # the sizes fit the upright image
    ],
)
def test_turns_that_sizes_do_not_show_are_named(side, orientations, is_unclear, caplog):
    stored_size, upright_size = (40, side), (side, 40)
    image_size, mask_size = (stored_size if value in (3, 6, 8) else upright_size for value in orientations)
    if orientations == (3, 1):
        mask_size = stored_size
    image = encoded(np.zeros((*image_size, 3), np.uint8), exif=turned(orientations[0]))
    mask = np.zeros(mask_size, np.uint8)
    mask[:9] = 1
    samples_with([encoded(mask, exif=turned(orientations[1]))], MaskEncoding(2), [image]).check_rows()
    assert ("Exif turns 1 of the 1 training images otherwise than their masks" in caplog.text) == is_unclear


def test_headline_says_over_how_many_classes_it_is():
    scores = SegmentationScores(5)
    measures = scores.compute(predictions=[np.array([0, 1, 2])], references=[np.array([0, 1, 1])])
    metrics = {f"eval_{name}": value for name, value in measures.items()} | {"eval_num_classes": 5}
    assert measures["measured_classes"] == 3 and headline(metrics, "eval").startswith(
        "mean IoU over 3 of 5 classes 50.00 %"
    )
    measures = scores.compute(predictions=[np.zeros(3, int)], references=[np.zeros(3, int)])
    metrics = {f"eval_{name}": value for name, value in measures.items()} | {"eval_num_classes": 5}
    assert headline(metrics, "eval") == "no mean IoU over 1 of 5 classes, pixel accuracy 100.00 %"


def test_binary_masks_end_the_program_before_training(tmp_path):
    folder = stored(tmp_path, [encoded(255 * BINARY)] * 4)
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(TWO))))
    options = {"dataset_name": folder, "output_dir": tmp_path / "run", "report_to": "none", "image_size": 32}
    options |= {"per_device_train_batch_size": 4, "config_overrides": TINY.replace("layers: 2", "layers: 4")}
    with pytest.raises(SystemExit, match="25 % .* --mask_values 0 255"):
        program.main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    assert not (tmp_path / "run" / "config.json").exists()
