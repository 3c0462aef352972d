"""Builds the embedded dataset: scenes of real handwritten digits with dense labels from a small annotator.

    python -m modeling_lvvit.cli.digit_scenes OUTPUT_DIR

Each scene is a 64 x 64 RGB image: a textured background, several small digits at random places, scales and colors,
and one large digit, whose class is the label. The digits are the 1,797 handwritten ones that scikit-learn ships (8 x 8
pixels, UCI ML hand-written digits dataset); test scenes use other digits than training scenes. A convolutional
annotator learns on windows cut from training scenes and then labels every cell of every scene.

Columns: `image`; `label`, 0 to 9; `mask`, PNG with 0 to 9 for digit pixels and 10 for background; `token_label_ids` and
`token_label_scores`, [5, 16, 16] each.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image
from torch import nn
from transformers.hf_argparser import HfArg

from ..annotators.pipeline import annotate_batches
from ..console import program, progress_bar
from ..data.files.atomic_files import atomic_directory, write_json
from ..data.sources import check_cache
from ..labels.columns import label_map_features, to_arrow
from ..options import Program


VERSION = 2  # raise it when the same arguments would give other data
SIDE, BACKGROUND, NUM_CLASSES = 64, 10, 10
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = {"train": 4000, "test": 1000}
TEST_SHARE = 0.2  # of the digits of each class
TOP_K, CELLS = 5, 16
MAX_OVERLAP = 0.15  # share of a digit's square that others may take
PLACE_TRIES = 20  # a digit that finds no place is left out
MIN_CONTRAST = 0.25  # between a digit and what lies below it, mean over the channels, in [0, 1]


def split_digits(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Disjoint digits for each split: images `(n, 8, 8)` in [0, 1] and labels `(n,)`."""
    from sklearn.datasets import (
        load_digits,
    )  # not above: every program starts a second sooner

    digits = load_digits()
    rng = np.random.default_rng([seed, 0])
    test = np.zeros(len(digits.target), dtype=bool)
    for digit in range(NUM_CLASSES):
        members = rng.permutation(np.flatnonzero(digits.target == digit))
        test[members[: round(TEST_SHARE * len(members))]] = True
    images = (digits.images / 16.0).astype(np.float32)
    return {"train": (images[~test], digits.target[~test]), "test": (images[test], digits.target[test])}


def paste_digit(
    scene: np.ndarray,
    mask: np.ndarray,
    digit: np.ndarray,
    label: int,
    window: tuple[slice, slice],
    rng: np.random.Generator,
) -> None:
    """Draws one digit into a square window of `scene` `(64, 64, 3)` and `mask` `(64, 64)`, in place."""
    side = window[0].stop - window[0].start
    image = Image.fromarray(np.uint8(255 * digit)).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    opacity = np.asarray(image, dtype=np.float32) / 255.0
    color = rng.uniform(0, 1, size=3)
    while (color - scene[window].mean(axis=(0, 1))).mean() < MIN_CONTRAST:  # a color that stands out
        color = rng.uniform(0, 1, size=3)
    scene[window] += opacity[..., None] * (color - scene[window])
    mask[window][opacity > 0.35] = label


