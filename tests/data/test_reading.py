"""Every reader sees the same pixels of a file; where those of other libraries do not, it is said before training."""

import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageFile
from transformers import BitImageProcessor
from transformers.image_utils import load_image

from modeling_lvvit.cli.training_program import decodes_all
from modeling_lvvit.data import image_dataset
from modeling_lvvit.data.image_dataset import ImageDataset
from modeling_lvvit.data.images import (
    ROTATED,
    SIXTEEN_BITS,
    TRANSPARENT,
    PixelLimit,
    decode_image,
    examine_image,
    jpeg_damage,
    libjpeg_reports_damage,
)
from modeling_lvvit.data.masks import MaskEncoding, read_file_facts
from modeling_lvvit.export import predict
from modeling_lvvit.segmentation.conversion.dataset_writer import Pair, check_pairs
from modeling_lvvit.segmentation.dataset import SegmentationDataset
from modeling_lvvit.training.base_arguments import BaseImageTrainingArguments
from support.image_files import COLORS, DEEP, encode, raw_tiff, refused_files, unusual_files
from support.images import encode_image


FILES, REFUSED = unusual_files(), refused_files()
AS_THEY_ARE = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


def stored(content: bytes) -> dict:
    return {"bytes": content, "path": None}


def scalar(content: bytes) -> pa.Scalar:
    return pa.scalar(stored(content), datasets.Image().pa_type)


def samples_of(files: list[bytes]) -> ImageDataset:
    values = pa.array(
        [{"bytes": file, "path": f"{row}.img"} for row, file in enumerate(files)], datasets.Image().pa_type
    )
    features = datasets.Features({"image": datasets.Image()})
    return ImageDataset(datasets.Dataset(pa.table([values], schema=features.arrow_schema)), ["image"], "training")


def check(samples: ImageDataset, monkeypatch, **options) -> list[str]:
    """Looks at all rows; the warnings."""
    texts: list[str] = []
    monkeypatch.setattr(image_dataset.logger, "warning", lambda text, *values: texts.append(text % values))
    samples.check_all_rows(lambda table, start: [], **options)
    return texts


@pytest.fixture(autouse=True)
def _limit_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


# ---- pixels


