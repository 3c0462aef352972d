"""RandAugment, crops and mixing: labels follow what the pixels show."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform

from modeling_lvvit.data.sampling import seed_generators
from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps
from modeling_lvvit.labels.label_maps import build_palette
from modeling_lvvit.token_labeling.arguments import TokenLabelTrainingArguments
from modeling_lvvit.token_labeling.augmentation.collator import TokenLabelCollator
from modeling_lvvit.token_labeling.augmentation.finish import finish_images
from modeling_lvvit.token_labeling.augmentation.rand_augment import (
    GEOMETRIC,
    ColorOperation,
    RandAugment,
    _AffineRecorder,
)
from modeling_lvvit.token_labeling.augmentation.transforms import AugmentationConfig, TrainTransform
from modeling_lvvit.token_labeling.losses import TokenLabelingLoss
from support.label_geometry import (
    STRONG,
    apply_operations,
    colored_field,
    composition,
    measure_many,
    recorded_matrix,
    shown_classes,
    single,
    transform_with,
    whole_image,
)
from support.samples import finished


PUBLISHED = "rand-m9-mstd0.5-inc1"
IMAGE, GRID, NUM_CLASSES = (160, 224), (10, 14), 11  # token of 16 x 16 pixels; the map names classes 0 to 7
MOVES = {
    **{f"{name}{sign:+d}": ((name, sign * value),) for name, value in STRONG.items() for sign in (1, -1)},
    "TranslateX": (("TranslateX", 23.0),),
    "TranslateY": (("TranslateY", -17.5),),
    **{f"composition {n}": composition(2 + n % 2)(np.random.default_rng(n), n) for n in range(8)},
}


def smooth_image(size: tuple[int, int]) -> np.ndarray:
    """No symmetry, and hardly curved, so that interpolation costs next to nothing."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return np.float32(0.9 * x + 0.4 * y + 5 * np.sin(x / 15) + 7 * np.cos(y / 20 + x / 40))


@pytest.mark.parametrize("moves", MOVES)
def test_recorded_matrix_equals_operations_of_pil(moves):
    size = (150, 110)
    mask = np.pad(np.ones((size[1] - 6, size[0] - 6), np.float32), 3)  # PIL repeats the outermost half pixel
    data = tuple(recorded_matrix(MOVES[moves], size)[:2].flatten())
    images = [Image.fromarray(values) for values in (smooth_image(size), mask)]
    once, once_mask = (
        np.asarray(p.transform(size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)) for p in images
    )
    in_steps, steps_mask = (np.asarray(apply_operations(p, MOVES[moves])) for p in images)
    compared = (once_mask > 0.999) & (steps_mask > 0.999)
    assert compared.mean() > 0.1
    # single operations are equal; the rest is interpolation. A rotation about a center half a pixel off gives 0.2
    assert np.quantile(np.abs(once - in_steps)[compared], 0.98) < 0.02


def test_all_operations_that_move_pixels_are_recorded():
    """The recorder knows only geometric calls: every other operation fails on it."""
    recorded = set()
    for operation in rand_augment_transform(PUBLISHED, {"img_mean": (0, 0, 0)}).ops:
        operation.prob = 1.0
        recorder = _AffineRecorder((30, 20))
        try:
            operation(recorder)
        except (AttributeError, TypeError, OSError, ValueError, NotImplementedError):
            assert operation.name not in GEOMETRIC
            continue
        assert recorder.matrix is not None
        recorded.add(operation.name)
    assert recorded == set(GEOMETRIC) - {"TranslateX", "TranslateY"} == set(STRONG)


def geometric_transform(is_moved: bool, **augmentation) -> TrainTransform:
    """RandAugment with three geometric operations each time, or none."""
    policy = "rand-m9-n3-p1-mstd0.5-inc1" if is_moved else "none"
    config = AugmentationConfig(rand_augment=policy, random_erasing=0.0, **augmentation)
    transform = TrainTransform(IMAGE, [0.5] * 3, [0.5] * 3, config)
    if is_moved:
        transform.rand_augment.operations = [op for op in transform.rand_augment.operations if op.name in GEOMETRIC]
    return transform


