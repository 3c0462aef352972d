"""Checks labels of training crops with their images, and draws the crops with their maps."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torchvision.transforms.v2.functional import to_pil_image

from ..data.image_keys import cut_keys, find_keys, read_keys
from ..labels.checks.agreement import compare_some
from ..labels.crops import CropRecord, join_crops, read_record
from ..labels.label_set import LabelSet
from ..labels.reader import LabelMapReader
from ..token_labeling import TrainTransform
from ..token_labeling.dataset import TokenLabelDataset
from . import save_contact_sheet


def check_crops(args: Any, labels: LabelSet, images: datasets.Dataset) -> list[str]:
    """Compares labels of crops with their images, and draws them if asked; returns lines for the user.

    Args:
        args: `CheckArguments`.

    Raises:
        ValueError: If images are missing, or other crops are drawn than have labels.
    """
    record = read_record(args.token_labels, args.token_labels_revision)
    images = images.select(_training_rows(args, labels, record, images))
    names = (args.image_column_name, args.key_column, args.key_pattern)
    label_maps = join_crops(labels, record, images, record.rows, *names)
    transform = TrainTransform.from_draw_options(record.drawn)
    columns = (args.image_column_name, args.label_column_name)
    samples = TokenLabelDataset(images, transform, *columns, label_maps=label_maps)
    classes = np.tile(samples.class_ids(), record.num_epochs)
    lines = [f"all {len(samples):,} images have a label map of their crop in each of {record.num_epochs:,} epochs"]
    agreement = compare_some(LabelMapReader(labels.rows), classes, len(classes))
    lines += [] if agreement is None else agreement.lines(labels.class_names)
    if args.contact_sheet is not None:
        draw_crops(Path(args.contact_sheet), samples, args.num_pictures)
        lines.append(f"contact sheet -> {args.contact_sheet}")
    return lines


def _training_rows(args: Any, labels: LabelSet, record: CropRecord, images: datasets.Dataset) -> np.ndarray:
    """Rows of the images that have labels, in the order of training."""
    if labels.knows_numbers_only:
        if len(images) != record.num_rows:
            raise ValueError(
                f"The label set knows {record.num_rows:,} images by their number among the training rows only, and there are {len(images):,} "
                "images. Give `max_train_samples` as annotated."
            )
        return np.arange(len(images))
    keys, image_keys = (
        labels.keys.slice(0, record.num_rows),
        read_keys(images, args.image_column_name, args.key_column),
    )
    if args.key_pattern is not None:
        keys, image_keys = (cut_keys(side, args.key_pattern) for side in (keys, image_keys))
    rows = find_keys(keys, image_keys)
    if (rows < 0).any():
        raise ValueError(
            f"{(rows < 0).sum():,} of {len(rows):,} keys of the label set belong to no image of {args.dataset_name}."
        )
    return rows


def draw_crops(path: Path, samples: TokenLabelDataset, count: int) -> None:
    """Draws images, and below each its crop with the map, from one epoch after another."""
    record, names = samples.label_maps.record, samples.label_feature.names
    rows = np.unique(np.linspace(0, len(samples) - 1, count).astype(int)).tolist()
    images, maps, human = [], [], samples.labels(len(samples))
    for number, row in enumerate(rows):
        samples.start_epoch(record.drawn["data_seed"], number % record.num_epochs)
        sample = samples[row]
        images.append((samples.read_image(row), to_pil_image(sample["pixel_values"])))
        ids = sample["token_label_palette"].numpy()[sample["token_label_index"].numpy()]
        maps.append((ids, sample["token_label_scores"].numpy()))
    save_contact_sheet(path, images, maps, [names[human[row]] for row in rows], names)
