"""How far the labels of tokens are from what the tokens show after geometric augmentation.

An image is stood in for by a field of class scores at full resolution; its label map is the mean of the field over each of
18 x 18 cells. The reference moves the field, channel by channel, with the calls of PIL that timm makes, one operation after
another, cuts the crop, takes the mean over each token and softmax. Reported is the mean total-variation distance
(0.5 * sum |p - q|) of four ways to move the map instead:

    ours            all operations composed into one affine map, read once with linear interpolation
    nearest         the map moved to the nearest cell, once for each operation, with the right center and aspect ratio
    authors' moves  the same in index coordinates: rotation about cell 9, shear factors of pixels taken for cells
    authors         the same with the corners of the crop exchanged (`label_crop="authors"`)

Tokens are told apart by the share of them that the reference shows of the image. Distances are over the tokens at least half
of which is image. The others are fill; of those, "cut" are tokens that operations one after another have filled, because
the image left the frame in between, while a single composed move shows the image. Only ours is given for them.

    python tests/label_geometry.py --samples 40
"""

import argparse
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps
from modeling_lvvit.labels.label_maps import build_palette, encode_top_k
from modeling_lvvit.token_labeling.augmentation.rand_augment import _AffineRecorder
from modeling_lvvit.token_labeling.augmentation.transforms import AugmentationConfig, TrainTransform


Operations = tuple[tuple[str, float], ...]  # name in timm, and its argument (degrees, factor, share of the side)
STRONG = {"Rotate": 27.0, "ShearX": 0.27, "ShearY": 0.27, "TranslateXRel": 0.4, "TranslateYRel": 0.4}
SIZES = ((320, 240), (200, 300), (256, 256))
NUM_CLASSES, CELLS, TOKENS = 8, 18, 14
METHODS = ("ours", "nearest", "authors' moves", "authors")
BILINEAR = Image.Resampling.BILINEAR


def apply_operations(image, operations: Operations, fill=0):
    """timm's functions one after another, on an image or on an `_AffineRecorder`."""
    for name, value in operations:
        image = NAME_TO_OP[name](image, value, resample=BILINEAR, fillcolor=fill)
    return image


def recorded_matrix(operations: Operations, size: tuple[int, int]) -> np.ndarray | None:
    """What the package composes them to, `[3, 3]`."""
    return apply_operations(_AffineRecorder(size), operations).matrix


class FixedGeometry:
    """Stands in for `RandAugment`: draws the given operations.

    Args:
        operations: Geometric operations, in order.
        fill: Color of what moves in.
    """

    def __init__(self, operations: Operations, fill: tuple[int, ...] = (128, 128, 128)):
        self.operations, self.fill = operations, fill

    def draw(self, size: tuple[int, int]) -> tuple[np.ndarray | None, list]:
        """See `RandAugment.draw`."""
        return recorded_matrix(self.operations, size), []


def transform_with(operations: Operations, image_size=(224, 224), **augmentation) -> TrainTransform:
    """A `TrainTransform` without chance in colors and moves; flip off and the crop random unless told otherwise."""
    settings = {"horizontal_flip": 0.0, "rand_augment": "none", "random_erasing": 0.0} | augmentation
    transform = TrainTransform(image_size, [0.5] * 3, [0.5] * 3, AugmentationConfig(**settings))
    transform.rand_augment = FixedGeometry(operations)
    return transform


def whole_image(size: tuple[int, int]) -> dict:
    """Augmentation options for a crop of everything."""
    return {"crop_scale": (1.0, 1.0), "crop_ratio": (size[0] / size[1],) * 2}