def targets_of(sample: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense targets of class token `[C]` and patch tokens `[N, C]`."""
    palette, index = build_palette(sample["token_label_index"][None])
    places = [sample[name][None] for name in ("crop_box", "label_affine", "image_box") if name in sample]
    scores = sample["token_label_scores"][None]
    cls, tokens = crop_label_maps(palette, index, scores, CropGeometry(*places), GRID, NUM_CLASSES)
    return cls.to_dense()[0], tokens.to_dense()[0]


# rows and columns of the image in cells; cells that the map covers (top, bottom, left, right); pixels of a cell
FIELDS = {
    "wide": ((10, 16), (0, 10, 0, 16), 20),
    "tall": ((18, 11), (0, 18, 0, 11), 15),
    "part": ((12, 16), (1, 9, 4, 15), 20),
    "large photograph": ((10, 14), (2, 10, 0, 11), 120),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("is_moved", [True, False])
def test_tokens_learn_the_class_of_the_color_they_show(name, is_moved):
    (rows, columns), (top, bottom, left, right), cell = FIELDS[name]
    image, classes = colored_field(rows, columns, cell)
    box = (left / columns, top / rows, right / columns, bottom / rows)
    shown_box = (left * cell, top * cell, right * cell, bottom * cell)
    bordered = Image.new("RGB", image.size, (100, 100, 100))  # neither the color of a class nor fill
    bordered.paste(image.crop(shown_box), shown_box)
    ids = classes[None, top:bottom, left:right].astype(np.int16)
    counts = np.zeros(2, int)
    for seed in range(8 if cell > 50 else 16):
        seed_generators(seed)
        transform = geometric_transform(is_moved, horizontal_flip=seed % 2, crop_scale=(0.2, 1.0))
        sample = transform(bordered, ids, np.full(ids.shape, 10, np.float16), box)
        shown, (_, targets) = shown_classes(finished(sample)), targets_of(sample)
        counts += [(shown >= 0).sum(), (shown == -2).sum()]
        assert (targets.argmax(-1).numpy() == shown)[shown >= 0].all(), f"seed {seed}"
        assert np.allclose(targets[shown == -2], 1 / NUM_CLASSES)
    assert counts[0] > 100
    assert (counts[1] > 100) == is_moved


# mean total-variation distance to the field moved at full resolution, measured with 30 images a row (label_geometry.py):
# ours 0.034 to 0.053, with operations and without; nearest cell 0.061 to 0.096 for one operation, 0.095 to 0.126 for two or
# three; authors' moves 0.142 to 0.214 where they rotate or shear; with their crops, 0.55 to 0.60
SHORT = {name: single(name) for name in STRONG} | {"two": composition(2), "three": composition(3)}


@pytest.mark.parametrize("name", SHORT)
def test_labels_are_nearer_to_the_truth_than_by_nearest_cells(name):
    distances = measure_many(SHORT[name], 4, seed=1, cropped=name in ("two", "three"))
    inside = distances.shown >= 0.5
    mean = {method: values[inside].mean() for method, values in distances.by_method.items()}
    assert mean["ours"] < 0.07
    assert mean["nearest"] > (1.6 if name in ("two", "three") else 1.3) * mean["ours"]
    assert mean["authors' moves"] > (1.3 if "Translate" in name else 2) * mean["ours"]
    assert mean["authors"] > (0.3 if name in ("two", "three") else 0)


def random_map(rows=12, columns=17, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes a cell with smooth scores."""
    coarse = torch.rand(1, NUM_CLASSES, 5, 6, generator=torch.Generator().manual_seed(seed))
    logits = torch.nn.functional.interpolate(coarse, (rows, columns), mode="bicubic")
    scores, ids = (10 * logits[0]).topk(3, dim=0)
    return ids.numpy().astype(np.int16), scores.numpy().astype(np.float16)


def test_affine_path_without_moves_equals_the_plain_path():
    """Same pixels; labels apart by the number of points a token is sampled at. The map covers a part of the image."""
    image, distances = colored_field(10, 16, 20)[0], []
    for seed in range(60):
        samples = []
        for policy in ("none", "rand-m9-p0"):
            seed_generators(seed)
            config = AugmentationConfig(rand_augment=policy, random_erasing=0.0)
            transform = TrainTransform(IMAGE, [0.5] * 3, [0.5] * 3, config)
            samples.append(transform(image, *random_map(), (0.1, 0.0, 0.8, 0.9)))
        assert torch.equal(samples[0]["pixel_values"], samples[1]["pixel_values"])
        assert ("label_affine" in samples[0], "label_affine" in samples[1]) == (False, True)
        pairs = zip(*(targets_of(sample) for sample in samples))
        distances.append([0.5 * (a - b).abs().sum(-1).mean().item() for a, b in pairs])
    assert (np.mean(distances, axis=0) < [0.03, 0.02]).all()  # class token, patch tokens; measured 0.012 and 0.013


def test_what_lies_outside_has_uniform_targets_and_no_part_in_the_class_token():
    """The image is moved out by 0.4 of its width, so that the crop of everything shows its right 60 %."""
    size, ids = (300, 200), np.arange(10, dtype=np.int16).repeat(3).reshape(1, 1, 30).repeat(20, 1)
    transform = transform_with((("TranslateXRel", 0.4),), IMAGE, **whole_image(size))
    transform.rand_augment.fill = (51, 102, 204)
    sample = transform(Image.new("RGB", size), ids, np.full(ids.shape, 4, np.float16))
    cls, tokens = targets_of(sample)
    filled = tokens.view(*GRID, -1)[:, 9:]  # 0.6 * 14 = 8.4 columns show the image
    assert torch.allclose(filled, torch.full_like(filled, 1 / NUM_CLASSES))
    assert (tokens.view(*GRID, -1)[:, :8].max(-1).values > 0.3).all()
    assert sample["pixel_values"][:, 80, 200].tolist() == [51, 102, 204]
    pooled = torch.tensor([0.0] * 4 + [4 / 6] * 6 + [0.0])  # the classes 4 to 9 share what is shown
    assert torch.allclose(cls, pooled.softmax(0), atol=1e-2)


def mixed_batch(count: int, method: str) -> tuple[dict, list[dict]]:
    """Samples whose pixels are their number, moved in different ways; maps cover different parts of the images."""
    samples = []
    for b in range(count):
        affine = torch.tensor([[1.2, 0.1 * b, -0.1], [-0.05, 1.1 + 0.1 * b, -0.1]])
        sample = {"pixel_values": torch.full((3, *IMAGE), float(b)), "crop_box": torch.tensor([0.1, 0, 1, 0.9])}
        sample |= {"label_affine": affine, "image_box": torch.tensor([-0.2, -0.1, 1.3, 1.2])}
        ids, scores = (torch.from_numpy(part) for part in random_map(seed=b))
        (palette,), (index,) = build_palette(ids[None])
        dense = {"token_label_palette": palette, "token_label_index": index, "token_label_scores": scores}
        samples.append(sample | dense)
    torch.manual_seed(count)
    return TokenLabelCollator(GRID, mix_methods=(method,))(samples), samples


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("method", ["cutmix", "mixup"])
@pytest.mark.parametrize("uncovered", ["nearest", "ignore"])
def test_loss_of_mixed_pixels_equals_the_dense_definition(count, method, uncovered, tmp_path):
    batch, samples = mixed_batch(count, method)
    number = torch.arange(count).unsqueeze(1)
    color = torch.nn.functional.avg_pool2d(finish_images(batch)["pixel_values"][:, 0], 16).flatten(1)  # (B, N)
    share = color[0].expand_as(color) / (count - 1)  # the first image is 0, its partner the last
    assert 0 < share.mean() < 1
    torch.testing.assert_close(color, number + (count - 1 - 2 * number) * share)
    torch.testing.assert_close(batch["mix_share"].flatten(1), share)
    cls, tokens = (0.9 * torch.stack(part) + 0.1 / NUM_CLASSES for part in zip(*map(targets_of, samples)))
    outputs = {"cls_logits": torch.randn(cls.shape), "patch_logits": torch.randn(tokens.shape)}
    weights = torch.ones(count, tokens.shape[1])
    if uncovered == "ignore":
        y, x = ((torch.arange(n) + 0.5) / n * 0.9 for n in GRID)
        places = torch.stack([*torch.meshgrid(x + 0.1, y, indexing="xy"), torch.ones(GRID)]).flatten(1)
        weights = torch.stack([((p := s["label_affine"] @ places) >= 0).all(0) & (p <= 1).all(0) for s in samples])
        assert 0.3 < weights.float().mean() < 0.95
    own, partner = (1 - share) * weights, share * weights.float().flip(0)
    targets = own.unsqueeze(-1) * tokens + partner.unsqueeze(-1) * tokens.flip(0)
    token_loss = -(targets * outputs["patch_logits"].log_softmax(-1)).sum() / (own + partner).sum()
    mean = share.mean()
    cls_loss = -(((1 - mean) * cls + mean * cls.flip(0)) * outputs["cls_logits"].log_softmax(-1)).sum(-1).mean()
    args = TokenLabelTrainingArguments(str(tmp_path), report_to="none", uncovered_tokens=uncovered)
    losses = TokenLabelingLoss(args, GRID, NUM_CLASSES)(outputs, batch)
    torch.testing.assert_close(losses["token_loss"], token_loss)
    torch.testing.assert_close(losses["cls_loss"], cls_loss)


def test_operations_are_drawn_as_often_as_by_timm(monkeypatch):
    ours, timms = RandAugment(PUBLISHED, [0.5] * 3), rand_augment_transform(PUBLISHED, {"img_mean": (128,) * 3})
    assert [repr(operation) for operation in ours.operations] == [repr(operation) for operation in timms.ops]
    called: list[str] = []
    monkeypatch.setattr(AugmentOp, "__call__", lambda operation, image: called.append(operation.name) or image)
    random.seed(0)
    np.random.seed(0)
    for source in ("ours", "timm"):
        called.clear()
        for _ in range(3000):
            if source == "timm":
                timms(None)
            else:
                called += [color.operation.name for color in ours.draw((30, 20))[1]]
        assert len(called) == 6000
        counts = np.array([called.count(operation.name) for operation in timms.ops])
        assert np.abs(counts - 400).max() < 80  # four standard deviations
        assert 140 < sum(first == second for first, second in zip(called[::2], called[1::2])) < 260  # with replacement


PLACES = {"Rotate": (1, 0), "ShearX": (0, 1), "ShearY": (1, 0), "TranslateXRel": (0, 2), "TranslateYRel": (1, 2)}
LIMITS = {"Rotate": 0.5, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 90, "TranslateYRel": 45}  # sine of 30 degrees


@pytest.mark.parametrize("name", PLACES)
def test_strength_of_moves_is_that_of_the_published_policy(name):
    """Magnitude 9 of 10, deviation 0.5, both signs, half of the time, on an image of 200 x 100."""
    random.seed(0)
    augment = RandAugment("rand-m9-n1-mstd0.5-inc1", [0.5] * 3)
    augment.operations = [operation for operation in augment.operations if operation.name == name]
    matrices = [matrix for _ in range(1000) if (matrix := augment.draw((200, 100))[0]) is not None]
    values = np.array([matrix[PLACES[name]] for matrix in matrices]) / LIMITS[name]
    assert 430 < len(values) < 570
    assert 0.4 < (values > 0).mean() < 0.6
    assert np.abs(values).max() <= 1 + 1e-9
    assert np.abs(values).mean() == pytest.approx(0.9, abs=0.02)
    assert 0.03 < np.abs(values).std() < 0.06


def test_every_operation_of_color_changes_the_image():
    image = Image.fromarray(np.random.default_rng(0).integers(30, 200, (40, 60, 3), dtype=np.uint8))
    colors = [op for op in RandAugment(PUBLISHED, [0.5] * 3).operations if op.name not in GEOMETRIC]
    assert len(colors) == 10
    for operation in colors:
        operation.prob = 1.0
        assert np.abs(np.int16(operation(image)) - np.int16(image)).mean() > 1, operation.name


def test_operations_of_color_draw_as_those_of_timm():
    image = Image.fromarray(np.random.default_rng(0).integers(30, 200, (40, 60, 3), dtype=np.uint8))
    colors = [op for op in RandAugment(PUBLISHED, [0.5] * 3).operations if op.name not in GEOMETRIC]
    acted = 0
    for seed in range(60):
        random.seed(seed)
        expected, following = colors[seed % 10](image), random.random()
        random.seed(seed)
        act = ColorOperation(colors[seed % 10]).draw()
        assert np.array_equal(expected, image if act is None else act(image)) and random.random() == following
        acted += act is not None
    assert 20 < acted < 40


def test_colors_are_changed_in_the_sample():
    image, samples = colored_field(10, 16, 20)[0], []
    for policy in ("none", "rand-m9-n1-p1-inc1"):
        seed_generators(0)
        config = AugmentationConfig(rand_augment=policy, random_erasing=0.0)
        transform = TrainTransform(IMAGE, [0.5] * 3, [0.5] * 3, config)
        if policy != "none":
            operations = transform.rand_augment.operations
            transform.rand_augment.operations = [operation for operation in operations if operation.name == "Invert"]
        samples.append(transform(image))
    assert torch.equal(samples[1]["pixel_values"], 255 - samples[0]["pixel_values"])
    assert set(samples[0]) == {"pixel_values", "normalization", "crop_box"}  # switched off


@pytest.mark.parametrize("policy", ["rand-x3", "autoaugment", "rand-m9-tweights", "", "None", "rand-m", "rand-m9 "])
def test_unknown_policies_are_refused(policy):
    with pytest.raises(ValueError, match="must look like 'rand-m9-mstd0.5-inc1'"):
        AugmentationConfig(rand_augment=policy)