def draw_scene(digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """One scene: image uint8 `(64, 64, 3)`, mask uint8 `(64, 64)`, label of the large digit."""
    coarse = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    texture = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
    scene = rng.uniform(0.05, 0.25, size=3) + 0.25 * texture
    scene = scene.astype(np.float32) + rng.normal(0, 0.03, size=scene.shape).astype(np.float32)
    mask = np.full((SIDE, SIDE), BACKGROUND, dtype=np.uint8)
    large = rng.integers(len(digits))
    sides = [int(rng.integers(34, 45)), *(int(side) for side in rng.integers(14, 21, size=rng.integers(3, 6)))]
    taken = np.zeros((SIDE, SIDE), dtype=bool)
    for rank, side in enumerate(sides):
        for _ in range(PLACE_TRIES):
            top, left = rng.integers(0, SIDE - side + 1, size=2)
            window = np.s_[top : top + side, left : left + side]
            if taken[window].mean() <= MAX_OVERLAP:
                taken[window] = True
                pick = large if rank == 0 else rng.integers(len(digits))
                paste_digit(scene, mask, digits[pick], labels[pick], window, rng)
                break
    return np.uint8(255 * scene.clip(0, 1)), mask, int(labels[large])


def draw_split(split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All scenes of a split: images `(n, 64, 64, 3)`, masks `(n, 64, 64)`, labels `(n,)`."""
    digits, labels = split_digits(seed)[split]
    streams = np.random.SeedSequence([seed, list(SPLITS).index(split) + 1]).spawn(count)
    scenes = [
        draw_scene(digits, labels, np.random.default_rng(stream))
        for stream in progress_bar(streams, desc=f"Drawing {split} scenes", unit="scene")
    ]
    images, masks, targets = zip(*scenes)
    return np.stack(images), np.stack(masks), np.array(targets)


class DigitAnnotator(nn.Module):
    """Fully convolutional digit classifier: `(B, 3, H, W)` in [0, 1] to logits `(B, 10, H / 4, W / 4)`.

    The dilated layers see about 100 pixels, so that a cell knows the whole digit that it lies on.
    """

    def __init__(self, width: int = 48):
        super().__init__()
        layers: list[nn.Module] = []
        widths = (3, width // 2, *[width] * 6)
        for index, dilation in enumerate((1, 1, 1, 2, 4, 2, 1)):
            inputs, outputs, stride = *widths[index : index + 2], 2 if index < 2 else 1
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(pixel_values))


def train_annotator(images: np.ndarray, masks: np.ndarray, seed: int, epochs: int) -> DigitAnnotator:
    """Learns the digit under every cell of windows cut from training scenes `(n, 64, 64, 3)` with masks `(n, 64, 64)`, both uint8;
    background cells learn "no digit"."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        annotator = DigitAnnotator().to(memory_format=torch.channels_last)
    scenes = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, 3, 64, 64)
    cell = SIDE // CELLS
    targets = torch.from_numpy(masks)[:, cell // 2 :: cell, cell // 2 :: cell].long()  # class at each cell center
    batch_size, window = 64, 48
    optimizer = torch.optim.AdamW(annotator.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(scenes) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    annotator.train()
    progress = progress_bar(total=steps, desc="Training the annotator", unit="step")
    for _ in range(epochs):
        for rows in torch.randperm(len(scenes), generator=generator).split(batch_size)[: len(scenes) // batch_size]:
            top, left = (cell * torch.randint((SIDE - window) // cell + 1, (2,), generator=generator)).tolist()
            batch = scenes[rows, :, top : top + window, left : left + window].float() / 255.0
            cells = np.s_[top // cell : (top + window) // cell, left // cell : (left + window) // cell]
            target = targets[rows][:, cells[0], cells[1]]
            log_probabilities = annotator(batch.contiguous(memory_format=torch.channels_last)).log_softmax(dim=1)
            # a background cell has no class: its target is uniform over the ten digits
            background = target == BACKGROUND
            named = log_probabilities.gather(1, target.clamp(max=NUM_CLASSES - 1).unsqueeze(1)).squeeze(1)
            loss = -(named[~background].mean() + log_probabilities.mean(dim=1)[background].mean()) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    progress.close()
    return annotator.eval()


def annotate_scenes(annotator: DigitAnnotator, images: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Dense labels of whole scenes, `(n, 5, 16, 16)` ids and scores.

    A constant per cell does not change the annotator's own softmax, but the one over a map's classes counts the others
    as 0: the mean over classes is therefore taken off, which leaves background cells near 0.
    """

    def score_map(pixel_values: torch.Tensor) -> torch.Tensor:
        logits = annotator(pixel_values)
        return logits - logits.mean(dim=1, keepdim=True)

    batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(256)
    progress = progress_bar(batches, desc=f"Annotating {split} scenes", unit="batch")
    return annotate_batches(score_map, (batch.float() / 255.0 for batch in progress), TOP_K)


def write_split(
    path: Path, images: np.ndarray, masks: np.ndarray, labels: np.ndarray, maps: tuple[np.ndarray, np.ndarray]
) -> None:
    """Writes one Parquet file with the features that `load_dataset` restores; images and masks are PNG files."""
    ids, scores = maps
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=list(CLASS_NAMES)),
        mask=datasets.Image(),
        **label_map_features(*ids.shape[1:], str(ids.dtype)),
    )
    files = [
        pa.array([datasets.Image().encode_example(array) for array in arrays], type=datasets.Image().pa_type)
        for arrays in (images, masks)
    ]
    columns = [files[0], pa.array(labels), files[1], to_arrow(ids), to_arrow(scores)]
    pq.write_table(pa.Table.from_arrays(columns, schema=features.arrow_schema), path, compression="zstd")


def build(output_dir: Path, seed: int = 0, annotator_epochs: int = 8) -> None:
    """Draws, annotates and writes the dataset; the folder, which must be new or empty, appears only when it is complete."""
    with atomic_directory(output_dir, is_shared=True) as partial:
        for split, count in SPLITS.items():
            images, masks, labels = draw_split(split, count, seed)
            if split == "train":
                annotator = train_annotator(images, masks, seed, annotator_epochs)
            maps = annotate_scenes(annotator, images, split)
            write_split(partial / f"{split}.parquet", images, masks, labels, maps)
        record = {"version": VERSION, "seed": seed, "annotator_epochs": annotator_epochs, "splits": SPLITS}
        write_json(partial / "digit_scenes.json", record)


def cache_folder() -> Path:
    """Where the dataset lies once it was built: in the cache folder of Hugging Face libraries, outside that of `datasets`, which would put
    its Arrow copies between the Parquet files."""
    return Path(HF_HOME) / "lvvit" / f"digit-scenes-{VERSION}"


def build_or_reuse() -> Path:
    """The dataset in `cache_folder`, built on first use. Processes that start together may each build it; the first to finish wins
    and the others use its result."""
    folder = cache_folder()
    if not folder.is_dir():
        try:
            build(folder)
        except OSError as error:
            if not folder.is_dir():
                check_cache(folder.parent, error)
                raise
    return folder


@dataclass
class ScenesArguments:
    """Options of the program."""

    output_dir: str | None = HfArg(default=None, help="Folder to create.")
    scenes_seed: int = HfArg(default=0, help="Seed of scenes and annotator.", aliases=["--seed"])
    annotator_epochs: int = HfArg(default=8, help="Passes of the annotator over the scenes.")


PROGRAM = Program("digit_scenes", __doc__, (ScenesArguments,), ("output_dir",), required=("output_dir",))


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        build(Path(args.output_dir), args.scenes_seed, args.annotator_epochs)
    print(f"{' and '.join(f'{count} {split}' for split, count in SPLITS.items())} scenes -> {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
