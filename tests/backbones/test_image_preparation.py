"""What image processors do, in numbers; those that do something else are refused."""

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BitImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    DonutImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    PerceiverImageProcessor,
    PoolFormerImageProcessor,
    SegformerImageProcessor,
    Siglip2ImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessorPil,
)

from modeling_lvvit.backbones.image_preparation import ImagePreparation, read_preparation
from modeling_lvvit.backbones.image_processors import Resizing


HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def timm(**config) -> TimmWrapperImageProcessor:
    return TimmWrapperImageProcessor(pretrained_cfg={"input_size": (3, 64, 64), **config})


@pytest.mark.parametrize(
    ("processor", "resizing"),
    [
        (ViTImageProcessorPil(size=square(32)), Resizing((32, 32))),
        (DeiTImageProcessor(size=square(36), crop_size=square(32)), Resizing((36, 36), None, (32, 32))),
        (CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=square(32)), Resizing(48, None, (32, 32))),
        (ConvNextImageProcessor(size={"shortest_edge": 64}), Resizing(73, None, (64, 64))),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), Resizing((384, 384))),
        (LevitImageProcessor(size={"shortest_edge": 64}, crop_size=square(64)), Resizing(73, None, (64, 64))),
        (PoolFormerImageProcessor(size={"shortest_edge": 64}, crop_size=square(64)), Resizing(71, None, (64, 64))),
        (SegformerImageProcessor(size={"shortest_edge": 64, "longest_edge": 90}), Resizing(64, 90)),
        (SegformerImageProcessor(do_resize=False), Resizing(None)),
        (timm(crop_pct=0.9), Resizing(71, None, (64, 64))),
        (timm(crop_pct=0.9, crop_mode="squash"), Resizing((71, 71), None, (64, 64))),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, Resizing) else "",
)
def test_numbers_of_processors(processor, resizing):
    assert read_preparation(processor).resizing == resizing


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (MobileViTImageProcessor(), "exchanges red and blue"),
        (PerceiverImageProcessor(size=square(32)), "it makes 32 x 32 instead of 256 x 256 pixels"),
        (DonutImageProcessor(size=square(64)), "gray levels"),
        (Siglip2ImageProcessor(), r"expected \(3, height, width\)"),
        (timm(crop_mode="border"), "crop_mode 'border'"),
        (timm(input_size=(3, 64, 96)), "64 x 96 pixels with the crop_mode 'center'"),
        # rounds a border up
        (BitImageProcessorPil(size={"shortest_edge": 61}, crop_size=square(64)), "gray levels"),
    ],
)
def test_other_processors_are_refused(processor, reason):
    with pytest.raises(ValueError, match=reason):
        read_preparation(processor)


def test_all_normalization_is_in_mean_and_std():
    twice = read_preparation(EfficientNetImageProcessor(size=square(32), rescale_offset=True))
    assert (twice.image_mean, twice.image_std) == ((1.5,) * 3, (0.25,) * 3)
    assert read_preparation(ViTImageProcessorPil(size=square(32), do_normalize=False)).image_std == (1.0, 1.0, 1.0)


def test_timm_rounds_crops_to_even_pixels():
    assert read_preparation(timm()).rounds_crop and not read_preparation(BitImageProcessor()).rounds_crop
    lower, even = (ImagePreparation(Resizing(8), 3, *HALF, rounds) for rounds in (False, True))
    assert [lower.crop_start(length, 4) for length in (5, 6, 7, 9, 3, 1)] == [0, 1, 1, 2, 0, -1]
    assert [even.crop_start(length, 4) for length in (5, 6, 7, 9, 3, 1)] == [0, 1, 2, 2, 0, -1]


def test_sizes_by_hand():
    shortest = ImagePreparation(Resizing(60, 100, (64, 96)), 3, *HALF)
    assert shortest.resized_size(100, 155) == (60, 93)
    assert shortest.resized_size(155, 100) == (93, 60)
    assert shortest.resized_size(100, 300) == (33, 100)  # 100 / 3 = 33.33, which keeps the ratio for the longer side
    assert shortest.image_size == (64, 96) and ImagePreparation(Resizing(60), 3, *HALF).image_size is None
    white = shortest.prepare(Image.new("RGB", (100, 100), "white"))  # 60 x 60 of 64 x 96, the rest is black
    assert white.shape == (3, 64, 96) and white.dtype == np.float32
    assert np.argwhere(white[0] == 1).min(axis=0).tolist() == [2, 18]
    assert (white == 1).sum() == 3 * 60 * 60 and (white == -1).sum() == 3 * (64 * 96 - 60 * 60)
