"""Checks a label set: counts, ranges, keys, how sharp its targets are, and whether it agrees with the human labels.

    lvvit check LABEL_SET
    lvvit check LABEL_SET IMAGES --contact_sheet labels.png

Ends with exit code 1 if anything is damaged or does not belong together. With the images the label maps are joined to their
images as in training, compared with the labels, and drawn over some of them (--contact_sheet).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.hf_argparser import HfArg

from ..annotators.arguments import AnnotateArguments
from ..console import program
from ..data.classes.class_labels import check_class_names, check_columns, with_class_ids
from ..data.classes.class_matching import shown_names
from ..data.classes.unlabeled import UNLABELED_HELP, add_unlabeled, without_labels
from ..data.images import MAX_PIXELS_HELP, PixelLimit
from ..data.sources import open_splits
from ..data.splits import take_subset
from ..labels.checks.agreement import compare, image_classes
from ..labels.checks.report import LabelSetReport, check_label_set
from ..labels.label_set import LabelSet
from ..labels.reader import LabelMapReader, covered_region, turn_with_images
from ..launching import name_options
from ..options import Program
from ..token_labeling.arguments import TokenLabelTrainingArguments
from ..token_labeling.dataset import TokenLabelDataset
from . import save_contact_sheet
from .check_crops import check_crops


@dataclass
class CheckArguments:
    """Options of the program."""

    token_labels: str | None = HfArg(
        default=None, help="Folder or Hub name of the label set.", aliases=["--label_set"]
    )
    token_labels_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    train_split: str = HfArg(default="train", help="Split to check.", aliases=["--split"])
    dataset_name: str | None = HfArg(default=None, help="Images that the labels were made for.", aliases=["--dataset"])
    unlabeled_dataset_name: str | None = HfArg(default=None, help=UNLABELED_HELP)
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    label_column_name: str = HfArg(default="label", help="Column of class ids or names.", aliases=["--label_column"])
    key_column: str | None = HfArg(default=None, help="Column of keys; default: paths or row numbers.")
    key_pattern: str | None = HfArg(default=None, help="Expression that cuts the key out of both sides.")
    max_train_samples: int | None = HfArg(
        default=None, help="Join a subset only, as annotated.", aliases=["--max_samples"]
    )
    contact_sheet: str | None = HfArg(default=None, help="PNG to draw; needs dataset_name.")
    num_pictures: int = HfArg(default=12, help="Images on it.")
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)

    def __post_init__(self):
        if self.contact_sheet is not None and self.dataset_name is None:
            raise ValueError("`contact_sheet` needs `dataset_name`, the images to draw on.")
        if self.num_pictures < 1:
            raise ValueError(f"`num_pictures` must be at least 1, got {self.num_pictures}.")


def local_folder(label_set: str, revision: str | None) -> Path:
    """The folder of a label set; one on the Hub is downloaded. A `FileNotFoundError` if there is neither."""
    folder = Path(label_set).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(label_set, repo_type="dataset", revision=revision))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise FileNotFoundError(
            f"{label_set} is neither a folder (seen from {Path.cwd()}) nor a label set that the Hub gives: {reason}"
        ) from error


def open_images(args: CheckArguments, labels: LabelSet) -> datasets.Dataset:
    """Images, with the classes of a label set.

    Raises:
        ValueError: If there is no such split, or the classes are others.
    """
    splits = open_splits(args.dataset_name, args.dataset_config_name, args.dataset_revision, split=args.train_split)
    if args.train_split not in splits:
        raise ValueError(f"{args.dataset_name} has no split {args.train_split!r}; it has {list(splits)}.")
    images, column = splits[args.train_split], args.label_column_name
    if column not in images.column_names and labels.class_names is not None:
        images = without_labels(images, column, labels.class_names)
    check_columns(images, args.dataset_name, args.image_column_name, column)
    columns = (args.image_column_name, column, args.train_split)
    images = add_unlabeled(images, args.unlabeled_dataset_name, *columns, [args.key_column])
    images = take_subset(images, args.max_train_samples, column)
    options = {"class_names": labels.class_names, "may_be_missing": True}
    images = with_class_ids(images, args.dataset_name, column, **options)
    check_class_names(labels.class_names, images.features[args.label_column_name].names)
    return images


def join(args: CheckArguments, labels: LabelSet) -> tuple[TokenLabelDataset, LabelMapReader]:
    """Images with their label maps, joined as in training.

    Raises:
        ValueError: If keys or classes do not match.
    """
    images = open_images(args, labels)
    joined = labels.join(images, args.image_column_name, args.key_column, args.key_pattern)
    if joined.images is not None:
        images = images.select(joined.images)
    samples = TokenLabelDataset(
        images,
        lambda image, *label_map: {},
        args.image_column_name,
        args.label_column_name,
        label_maps=joined.label_maps,
    )
    return samples, joined.label_maps


def draw(args: CheckArguments, samples: TokenLabelDataset, label_maps: LabelMapReader, names: list[str]) -> None:
    """Draws maps over the part of their images that they cover."""
    rows = np.unique(np.linspace(0, len(samples) - 1, args.num_pictures).astype(int)).tolist()
    maps = turn_with_images(label_maps.fetch(rows), samples.rows[rows][samples.image_column])
    images, human = [], samples.labels(len(samples))
    for offset, row in enumerate(rows):
        image = samples.read_image(row)
        region = covered_region(None if maps.boxes is None else maps.boxes[offset], *image.size)
        width, height = image.size
        box = [round(value) for value in np.multiply(region, [width, height, width, height])]
        images.append((image, image.crop(box).convert("RGB") if box != [0, 0, width, height] else image))
    pairs, names = list(zip(maps.ids, maps.scores)), shown_names(names)
    save_contact_sheet(
        Path(args.contact_sheet),
        images,
        pairs,
        [names[human[row]] if human[row] >= 0 else "no label" for row in rows],
        names,
    )


def check(args: CheckArguments) -> tuple[LabelSetReport, list[str]]:
    """The report and its lines."""
    report = check_label_set(local_folder(args.token_labels, args.token_labels_revision), args.train_split)
    lines = report.lines()
    if args.dataset_name is None or report.problems:
        return report, lines
    try:
        labels = LabelSet.open(args.token_labels, args.train_split, args.token_labels_revision)
        if labels.is_of_crops:
            return report, [*lines, *check_crops(args, labels, open_images(args, labels))]
        samples, label_maps = join(args, labels)
    except ValueError as error:
        report.add_problem(str(error))
        return report, [*lines, f"PROBLEM: {error}"]
    labels = samples.class_ids()
    labeled = np.flatnonzero(labels >= 0)
    lines.append(f"all {len(samples):,} images that can be trained on have a label map")
    if len(labeled):
        of = "maps" if len(labeled) == len(samples) else f"the {len(labeled):,} maps of images with a human label"
        lines += compare(label_maps.select(labeled), labels[labeled]).lines(samples.label_feature.names, of)
    if len(labeled) < len(samples):
        unlabeled = np.flatnonzero(labels < 0)
        confidence = image_classes(label_maps.select(unlabeled), samples.label_feature.num_classes)[1]
        quarter, median, most = np.quantile(confidence, (0.25, 0.5, 0.75))
        lines.append(
            f"{len(unlabeled):,} images have no human label; probability of the class that their map gives them: median {median:.2f}, half of "
            f"them from {quarter:.2f} to {most:.2f}"
        )
    if args.contact_sheet is not None:
        draw(args, samples, label_maps, samples.label_feature.names)
        lines.append(f"contact sheet -> {args.contact_sheet}")
    return report, lines


PROGRAM = Program(
    "lvvit check", __doc__, (CheckArguments,), ("token_labels", "dataset_name"), required=("token_labels",)
)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        PixelLimit(args.max_image_pixels)
        report, lines = check(args)
    # options of this program and of those that annotate and train
    programs = (CheckArguments, AnnotateArguments, TokenLabelTrainingArguments)
    print(name_options("\n".join(lines), *programs))
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