@pytest.mark.parametrize("what", FILES)
def test_all_readers_see_the_same_pixels_or_a_note_says_so(what, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(FILES[what])
    pixels = np.asarray(decode_image(stored(FILES[what])))
    np.testing.assert_array_equal(np.asarray(predict.read_image(path)), pixels)
    np.testing.assert_array_equal(np.asarray(decode_image({"bytes": None, "path": str(path)})), pixels)
    assert read_file_facts(stored(FILES[what])).size == pixels.shape[:2]

    report = examine_image(scalar(FILES[what]))
    assert report.problem is None
    with path.open("rb") as file, Image.open(file) as image:  # not by its name, see `decode_stored`
        assert np.array_equal(load_image(image), pixels) == (SIXTEEN_BITS not in report.notes)
    processor = BitImageProcessor(**AS_THEY_ARE)
    with Image.open(path) as image:
        processed = np.asarray(processor(image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0))
    assert np.array_equal(processed, pixels) or report.notes


@pytest.mark.parametrize("what", REFUSED)
def test_all_our_readers_refuse_values_without_meaning(what, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(REFUSED[what])
    with pytest.raises((ValueError, OSError)):
        decode_image(stored(REFUSED[what]))
    with pytest.raises(ValueError):
        predict.read_image(path)
    assert "cannot be decoded" in examine_image(scalar(REFUSED[what])).problem


def test_other_readers_are_named_with_counts(monkeypatch):
    kinds = ("16-bit PNG", "16-bit PNG", "RGBA PNG", "JPEG with orientation 6", "grayscale")
    samples = samples_of([FILES[kind] for kind in kinds])
    assert len(check(samples, monkeypatch)) == 3
    assert samples.notes == {SIXTEEN_BITS: 2, TRANSPARENT: 1, ROTATED: 1}
    deep, transparent, rotated = samples.differences()
    assert deep.startswith("16-bit grayscale (2 of 5 training images)") and "pipelines" in deep
    assert "(1 of 5 training images)" in transparent and "(1 of 5 training images)" in rotated


def test_plain_images_give_no_warning(monkeypatch):
    samples = samples_of([encode_image(COLORS, "PNG"), encode_image(COLORS), FILES["grayscale"]] * 100)
    assert check(samples, monkeypatch) == check(samples, monkeypatch, decode=True) == samples.differences() == []


@pytest.mark.parametrize("largest", [4095, 255])
def test_dark_images_of_16_bits_are_noticed(largest, monkeypatch):
    content = raw_tiff((DEEP // (65536 // (largest + 1))).astype("<i4"), sample_format=2)
    texts = check(samples_of([content]), monkeypatch)
    assert f"largest value of the training images with 16-bit grayscale is {largest} of 65535" in texts[1]


# ---- damage


def photographs(count: int = 20) -> list[bytes]:
    """JPEG files of about 20 kB."""
    rng = np.random.default_rng(1)
    coarse = [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(count)]
    return [encode(image.resize((320, 240), Image.Resampling.BICUBIC), "JPEG", quality=90) for image in coarse]


def damaged(content: bytes, how: str) -> bytes:
    middle, length = len(content) // 2, 1024
    part = {"zeroed": bytes(length), "cut": b"", "other": np.random.default_rng(0).bytes(length)}[how]
    return content[:middle] + part + content[middle + length :]


@pytest.mark.parametrize(("how", "least"), [("zeroed", 15), ("cut", 20), ("other", 18)])
def test_damage_inside_a_jpeg_is_reported(how, least):
    files = photographs()
    assert libjpeg_reports_damage()
    assert [jpeg_damage(file) for file in files] == [None] * len(files)
    reports = [examine_image(scalar(damaged(file, how)), decode=True) for file in files]
    assert sum(bool(report.damage or report.problem) for report in reports) >= least
    assert not any(examine_image(scalar(damaged(file, how))).damage for file in files)


def test_damaged_images_are_listed_before_training(monkeypatch):
    files = photographs(3)
    samples = samples_of([files[0], damaged(files[1], "cut"), files[2]])
    assert check(samples, monkeypatch) == []
    (text,) = check(samples, monkeypatch, decode=True)
    assert "libjpeg reports damage (1 of 3 training images)" in text and "row 1 (1.img): Corrupt JPEG data" in text


def test_a_silent_libjpeg_is_named(monkeypatch):
    monkeypatch.setattr(image_dataset, "libjpeg_reports_damage", lambda: False)
    assert "says nothing" in check(samples_of(photographs(1)), monkeypatch, decode=True)[0]


def test_decoding_finds_unreadable_images_and_leaves_the_draws_of_the_run_alone():
    samples = samples_of([*photographs(2), b"hello"])
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"row 2 \(2.img\): the image cannot be decoded"):
        samples.check_all_rows(lambda table, start: [], decode=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_of_truncated_images_is_named(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "LOAD_TRUNCATED_IMAGES is set" in check(samples_of(photographs(1)), monkeypatch)[0]


def test_all_images_are_decoded_where_that_is_cheap(tmp_path):
    def default(num_images: int, **options) -> bool:
        arguments = BaseImageTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)
        return decodes_all(None, arguments, num_images)

    assert default(10_000, num_train_epochs=1) and not default(10_001, num_train_epochs=9)
    assert default(1_000_000, num_train_epochs=10)
    steps = {"max_steps": 100, "per_device_train_batch_size": 1000, "num_train_epochs": 300}
    assert default(10_000, **steps) and not default(20_000, **steps)
    arguments = BaseImageTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert decodes_all(True, arguments, 10**9) and not decodes_all(False, arguments, 1)


# ---- large images


def test_large_images_name_the_option_and_pass_with_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    samples = samples_of([FILES["grayscale"]])
    with pytest.raises(ValueError, match=r"864 pixels.*exceeds limit of 800 pixels; `max_image_pixels` allows more"):
        samples.check_all_rows(lambda table, start: [])
    PixelLimit(864)
    samples.check_all_rows(lambda table, start: [])
    assert samples.read_image(0).size == (36, 24)
    PixelLimit(862)
    with pytest.raises(ValueError, match="max_image_pixels"):
        decode_image(stored(FILES["grayscale"]))
    with pytest.raises(ValueError, match="`max_image_pixels` must be at least 1, got 0"):
        PixelLimit(0)


def test_limit_reaches_processes_that_load(monkeypatch):
    PixelLimit(1000)
    samples = pickle.dumps(samples_of([FILES["grayscale"]]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # as in a process that starts
    assert pickle.loads(samples).read_image(0).size == (36, 24)
    assert Image.MAX_IMAGE_PIXELS == 500


def test_images_that_lie_on_their_side_fit_upright_masks():
    """TIFF says its orientation though Pillow gives the upright size."""
    file = raw_tiff(COLORS, photometric=2, orientation=6)
    masks = [encode_image(np.zeros(shape, dtype=np.uint8), "PNG") for shape in ((36, 24), (24, 36))]
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = {"image": [stored(file)] * 2, "mask": [stored(mask) for mask in masks]}
    samples = SegmentationDataset(datasets.Dataset.from_dict(rows, features), dict, MaskEncoding(2))
    with pytest.raises(ValueError) as caught:
        samples.check_rows()
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith("row 1: its mask is 36 x 24 pixels (width x height), its image 24 x 36")


def test_files_that_cannot_be_opened_say_why(tmp_path, monkeypatch):
    (tmp_path / "large.png").write_bytes(FILES["grayscale"])
    (tmp_path / "text.png").write_text("hello")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    pair = Pair(tmp_path / "large.png", tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"(?s)large.png.*`max_image_pixels` allows more.*text.png.*cannot identify"):
        check_pairs([pair], allows_colors=False)


def test_page_names_the_option_for_large_images(tmp_path, monkeypatch):
    page = pytest.importorskip("modeling_lvvit.demo.page")
    monkeypatch.setattr(page, "get_upload_folder", lambda: str(tmp_path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "large.png").write_bytes(FILES["grayscale"])
    with pytest.raises(page.gr.Error, match=r"cannot be read as an image: .* --max_image_pixels allows more"):
        page.read_image(SimpleNamespace(path=str(tmp_path / "large.png"), orig_name=None))