def class_field(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Scores 0 to 10 of every pixel, `[classes, height, width]` float32: smooth, with three regions of sharp edges."""
    width, height = size
    coarse = generator.uniform(0, 10, (NUM_CLASSES, 5, 6)).astype(np.float32)
    smooth = [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in coarse]
    field = np.stack(smooth).clip(0, 10)
    for class_id in generator.permutation(NUM_CLASSES)[:3]:
        left, top = generator.integers(0, width * 2 // 3), generator.integers(0, height * 2 // 3)
        region = (slice(top, top + generator.integers(height // 6, height // 2)), slice(left, left + width // 4))
        field[(slice(None), *region)] = 0
        field[(class_id, *region)] = 10
    return field


def area_weights(length: int, start: float, end: float, bins: int) -> np.ndarray:
    """Share of each of `length` pixels in the mean of equal bins of [start, end], `[bins, length]`."""
    borders = np.linspace(start, end, bins + 1)[:, None]
    pixels = np.arange(length)
    overlap = np.minimum(borders[1:], pixels + 1) - np.maximum(borders[:-1], pixels)
    return overlap.clip(min=0) * bins / (end - start)


def area_mean(field: np.ndarray, box: tuple[float, ...], grid: tuple[int, int]) -> np.ndarray:
    """Mean of `[..., height, width]` over a grid of equal parts of a box in pixels, `[..., rows, columns]`."""
    left, top, right, bottom = box
    rows = area_weights(field.shape[-2], top, bottom, grid[0])
    columns = area_weights(field.shape[-1], left, right, grid[1])
    return rows @ (np.float64(field) @ columns.T)  # mixed types would leave BLAS


def moved_field(field: np.ndarray, operations: Operations) -> np.ndarray:
    """The field after PIL's operations, filled with 0."""
    return np.stack([np.asarray(apply_operations(Image.fromarray(channel), operations)) for channel in field])


def shown_once(size: tuple[int, int], matrix: np.ndarray | None) -> np.ndarray:
    """Which pixels of the image moved by one affine map lie in the image, `[height, width]` float32."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    x, y, _ = np.einsum("ij,jhw->ihw", np.eye(3) if matrix is None else matrix, np.stack([x, y, np.ones_like(x)]))
    return np.float32((x >= 0) & (x < width) & (y >= 0) & (y < height))


def nearest_cells(scores: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`[classes, rows, columns]` moved to the nearest cell; the matrix is that of coordinates with the corner at (0, 0)."""
    rows, columns = scores.shape[-2:]
    y, x = np.mgrid[0:rows, 0:columns] + 0.5
    x, y, _ = np.floor(np.einsum("ij,jhw->ihw", matrix, np.stack([x, y, np.ones_like(x)]))).astype(int)
    inside = (x >= 0) & (x < columns) & (y >= 0) & (y < rows)
    return scores[:, y.clip(0, rows - 1), x.clip(0, columns - 1)] * inside


def moved_map(scores: np.ndarray, operations: Operations, size: tuple[int, int], like_authors: bool) -> np.ndarray:
    """The map moved once for each operation."""
    rows, columns = scores.shape[-2:]
    for operation in operations:
        if (
            like_authors
        ):  # indices for coordinates: (0, 0) is the center of the first cell, (9, 9) the center of rotation
            matrix, cells = recorded_matrix((operation,), (columns, rows)), np.eye(3)
            cells[:2, 2] = 0.5
        else:
            matrix, cells = recorded_matrix((operation,), size), np.diag([columns / size[0], rows / size[1], 1.0])
        scores = nearest_cells(scores, cells @ matrix @ np.linalg.inv(cells))
    return scores


def targets_of(scores: np.ndarray, geometry: CropGeometry, label_crop="correct") -> np.ndarray:
    """Targets of the tokens from a map `[classes, rows, columns]`, `[N, classes]`."""
    ids, kept = encode_top_k(torch.tensor(scores), NUM_CLASSES)
    palette, index = build_palette(torch.from_numpy(ids)[None])
    batch = (palette, index, torch.from_numpy(kept)[None])
    _, tokens = crop_label_maps(*batch, geometry, (TOKENS, TOKENS), NUM_CLASSES, label_crop)
    return tokens.to_dense()[0].numpy()


def geometry_of(sample: dict) -> CropGeometry:
    """Where the crop of a sample lies, as a batch of one."""
    return CropGeometry(*(sample[name][None] for name in ("crop_box", "label_affine", "image_box")))


def softmax_tokens(scores: np.ndarray) -> np.ndarray:
    """`[classes, rows, columns]` to `[N, classes]`."""
    return torch.tensor(scores).flatten(1).softmax(dim=0).T.numpy()


@dataclass
class Distances:
    """Total-variation distances of the tokens of one crop.

    Args:
        by_method: `[N]` for each of `METHODS`.
        shown: `[N]`, share of each token that shows the image in the reference.
        shown_once: The same if the image is moved once.
    """

    by_method: dict[str, np.ndarray]
    shown: np.ndarray
    shown_once: np.ndarray


def measure(field: np.ndarray, operations: Operations, flip: bool, augmentation: dict) -> Distances:
    """Augments once (the crop is drawn from torch's generator) and compares every token with the reference."""
    size = field.shape[:0:-1]
    scores = area_mean(field, (0, 0, *size), (CELLS, CELLS)).astype(np.float32)
    transform = transform_with(operations, horizontal_flip=float(flip), **augmentation)
    ids, kept = encode_top_k(torch.tensor(scores), NUM_CLASSES)
    sample = transform(Image.new("RGB", size), ids, kept)
    geometry = geometry_of(sample)
    if flip:
        field, scores = np.ascontiguousarray(field[..., ::-1]), scores[..., ::-1].copy()
    pixels = (sample["crop_box"].numpy() * [*size, *size]).round()
    grid = (TOKENS, TOKENS)
    reference = softmax_tokens(area_mean(moved_field(field, operations), pixels, grid))
    palette, index = build_palette(sample["token_label_index"][None])
    _, ours = crop_label_maps(palette, index, sample["token_label_scores"][None], geometry, grid, NUM_CLASSES)
    crop = CropGeometry(geometry.crop_box)
    by_authors = moved_map(scores, operations, size, like_authors=True)
    targets = {
        "ours": ours.to_dense()[0].numpy(),
        "nearest": targets_of(moved_map(scores, operations, size, like_authors=False), crop),
        "authors' moves": targets_of(by_authors, crop),
        "authors": targets_of(by_authors, crop, "authors"),
    }
    masks = (
        moved_field(np.ones((1, *size[::-1]), np.float32), operations)[0],
        shown_once(size, recorded_matrix(operations, size)),
    )
    shown = [area_mean(mask, pixels, grid).flatten() for mask in masks]
    return Distances({name: 0.5 * np.abs(p - reference).sum(-1) for name, p in targets.items()}, *shown)


def measure_many(draw_operations, samples: int, seed: int, cropped: bool) -> Distances:
    """`measure` for several fields and sizes; with `cropped` a random flip and crop (scale 0.08 to 1), else the whole image."""
    generator, results = np.random.default_rng(seed), []
    torch.manual_seed(seed)
    for number in range(samples):
        size = SIZES[number % len(SIZES)]
        augmentation = {} if cropped else whole_image(size)
        flip = cropped and bool(generator.random() < 0.5)
        results.append(measure(class_field(size, generator), draw_operations(generator, number), flip, augmentation))
    by_method = {name: np.concatenate([result.by_method[name] for result in results]) for name in METHODS}
    shown, once = (np.concatenate([getattr(result, key) for result in results]) for key in ("shown", "shown_once"))
    return Distances(by_method, shown, once)


def single(name: str):
    """Draws one operation at its strong magnitude, with alternating sign."""
    return lambda generator, number: ((name, STRONG[name] * (1, -1)[number % 2]),)


def composition(count: int):
    """Draws several operations of random kind and sign, at 0.3 to 1 of the strong magnitude."""

    def draw(generator: np.random.Generator, number: int) -> Operations:
        names = generator.choice(list(STRONG), count)
        return tuple(
            (str(name), STRONG[name] * generator.uniform(0.3, 1) * generator.choice([-1, 1])) for name in names
        )

    return draw


def colored_field(rows: int, columns: int, cell: int) -> tuple[Image.Image, np.ndarray]:
    """Blocks of 2 x 2 cells of one class, no two neighbours alike; class k has the color of the bits of k."""
    block_rows, block_columns = (rows + 1) // 2, (columns + 1) // 2
    parity = np.arange(block_rows)[:, None] % 2 * 2 + np.arange(block_columns) % 2
    blocks = parity + 4 * np.random.default_rng(3).integers(0, 2, parity.shape)
    classes = blocks.repeat(2, 0).repeat(2, 1)[:rows, :columns]
    colors = np.uint8((classes[..., None] >> np.arange(3) & 1) * 255)
    return Image.fromarray(colors.repeat(cell, 0).repeat(cell, 1)), classes


def shown_classes(pixel_values: torch.Tensor) -> np.ndarray:
    """Class of the color of each token `[N]`; -1 where it has more than one, -2 where all of it is fill (grey)."""
    channels = pixel_values.unfold(1, 16, 16).unfold(2, 16, 16).flatten(3).flatten(1, 2)  # (3, N, pixels), in [-1, 1]
    bits = (channels > 0).all(-1).int() * torch.tensor([[1], [2], [4]])
    is_pure = ((channels > 0.5).all(-1) | (channels < -0.5).all(-1)).all(0)
    is_fill = (channels.abs() < 0.01).all(-1).all(0)
    return torch.where(is_pure, bits.sum(0), torch.where(is_fill, -2, -1)).numpy()


def report(title: str, distances: Distances) -> str:
    """A row of the table."""
    inside = distances.shown >= 0.5
    cut = ~inside & (distances.shown_once >= 0.5)
    fill = ~inside & ~cut
    means = [f"{distances.by_method[name][inside].mean():.4f}" for name in METHODS]
    ours = distances.by_method["ours"]
    others = [f"{part.mean():.1%} | {ours[part].mean() if part.any() else 0:.4f}" for part in (fill, cut)]
    return f"| {title} | {' | '.join(means)} | {' | '.join(others)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=30, help="Images for each row of the table.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    random.seed(options.seed)
    print(f"| geometry | {' | '.join(METHODS)} | fill | ours there | cut | ours there |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    rows = {"none": lambda generator, number: ()} | {name: single(name) for name in STRONG}
    rows |= {"two operations": composition(2), "three operations": composition(3)}
    for cropped in (False, True):
        for title, draw in rows.items():
            where = "flip, crop" if cropped else "whole"
            print(report(f"{title}, {where}", measure_many(draw, options.samples, options.seed, cropped)), flush=True)


if __name__ == "__main__":
    main()
