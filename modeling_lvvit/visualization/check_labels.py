"""Checks a label set: counts, ranges, keys, how sharp its targets are, and whether it agrees with the human labels.

    python dataset_scripts/check_token_labels.py LABEL_SET [--dataset IMAGES]

Ends with exit code 1 if anything is damaged or does not belong together. With --dataset the label maps are joined to their
images as in training, compared with the labels, and drawn over some of them (--contact_sheet).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ..data.class_labels import check_columns, with_class_ids
from ..data.sources import open_splits
from ..labels.checks import LabelSetReport, check_label_set
from ..labels.label_crops import top_classes
from ..labels.label_set import check_class_names, join_label_set, open_label_set
from ..labels.reader import LabelMapReader, covered_region, label_class_names
from ..token_labeling.dataset import TokenLabelDataset
from . import save_contact_sheet


ROWS_PER_BATCH = 512


@dataclass
class CheckArguments:
    """Options of the program."""

    label_set: str = field(metadata={"help": "Folder or Hub name of the label set."})
    split: str = field(default="train", metadata={"help": "Split to check."})
    dataset: str | None = field(default=None, metadata={"help": "Images that the labels were made for."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration on the Hub."})
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str = field(default="label", metadata={"help": "Column of class ids or names."})
    key_column: str | None = field(default=None, metadata={"help": "Column of keys; default: paths or row numbers."})
    key_pattern: str | None = field(default=None, metadata={"help": "Expression that cuts the key out of both sides."})
    contact_sheet: str | None = field(default=None, metadata={"help": "PNG to draw; needs --dataset."})
    num_pictures: int = field(default=12, metadata={"help": "Images on it."})
    max_samples: int | None = field(default=None, metadata={"help": "Join the first images only, as annotated."})

    def __post_init__(self):
        if self.contact_sheet is not None and self.dataset is None:
            raise ValueError("--contact_sheet needs --dataset, the images to draw on.")
        if self.num_pictures < 1:
            raise ValueError(f"--num_pictures must be at least 1, got {self.num_pictures}.")


def local_folder(label_set: str) -> Path:
    """The folder of a label set; one on the Hub is downloaded."""
    folder = Path(label_set).expanduser()
    return folder if folder.is_dir() else Path(snapshot_download(label_set, repo_type="dataset"))


def join(args: CheckArguments) -> tuple[TokenLabelDataset, LabelMapReader]:
    """Images with their label maps, joined as in training.

    Raises:
        ValueError: If keys or classes do not match.
    """
    labels = open_label_set(args.label_set, args.split)
    splits = open_splits(args.dataset, args.dataset_config_name, split=args.split)
    if args.split not in splits:
        raise ValueError(f"{args.dataset} has no split {args.split!r}; it has {list(splits)}.")
    images = splits[args.split]
    if args.max_samples is not None:
        images = images.select(range(min(args.max_samples, len(images))))
    check_columns(images, args.dataset, args.image_column, args.label_column)
    images = with_class_ids(images, args.dataset, args.label_column, class_names=label_class_names(labels))
    check_class_names(label_class_names(labels), images.features[args.label_column].names)
    joined = join_label_set(labels, images, args.image_column, args.key_column, args.key_pattern)
    if joined.images is not None:
        images = images.select(joined.images)
    samples = TokenLabelDataset(
        images, lambda image, *label_map: {}, args.image_column, args.label_column, label_maps=joined.label_maps
    )
    return samples, joined.label_maps


def agreement(samples: TokenLabelDataset, label_maps: LabelMapReader, num_classes: int) -> tuple[float, float]:
    """Share of maps whose first class is the human label, and share of maps that name it in any cell."""
    human = np.asarray(samples.labels(len(samples)))
    first = named = 0
    for start in tqdm(range(0, len(samples), ROWS_PER_BATCH), desc="Comparing with labels", unit="batch"):
        rows = range(start, min(start + ROWS_PER_BATCH, len(samples)))
        maps = label_maps.fetch(rows)
        wanted = human[rows.start : rows.stop]
        first += int((top_classes(maps.ids, maps.scores, num_classes) == wanted).sum())
        named += int((maps.ids == wanted.reshape(-1, 1, 1, 1)).any(axis=(1, 2, 3)).sum())
    return first / len(samples), named / len(samples)


def draw(args: CheckArguments, samples: TokenLabelDataset, label_maps: LabelMapReader, names: list[str]) -> None:
    """Draws maps over the part of their images that they cover."""
    rows = np.unique(np.linspace(0, len(samples) - 1, args.num_pictures).astype(int)).tolist()
    maps = label_maps.fetch(rows)
    images, human = [], samples.labels(len(samples))
    for offset, row in enumerate(rows):
        image = samples.read_image(row)
        region = covered_region(None if maps.boxes is None else maps.boxes[offset], *image.size)
        width, height = image.size
        box = [round(value) for value in np.multiply(region, [width, height, width, height])]
        images.append((image, image.crop(box).convert("RGB") if box != [0, 0, width, height] else image))
    pairs = [(maps.ids[offset], maps.scores[offset]) for offset in range(len(rows))]
    save_contact_sheet(Path(args.contact_sheet), images, pairs, [names[human[row]] for row in rows], names)


def check(args: CheckArguments) -> tuple[LabelSetReport, list[str]]:
    """The report and its lines."""
    report = check_label_set(local_folder(args.label_set), args.split)
    lines = report.lines()
    if args.dataset is None or report.problems:
        return report, lines
    try:
        samples, label_maps = join(args)
    except ValueError as error:
        report.add_problem(str(error))
        return report, [*lines, f"PROBLEM: {error}"]
    first, named = agreement(samples, label_maps, len(report.class_names))
    lines.append(f"all {len(samples):,} images that can be trained on have a label map")
    if first < 0.5:
        lines.append("WARNING: most maps have another first class than their image. Do ids mean the same classes?")
    lines.append(f"{100 * first:.1f} % of maps have the human label as their first class, {100 * named:.1f} % name it")
    if args.contact_sheet is not None:
        draw(args, samples, label_maps, samples.label_feature.names)
        lines.append(f"contact sheet -> {args.contact_sheet}")
    return report, lines


def main(arguments: list[str]) -> None:
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--label_set", *arguments]
    parser = HfArgumentParser(CheckArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        report, lines = check(args)
    except (ValueError, OSError) as error:
        sys.exit(f"check_token_labels.py: {error}")
    print("\n".join(lines))
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
