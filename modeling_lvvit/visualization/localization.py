"""How well maps of a classifier find the thing that an image is labelled with, measured on images with masks.

    python -m modeling_lvvit.visualization.localization outputs/digit_scenes
    python -m modeling_lvvit.visualization.localization MODEL --dataset_name DATA --mask_column_name mask

For the labelled class of each image, relevance, attention of the class token, attention rollout and, where the model has them, patch
predictions are compared with the pixels that have this class in the mask, and with chance.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import nn
from transformers.hf_argparser import HfArg

from ..cli import digit_scenes
from ..console import program, progress_bar
from ..data.images import IMAGE_ERRORS, MAX_PIXELS_HELP, PixelLimit, decode_image
from ..data.masks import UNKNOWN, read_mask
from ..evaluate.classifier import Classifier, InputOptions, load_classifier
from ..evaluate.test_sets import model_class_map, open_test_set
from ..launching import set_up_cpu
from ..options import Program
from .relevance import relevance_maps


MODULE = "modeling_lvvit.visualization.localization"
WHOLE_VIEW = 0.99  # share of the height that a model must see of images of its own shape
PATCHES, CHANCE = "patches", "chance"
TITLES = {
    "relevance": "relevance", "attention": "attention of the class token", "rollout": "attention rollout",
    PATCHES: "patch predictions", CHANCE: "chance",
}  # fmt: skip


@dataclass
class LocalizationArguments:
    """Options of the program."""

    models: list[str] | None = HfArg(
        default=None,
        help="Classifiers of transformers with a class token.",
        aliases=["--model", "--model_name_or_path"],
    )
    dataset_name: str | None = HfArg(
        default=None, help="Images with labels and masks; default: the embedded digit scenes.", aliases=["--dataset"]
    )
    eval_split: str | None = HfArg(default=None, help="Split; default: found by name.", aliases=["--split"])
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(default="label", help="Column of class ids.", aliases=["--label_column"])
    mask_column_name: str | None = HfArg(
        default=None,
        help="Column of masks, which hold the ids of the label column; default: mask.",
        aliases=["--mask_column"],
    )
    max_eval_samples: int | None = HfArg(
        default=None, help="Images of a subset, drawn over all classes.", aliases=["--max_samples"]
    )
    crop_pct: float | None = HfArg(
        default=None,
        aliases=["--crop_fraction"],
        help="Share of the resized image that the center crop of the models keeps; default: theirs, which must be 1.",
    )
    batch_size: int = HfArg(default=32, help="Images at a time.")
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")

    def __post_init__(self):
        self.mask_column_name = self.mask_column_name or "mask"


def enlarged(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps `(B, rows, columns)` at the height and width of their images, bilinearly, float32."""
    return nn.functional.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def localization_scores(maps: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the largest value of a map lies on the thing (pointing game, Zhang et al. 2016, arXiv:1608.00507), and how much its
    strongest pixels overlap the thing.

    Args:
        maps: `(B, rows, columns)`, larger where the thing is thought to be; enlarged bilinearly.
        masks: bool `(B, height, width)`, where it is; none is empty.

    Returns:
        Hits, 0 or 1, float32 `(B,)`; and intersection over union, float32 `(B,)`, of the mask and as many of the largest pixels of the
        map. A map of a single value gets what chance does.
    """
    values, inside = enlarged(maps, masks.shape[-2:]).flatten(1), masks.flatten(1)
    hits = inside.gather(1, values.argmax(dim=1, keepdim=True))[:, 0].float()
    order = values.argsort(dim=1, descending=True, stable=True)
    areas = inside.sum(dim=1)
    is_strongest = torch.arange(order.shape[1], device=order.device) < areas[:, None]
    common = (inside.gather(1, order) & is_strongest).sum(dim=1)
    overlap = common / (2 * areas - common)
    says_nothing = values.amax(dim=1) == values.amin(dim=1)
    chance = chance_scores(masks)
    return torch.where(says_nothing, chance[0], hits), torch.where(says_nothing, chance[1], overlap)


def chance_scores(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What random maps reach on average: the share a of the image that the thing takes, and `a / (2 - a)`."""
    share = masks.flatten(1).float().mean(dim=1)
    return share, share / (2 - share)


class LocalizationTotals:
    """Scores of maps that were compared with masks so far."""

    def __init__(self):
        self._scores: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, maps: Mapping[str, torch.Tensor], masks: Sequence[torch.Tensor], labels: Sequence[int]) -> None:
        """Compares maps `(B, rows, columns)` by name with the pixels of masks, ids `(height, width)` each, that have the label of their
        image; images whose mask has none are passed over."""
        for position, (mask, label) in enumerate(zip(masks, labels)):
            thing = (mask == label)[None]
            if not thing.any():
                continue
            for name, values in maps.items():
                scores = localization_scores(values[position : position + 1].cpu(), thing)
                self._scores.setdefault(name, []).append(scores)
            self._scores.setdefault(CHANCE, []).append(chance_scores(thing))

    @property
    def num_images(self) -> int:
        """How many images had their label in the mask."""
        return len(self._scores.get(CHANCE, ()))

    def means(self) -> dict[str, tuple[float, float]]:
        """Pointing accuracy and mean overlap of each map and of chance, in [0, 1]."""
        return {
            name: tuple(float(torch.cat([part[index].float() for part in parts]).mean()) for index in (0, 1))
            for name, parts in self._scores.items()
        }


