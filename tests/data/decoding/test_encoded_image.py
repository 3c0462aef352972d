"""Regions of image files, with the decoder of regions and without it: the same pixels, the same errors."""

import io

import numpy as np
import pytest
from PIL import Image

from modeling_lvvit.data.decoding import EncodedImage, as_encoded, jpeg_regions
from modeling_lvvit.data.images import UndecodableError, decode_image
from support.encoded_images import as_array, jpeg, mirrored, photograph
from support.image_files import turned, unusual_files


SIZE = (61, 45)  # width and height in pixels
BOXES = [(0, 0, *SIZE), (3, 5, 40, 30), (20, 0, 61, 45), (60, 44, 61, 45)]


@pytest.fixture(params=["regions", "pillow"])
def decoder(request, monkeypatch):
    """Both ways to decode; the first is left out where its library is not installed."""
    if request.param == "pillow":
        monkeypatch.setattr(jpeg_regions, "library", lambda: None)
    elif not jpeg_regions.is_used():
        pytest.skip("nvidia-nvimgcodec-cu13 is not installed")
    return request.param


KINDS = {
    "baseline": {},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True, "subsampling": 1},
    "restart markers": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_of_jpeg_files_are_those_of_the_whole_image(decoder, kind, orientation):
    value = jpeg(photograph(), orientation, **KINDS[kind])
    image, whole = EncodedImage.open(value), decode_image(value)
    assert image.has_regions and image.size == whole.size
    for part, expected in ((image, whole), (image.mirrored(), mirrored(whole)), (image.mirrored().mirrored(), whole)):
        assert np.array_equal(part.decode(), expected)
        for left, top, right, bottom in BOXES:
            box = (left, top, right, bottom) if orientation < 5 else (top, left, bottom, right)
            assert np.array_equal(as_array(part.region(box)), np.asarray(expected.crop(box)))


@pytest.mark.parametrize("name, content", unusual_files().items(), ids=list(unusual_files()))
def test_files_of_all_kinds_are_read_as_decode_image_reads_them(decoder, name, content):
    value = {"bytes": content, "path": None}
    try:
        whole = decode_image(value)
    except (OSError, ValueError):
        with pytest.raises(UndecodableError):
            EncodedImage.open(value).region((0, 0, 1, 1))
        return
    image = EncodedImage.open(value)
    width, height = image.size
    assert (width, height) == whole.size
    box = (width // 3, height // 4, width, height - 1)
    for part, expected in ((image, whole), (image.mirrored(), mirrored(whole))):
        assert np.array_equal(as_array(part.region(box)), np.asarray(expected.crop(box)))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_other_formats_are_turned_too(decoder, file_format):
    value = {"bytes": turned(file_format, 6), "path": None}
    assert np.array_equal(EncodedImage.open(value).decode(), decode_image(value))


def test_jpeg_without_conversion_of_colors(decoder):
    value = jpeg(photograph(), keep_rgb=True)
    expected = decode_image(value).crop(BOXES[1])
    assert np.array_equal(as_array(EncodedImage.open(value).region(BOXES[1])), np.asarray(expected))


def test_first_of_several_pictures_in_a_file(decoder):
    file = io.BytesIO()
    photograph().save(file, "MPO", save_all=True, append_images=[photograph().rotate(90)], quality=90)
    value = {"bytes": file.getvalue(), "path": None}
    image = EncodedImage.open(value)
    assert image.has_regions
    assert np.array_equal(as_array(image.region(BOXES[1])), np.asarray(decode_image(value).crop(BOXES[1])))


def test_damage_in_a_region_and_elsewhere(decoder, capfd):
    content = jpeg(photograph(640, 480))["bytes"]
    cut = EncodedImage.open({"bytes": content[: len(content) // 2], "path": None})
    if decoder == "regions":  # what lies behind a region is not looked at
        assert cut.region((0, 0, 640, 100)).shape == (3, 100, 640)
    else:
        with pytest.raises(UndecodableError, match="truncated"):
            cut.region((0, 0, 640, 100))
    with pytest.raises(UndecodableError, match="truncated"):
        cut.region((0, 400, 640, 480))
    with pytest.raises(UndecodableError, match="truncated"):
        cut.decode()
    with pytest.raises(UndecodableError, match="truncated"):
        cut.resized_from_reduced((0, 0, 640, 480), (80, 60), Image.Resampling.BILINEAR, 8)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image(content):
    with pytest.raises(UndecodableError):
        EncodedImage.open({"bytes": content, "path": None})


def test_too_large_images_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UndecodableError, match="max_image_pixels"):
        EncodedImage.open(jpeg(photograph()))


@pytest.mark.parametrize(
    "size, reduction", [((100, 50), 8), ((101, 50), 4), ((100, 51), 4), ((200, 100), 4), ((390, 10), 2), ((500, 9), 1)]
)
def test_reduction_leaves_as_many_pixels_as_needed(size, reduction):
    assert EncodedImage((1000, 1000), has_regions=True).reduction((100, 200, 900, 600), size) == reduction
    assert EncodedImage((1000, 1000)).reduction((100, 200, 900, 600), size) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_boxes_lie_where_whole_ones_do(orientation, reduction):
    value = jpeg(photograph(637, 481), orientation, quality=95)
    image, whole = EncodedImage.open(value), decode_image(value)
    box = (81.0, 33.5, 401.0, 353.5)
    for part, expected in ((image, whole), (image.mirrored(), mirrored(whole))):
        reduced = as_array(part.resized_from_reduced(box, (40, 40), Image.Resampling.BILINEAR, reduction))
        resized = np.asarray(expected.resize((40, 40), Image.Resampling.BILINEAR, box=box))
        difference = np.abs(reduced.astype(float) - resized)
        assert difference.mean() < 1.2 and difference.max() < 14
        shifted = np.asarray(expected.resize((40, 40), Image.Resampling.BILINEAR, box=(89.0, 33.5, 409.0, 353.5)))
        assert np.abs(reduced.astype(float) - shifted).mean() > 3 * difference.mean()


@pytest.mark.parametrize("size, factor", [((300, 300), 1), ((150, 150), 2), ((60, 60), 8)])
def test_loaded_image_is_as_small_as_allowed(size, factor):
    value = jpeg(photograph(640, 480))
    loaded = EncodedImage.open(value).loaded(size)
    assert loaded.size == (640 // factor, 480 // factor) and not loaded.has_regions
    expected = decode_image(value).resize(loaded.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(loaded.decode()).astype(float) - np.asarray(expected)).mean() < 1


def test_decoded_images_are_taken_too():
    image = photograph()
    encoded = as_encoded(image)
    assert as_encoded(encoded) is encoded and encoded.size == SIZE
    assert np.array_equal(encoded.decode(), image)
    assert np.array_equal(encoded.mirrored().decode(), mirrored(image))
