"""How well maps of a classifier find the thing that an image is labelled with, measured on images with masks.

    python -m modeling_lvvit.visualization.localization outputs/digit_scenes
    python -m modeling_lvvit.visualization.localization MODEL --dataset_name DATA --mask_column_name mask

For the labelled class of each image, relevance, attention of the class token, attention rollout and, where the model has them, patch
predictions are compared with the pixels that have this class in the mask, and with chance.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers.hf_argparser import HfArg

from ..cli import digit_scenes
from ..console import program, progress_bar
from ..data.images import IMAGE_ERRORS, MAX_PIXELS_HELP, PixelLimit, decode_image
from ..data.masks import read_mask
from ..evaluate.classifier import Classifier, InputOptions, load_classifier
from ..evaluate.test_sets import model_class_map, open_test_set
from ..launching import set_up_cpu
from ..options import Program
from .relevance import relevance_maps


MODULE = "modeling_lvvit.visualization.localization"
WHOLE_VIEW = 0.99  # share of the height that a model must see of images of its own shape
TITLES = {
    "relevance": "relevance", "attention": "attention of the class token", "rollout": "attention rollout",
    "patches": "patch predictions", "chance": "chance",
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
    size = masks.shape[-2:]
    wide = nn.functional.interpolate(maps[:, None].float(), size=size, mode="bilinear", align_corners=False)
    values, inside = wide.flatten(1), masks.flatten(1)
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
    if classifier.view is None or classifier.view[1] < WHOLE_VIEW:
        raise ValueError(
            f"{classifier.name} does not see whole images, a center crop cuts off what the masks show. Set `crop_pct` to 1."
        )
    rows = test_set.rows.select_columns(
        [args.image_column_name, args.label_column_name, args.mask_column_name]
    ).with_format("arrow")
    totals: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for start in progress_bar(range(0, len(rows), args.batch_size), desc=classifier.name, unit="batch"):
        table = rows[start : start + args.batch_size]
        labels = table[args.label_column_name].to_pylist()
        pixel_values, masks = _read(table, args, classifier, start)
        groups = [(label,) if class_map is None else class_map.groups[label] for label in labels]
        ids = torch.tensor([_single(group) for group in groups])
        maps = relevance_maps(classifier.model, pixel_values, ids, classifier.forward_options)
        named_maps = {"relevance": maps.relevance, "attention": maps.attention, "rollout": maps.rollout}
        if maps.patch_logits is not None:
            shares = maps.patch_logits.softmax(dim=-1)[torch.arange(len(ids)), :, ids]
            named_maps["patches"] = shares.unflatten(1, maps.relevance.shape[1:])
        for position, (mask, label) in enumerate(zip(masks, labels)):
            thing = (mask == label)[None]
            if not thing.any():
                continue
            for map_name, values in named_maps.items():
                totals.setdefault(map_name, []).append(localization_scores(values[position : position + 1], thing))
            totals.setdefault("chance", []).append(chance_scores(thing))
    used = len(totals.get("chance", ()))
    if not used:
        raise ValueError(f"No mask of {name} has the label of its image.")
    print(f"{classifier.name}: {used:,} of {len(rows):,} images have their label in the mask", flush=True)
    return {
        map_name: tuple(float(torch.cat([part[index].float() for part in parts]).mean()) for index in (0, 1))
        for map_name, parts in totals.items()
    }


def _single(group: tuple[int, ...]) -> int:
    if len(group) != 1:
        raise ValueError(
            f"Classes {group} of the model stand for one class of the data; relevance is about a single one."
        )
    return group[0]


def _read(
    table, args: LocalizationArguments, classifier: Classifier, start: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Input `(B, 3, h, w)` and masks `(height, width)` of some rows, which must show what the model sees."""
    inputs, masks = [], []
    for offset, (value, mask) in enumerate(zip(table[args.image_column_name], table[args.mask_column_name])):
        try:
            image, ids = decode_image(value.as_py()), read_mask(mask.as_py())
        except IMAGE_ERRORS as error:
            raise ValueError(f"Row {start + offset} cannot be used: {error}") from error
        pixels = classifier.transform(image)
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
