"""Crops in another size: the exact way equals Pillow on the whole image, the fast way comes near it."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit.data.decoding import EncodedImage, as_encoded, jpeg_regions, resized_box, resized_crop, warped_crop
from modeling_lvvit.data.images import decode_image
from support.encoded_images import as_array, jpeg, mirrored, photograph


FILTERS = [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
FILL = (200, 100, 50)
TURN = np.array([[0.95, -0.2, 30.0], [0.25, 0.9, -20.0], [0, 0, 1]])
FAR = np.array([[1.0, 0, 5000.0], [0, 1, 0], [0, 0, 1]])


def warped_by_pillow(image: Image.Image, matrix: np.ndarray, box, size, resample) -> np.ndarray:
    """The whole image in the scale of the result, from which Pillow reads the crop."""
    (left, top, right, bottom), (width, height) = box, size
    to_source = matrix @ np.array([[(right - left) / width, 0, left], [0, (bottom - top) / height, top], [0, 0, 1]])
    shrink = np.maximum(1, np.hypot(to_source[:2, 0], to_source[:2, 1]))
    corners = to_source[:2] @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])
    low = np.clip(np.floor(corners.min(axis=1) - 3 * shrink), 0, image.size)
    high = np.clip(np.ceil(corners.max(axis=1) + 3 * shrink), 0, image.size)
    if shrink.max() > 1:
        reduced = np.ceil((high - low) / shrink).astype(int)
        image = image.resize(tuple(reduced.tolist()), resample, box=(*low, *high))
        to_source[:2] = (to_source[:2] - np.outer(low, [0, 0, 1])) * (reduced / (high - low))[:, None]
    data = tuple(to_source[:2].flatten())
    return np.asarray(image.transform(size, Image.Transform.AFFINE, data, resample, fillcolor=FILL))


def distance(pixels: torch.Tensor, expected: np.ndarray) -> float:
    return np.abs(as_array(pixels).astype(float) - expected).mean()


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("box", [(0, 0, 300, 200), (17, 31, 250, 180), (100, 90, 130, 115), (299, 0, 300, 200)])
def test_exact_crops_are_those_of_pillow(box, orientation, resample):
    value = jpeg(photograph(300, 200) if orientation == 1 else photograph(200, 300), orientation)
    for image, whole in (
        (EncodedImage.open(value), decode_image(value)),
        (EncodedImage.open(value).mirrored(), mirrored(decode_image(value))),
    ):
        expected = np.asarray(whole.resize((48, 32), resample, box=box))
        assert np.array_equal(as_array(resized_crop(image, box, (48, 32), resample, exact=True)), expected)
        assert distance(resized_crop(image, box, (48, 32), resample), expected) < 2
        assert np.array_equal(np.asarray(resized_box(whole, box, (48, 32), resample)), expected)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("size", [(48, 32), (220, 210)])
@pytest.mark.parametrize("box", [(40, 20, 240, 180), (0, 0, 300, 200), (110, 90, 150, 120)])
def test_exact_warped_crops_are_those_of_pillow(box, size, resample):
    value = jpeg(photograph(300, 200))
    image, whole = EncodedImage.open(value), decode_image(value)
    expected = warped_by_pillow(whole, TURN, box, size, resample)
    assert np.array_equal(as_array(warped_crop(image, TURN, box, size, resample, FILL, exact=True)), expected)
    assert distance(warped_crop(image, TURN, box, size, resample, FILL), expected) < 2


def test_crop_outside_of_the_image_is_filled():
    image = as_encoded(photograph(300, 200))
    for exact in (False, True):
        crop = warped_crop(image, FAR, (0, 0, 100, 100), (8, 8), FILTERS[0], FILL, exact)
        assert (as_array(crop) == FILL).all()


def test_fast_fill_is_that_of_pillow():
    image, box, size = photograph(300, 200), (150, 0, 300, 200), (64, 64)
    exact = as_array(warped_crop(as_encoded(image), TURN, box, size, FILTERS[0], FILL, exact=True))
    fast = as_array(warped_crop(as_encoded(image), TURN, box, size, FILTERS[0], FILL))
    is_filled = (exact == FILL).all(axis=-1)
    assert 0.1 < is_filled.mean() < 0.9
    assert ((fast == FILL).all(axis=-1) != is_filled).mean() < 0.001


@pytest.mark.parametrize("matrix", [np.eye(3), TURN])
def test_large_images_are_decoded_in_the_scale_of_the_crop(monkeypatch, matrix):
    value = jpeg(photograph(1600, 1200), quality=95)
    image, whole = EncodedImage.open(value), decode_image(value)
    monkeypatch.setattr(EncodedImage, "region", None)  # no pixel is decoded in full
    monkeypatch.setattr(EncodedImage, "decode", None)
    crop = warped_crop(image, matrix, (100, 100, 1300, 1100), (64, 64), FILTERS[1], FILL)
    assert distance(crop, warped_by_pillow(whole, matrix, (100, 100, 1300, 1100), (64, 64), FILTERS[1])) < 2
    crop = resized_crop(image, (100, 100, 1300, 1100), (64, 64), FILTERS[1])
    assert distance(crop, np.asarray(whole.resize((64, 64), FILTERS[1], box=(100, 100, 1300, 1100)))) < 2


@pytest.mark.skipif(not jpeg_regions.is_used(), reason="nvidia-nvimgcodec-cu13 is not installed")
@pytest.mark.parametrize("exact", [False, True])
def test_both_decoders_give_the_same_crops(monkeypatch, exact):
    image = EncodedImage.open(jpeg(photograph(300, 200), 6))

    def crops():
        yield resized_crop(image, (17, 31, 150, 280), (48, 32), FILTERS[1], exact)
        yield warped_crop(image, TURN, (17, 31, 150, 280), (48, 32), FILTERS[0], FILL, exact)

    with_regions = list(crops())
    monkeypatch.setattr(jpeg_regions, "library", lambda: None)
    assert all(torch.equal(*pair) for pair in zip(with_regions, crops()))