def class_maps(
    model: nn.Module,
    pixel_values: torch.Tensor,
    class_ids: torch.Tensor,
    forward_options: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Maps of where a class is, `(B, rows, columns)` by name (see `TITLES`): those of `relevance_maps`, and where there are trained patch
    logits the probability of the class in each."""
    maps = relevance_maps(model, pixel_values, class_ids, forward_options)
    named = {"relevance": maps.relevance, "attention": maps.attention, "rollout": maps.rollout}
    if maps.patch_logits is not None:
        named[PATCHES] = class_shares(maps.patch_logits, class_ids, maps.relevance.shape[1:])
    return named


def class_shares(patch_logits: torch.Tensor, class_ids: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Probability of a class `(B,)` in each of the patches, `(B, N, C)` to `(B, rows, columns)`."""
    shares = patch_logits.float().softmax(dim=-1)[torch.arange(len(class_ids)), :, class_ids]
    return shares.unflatten(1, tuple(grid_size))


def localize(classifier: Classifier, args: LocalizationArguments) -> dict[str, tuple[float, float]]:
    """Pointing accuracy and mean overlap of each kind of map, in [0, 1]; a `ValueError` if classes, columns or masks do not fit, or the
    model has no such maps."""
    name = args.dataset_name or str(digit_scenes.build_or_reuse())
    test_set = open_test_set(
        name,
        args.eval_split,
        image_column=args.image_column_name,
        label_column=args.label_column_name,
        max_samples=args.max_eval_samples,
    )
    if test_set.is_multi_label:
        raise ValueError(
            f"Images of {name} have several classes, and the maps are about one: name a column with one class of each image (`label_column`)."
        )
    if args.mask_column_name not in test_set.rows.column_names:
        raise ValueError(f"{name} has no column {args.mask_column_name!r}; it has {test_set.rows.column_names}.")
    class_map = model_class_map(classifier.class_names, test_set)
    check_view(classifier.view, classifier.name)
    columns = (args.image_column_name, args.label_column_name, args.mask_column_name)
    rows = test_set.rows.select_columns(columns).with_format("arrow")
    totals = LocalizationTotals()
    for start in progress_bar(range(0, len(rows), args.batch_size), desc=classifier.name, unit="batch"):
        table = rows[start : start + args.batch_size]
        labels = table[args.label_column_name].to_pylist()
        pixel_values, masks = read_masked_images(table, *columns[::2], classifier.transform, start)
        groups = [(label,) if class_map is None else class_map.groups[label] for label in labels]
        ids = torch.tensor([_single(group) for group in groups])
        totals.add(class_maps(classifier.model, pixel_values, ids, classifier.forward_options), masks, labels)
    if not totals.num_images:
        raise ValueError(f"No mask of {name} has the label of its image.")
    print(f"{classifier.name}: {totals.num_images:,} of {len(rows):,} images have their label in the mask", flush=True)
    return totals.means()


def _single(group: tuple[int, ...]) -> int:
    if len(group) != 1:
        raise ValueError(
            f"Classes {group} of the model stand for one class of the data; relevance is about a single one."
        )
    return group[0]


def check_view(view: tuple[float, float] | None, name: str) -> None:
    """Raises a `ValueError` unless a model of some name sees whole images (see `Classifier.view`)."""
    if view is None or view[1] < WHOLE_VIEW:
        raise ValueError(
            f"{name} does not see whole images, a center crop cuts off what the masks show. Set `crop_pct` to 1."
        )


def read_masked_images(
    table: pa.Table, image_column: str, mask_column: str, transform: Callable[[Image.Image], torch.Tensor], start: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Input `(B, 3, h, w)` and masks, int64 `(height, width)` each, of some rows, which must show what the model sees. The mask of an image
    without one is `UNKNOWN` everywhere.

    Args:
        start: Row number of the first, for messages.

    Raises:
        ValueError: If an image or mask cannot be read, or they show different parts.
    """
    inputs, masks = [], []
    for offset, (value, mask) in enumerate(zip(table[image_column], table[mask_column])):
        try:
            image = decode_image(value.as_py())
            ids = read_mask(mask.as_py()) if mask.is_valid else np.full((image.height, image.width), UNKNOWN)
        except IMAGE_ERRORS as error:
            raise ValueError(f"Row {start + offset} cannot be used: {error}") from error
        pixels = transform(image)
        if ids.shape != (image.height, image.width) or image.height * pixels.shape[2] != image.width * pixels.shape[1]:
            raise ValueError(
                f"Row {start + offset}: image {image.width} x {image.height}, mask {ids.shape[1]} x {ids.shape[0]}, model input "
                f"{pixels.shape[2]} x {pixels.shape[1]} (width x height): all must have one shape, and nothing may be cut off."
            )
        inputs.append(pixels)
        masks.append(torch.from_numpy(ids.astype(np.int64)))
    return torch.stack(inputs), masks


def markdown_table(results: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """Pointing accuracy and overlap in per cent of each model and kind of map."""
    lines = ["| model | map | pointing game | overlap (IoU) |", "| --- | --- | ---: | ---: |"]
    for model, scores in results.items():
        for name, (pointing, overlap) in scores.items():
            lines.append(f"| {Path(model).name} | {TITLES[name]} | {100 * pointing:.1f} | {100 * overlap:.1f} |")
    return "\n".join(lines)


PROGRAM = Program(MODULE, __doc__, (LocalizationArguments,), ("models*",), required=("models",))


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        PixelLimit(args.max_image_pixels)
        results = {}
        for name in args.models:
            classifier = load_classifier(
                name, InputOptions(None, args.crop_pct), trust_remote_code=args.trust_remote_code
            )
            results[name] = localize(classifier, args)
    print(markdown_table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
