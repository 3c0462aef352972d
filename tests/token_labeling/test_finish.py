"""8-bit batches: what was drawn before pixels became 8-bit is drawn again, and the device ends with the same images."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_lvvit.backbones.image_processors import ImageProcessorTransform
from modeling_lvvit.data.decoding import EncodedImage, jpeg_regions
from modeling_lvvit.data.images import Normalization
from modeling_lvvit.data.sampling import seed_generators
from modeling_lvvit.token_labeling import AugmentationConfig, TokenLabelCollator, TrainTransform, finish_images
from modeling_lvvit.token_labeling.augmentation.finish import BoxEraser, ErasedBox
from modeling_lvvit.variants import evaluation_image_processor
from support.encoded_images import jpeg, photograph
from support.samples import finished


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
# drawn for images of (90 + seed) x 70 pixels when samples were float32: crop, first and last column of its matrix, erased rectangle
DRAWN = {
    0: ((0.0, 0.0143, 0.8778, 0.9857), (0.8889, 0.5891, 0.2337, -0.239), None),
    1: ((0.1758, 0.0571, 0.6154, 0.5286), (1.0, 0.0, 0.0, 0.0), None),
    3: ((0.4086, 0.1571, 0.8925, 0.7857), (1.0, 0.0, 0.0, 0.0), None),
    4: ((0.3191, 0.1714, 0.734, 0.8857), (1.0, 0.0, 0.0, 0.0), (5, 26, 13, 22)),
    5: ((0.0, 0.1143, 0.7474, 0.9857), (1.0, 0.3777, 0.0, 0.0), None),
    7: ((0.0309, 0.1429, 0.5052, 0.9429), (1.0, 0.0, 0.0, 0.0), (18, 7, 8, 9)),
}


def sample_of(seed: int, image: Image.Image | EncodedImage, **options) -> dict:
    seed_generators(seed)
    return TrainTransform((32, 48), MEAN, STD, **options)(image)


@pytest.mark.parametrize("seed", DRAWN)
def test_draws_are_those_of_earlier_versions(seed):
    crop, matrix, erased = DRAWN[seed]
    sample = sample_of(seed, Image.new("RGB", (90 + seed, 70)))
    assert sample["crop_box"].tolist() == pytest.approx(crop, abs=1e-4)
    assert sample["label_affine"][:, [0, 2]].T.flatten().tolist() == pytest.approx(matrix, abs=1e-4)
    if seed != 5:  # its rectangle lay over what was filled, where it could not be seen
        box = sample.get("erased")
        assert (None if box is None else (box.top, box.left, box.height, box.width)) == erased


@pytest.mark.parametrize("exact", [False, True])
def test_samples_do_not_depend_on_the_decoder(monkeypatch, exact):
    if not jpeg_regions.is_used():
        pytest.skip("nvidia-nvimgcodec-cu13 is not installed")
    images = [EncodedImage.open(jpeg(photograph(150, 110), orientation)) for orientation in (1, 6, 3)]
    with_regions = [sample_of(seed, images[seed % 3], exact_resize=exact) for seed in range(30)]
    monkeypatch.setattr(jpeg_regions, "library", lambda: None)
    for seed, sample in enumerate(with_regions):
        assert torch.equal(
            sample_of(seed, images[seed % 3], exact_resize=exact)["pixel_values"], sample["pixel_values"]
        )


def test_normalization_is_that_of_images_between_0_and_1():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    expected = (pixels / 255 - mean) / std
    torch.testing.assert_close(Normalization(MEAN, STD)(pixels), expected, rtol=0, atol=1e-6)


def test_noise_belongs_to_the_sample():
    """Not to its place in the batch, nor to what others have drawn."""
    pixels, box = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ErasedBox(2, 3, 4, 5, seed=7)
    batch = {"pixel_values": pixels, "normalization": Normalization(MEAN, STD)}
    alone = finish_images({**batch, "erased": [box]})["pixel_values"][0]
    others = [ErasedBox(0, 0, 3, 3, seed=1, row=0), box.at(1)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    together = finish_images({**batch, "pixel_values": pixels.expand(2, -1, -1, -1), "erased": others})["pixel_values"]
    assert torch.equal(together[1], alone) and torch.equal(torch.get_rng_state(), state)
    background = Normalization(MEAN, STD)(pixels)[0]
    changed = (alone != background).all(0)
    assert changed[2:6, 3:8].all() and changed.sum() == 20


def test_noise_is_normal():
    noise = finish_images(
        {
            "pixel_values": torch.zeros(1, 3, 200, 200, dtype=torch.uint8),
            "normalization": Normalization(MEAN, STD),
            "erased": [ErasedBox(0, 0, 200, 200, seed=0)],
        }
    )["pixel_values"]
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02


def test_as_many_rectangles_as_asked_for():
    seed_generators(0)
    eraser = BoxEraser(0.25)
    boxes = [box for _ in range(4000) if (box := eraser.draw((100, 200))) is not None]
    assert 900 < len(boxes) < 1100 and len({box.seed for box in boxes}) == len(boxes)
    shares = np.array([box.height * box.width / 20_000 for box in boxes])
    ratios = np.array([box.height / box.width for box in boxes])
    assert 0.019 < shares.min() < 0.03 and 0.3 < shares.max() < 0.34
    assert 0.25 < ratios.min() < 0.4 and 2.5 < ratios.max() < 3.6
    assert all(box.top + box.height <= 100 and box.left + box.width <= 200 for box in boxes)


@pytest.mark.parametrize("method", ["cutmix", "mixup"])
def test_erased_rectangles_are_mixed_with_the_image(method):
    """First noise, then the mixture, as when this was done by the processor."""
    samples = [{**sample_of(4, photograph(90, 70)), "seed": 5}, {**sample_of(1, photograph(90, 70)), "seed": 6}]
    batch = TokenLabelCollator((4, 6), mix_methods=(method,))(samples)
    share = batch["pixel_share"].expand(1, 1, 32, 48)[0]
    first, second = map(finished, samples)
    mixed = finish_images(batch)["pixel_values"]
    torch.testing.assert_close(mixed[0], (1 - share) * first + share * second)
    torch.testing.assert_close(mixed[1], (1 - share) * second + share * first)
    pooled = torch.nn.functional.adaptive_avg_pool2d(share, (4, 6))
    torch.testing.assert_close(batch["mix_share"][:1], pooled)


def test_batches_of_pixels_are_a_quarter_of_the_bytes():
    samples = [sample_of(seed, photograph(90, 70)) for seed in range(4)]
    batch = TokenLabelCollator((4, 6), mix_probability=0.0)(samples)
    assert batch["pixel_values"].dtype == torch.uint8 and batch["pixel_values"].nbytes == 4 * 3 * 32 * 48
    images = finish_images(batch)
    assert set(images) == {"pixel_values", "crop_box", "label_affine", "image_box"}
    assert images["pixel_values"].dtype == torch.float32 and images["pixel_values"].is_contiguous()
    for row, sample in enumerate(samples):
        assert torch.equal(images["pixel_values"][row], finished(sample))


def test_normalized_images_stay_as_they_are():
    pixel_values = torch.randn(2, 3, 8, 8)
    assert torch.equal(finish_images({"pixel_values": pixel_values})["pixel_values"], pixel_values)


def test_pixels_without_normalization_are_refused():
    with pytest.raises(ValueError, match="without `normalization`. Collate samples of `TrainTransform` with"):
        finish_images({"pixel_values": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)})


def test_normalized_samples_make_a_batch_of_the_usual_layout():
    samples = [{"pixel_values": torch.randn(3, 8, 8)} for _ in range(2)]
    assert TokenLabelCollator((2, 2))(samples)["pixel_values"].is_contiguous()


@pytest.mark.parametrize("size", [(90, 70), (640, 480), (41, 300)])
def test_evaluation_images_are_those_of_the_processor(size):
    processor = evaluation_image_processor((32, 48), 0.9, image_mean=MEAN, image_std=STD)
    image = photograph(*size)
    sample = ImageProcessorTransform(processor, as_pixels=True)(image)
    expected = ImageProcessorTransform(processor)(image)["pixel_values"]
    assert sample["pixel_values"].dtype == torch.uint8
    torch.testing.assert_close(finished(sample), expected, rtol=0, atol=1e-5)


def test_seed_of_noise_is_drawn_last():
    """What a sample looks like before erasing does not depend on whether anything is erased."""
    for seed in (4, 7):
        without = sample_of(seed, photograph(90, 70), augmentation=AugmentationConfig(random_erasing=0.0))
        assert torch.equal(without["pixel_values"], sample_of(seed, photograph(90, 70))["pixel_values"])
