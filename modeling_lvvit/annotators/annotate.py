"""Annotates images: any image dataset, any image classifier or image-text model, a label set that `lvvit train --token_labels` joins to them.

    lvvit annotate path/to/images --annotator timm/dm_nfnet_f6.dm_in1k --annotator_image_size 576 --output_dir labels

The program can be killed at any time and started again; the result is the same.
"""

import hashlib
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from transformers.utils import logging

from ..console import program
from ..data.classes.class_labels import describe_classes, names_in_data, pair_classes
from ..data.classes.class_matching import ClassMap
from ..data.classes.unlabeled import add_unlabeled
from ..data.files.shard_folder import default_rows_per_shard
from ..data.images import PixelLimit, parse_image_size
from ..data.sources import dataset_fingerprint, open_splits, short_name
from ..data.splits import take_subset
from ..labels.checks.agreement import compare_with_labels
from ..launching import set_up_cpu, start_missing_processes
from ..options import Program
from .annotation import Annotation, write_label_set
from .annotator import Annotator, load_annotator
from .arguments import DEFAULT_COLUMN, FEW_CLASSES, TOP_K, AnnotateArguments
from .image_batches import ImageBatches, StreamedImageBatches, distinct_keys
from .prefetch import prepared_ahead
from .text.prompts import TEXT_PREFIX


logger = logging.get_logger(__name__)
MODULE = "modeling_lvvit.annotators.annotate"
STREAMED_ROWS_PER_SHARD = 1024
WAITING = timedelta(days=30)


PROGRAM = Program(
    "lvvit annotate",
    __doc__,
    (AnnotateArguments,),
    ("dataset_name",),
    required=("dataset_name", "annotator", "output_dir"),
)


def open_images(args: AnnotateArguments) -> datasets.Dataset | datasets.IterableDataset:
    """The rows to annotate.

    Raises:
        FileNotFoundError, ValueError: If there is no such dataset, split or column.
    """
    revision = args.dataset_revision
    if args.streaming and not Path(args.dataset_name).expanduser().exists():
        revision = dataset_fingerprint(args.dataset_name, revision)  # what is read must not move while it is read
    splits = open_splits(args.dataset_name, args.dataset_config_name, revision, args.streaming, args.train_split)
    if args.train_split not in splits:
        raise ValueError(f"{args.dataset_name} has no split {args.train_split!r}; it has {list(splits)}.")
    rows = splits[args.train_split]
    if rows.column_names is not None and args.image_column_name not in rows.column_names:
        raise ValueError(
            f"{args.dataset_name} has no column {args.image_column_name!r}; it has {rows.column_names}. Name it with --image_column."
        )
    if not args.streaming:
        columns = (args.image_column_name, args.label_column_name, args.train_split)
        rows = add_unlabeled(rows, args.unlabeled_dataset_name, *columns, [args.key_column])
        rows = take_subset(rows, args.max_train_samples, args.label_column_name)
    elif args.max_train_samples is not None:
        rows = rows.take(args.max_train_samples)
    if not args.streaming and not len(rows):
        raise ValueError(f"{args.dataset_name} has no rows in split {args.train_split}.")
    return rows


def open_annotator(args: AnnotateArguments, rows, device: torch.device) -> tuple[Annotator, tuple[str, ...]]:
    """The annotator with the classes of the data, and their names. `args.top_k` gets its default, and becomes their number where it is more.

    Raises:
        ValueError: If it cannot be loaded, or the classes of both do not match or cannot be compared.
    """
    column = args.label_column_name
    data_names, are_named = names_in_data(rows, args.dataset_name, column)
    if data_names is None and (column != DEFAULT_COLUMN or args.annotator_class_map is not None):
        raise ValueError(
            f"{args.dataset_name} has no column {column!r} to match classes with; it has {rows.column_names}."
        )
    annotator = load_annotator(
        args.annotator,
        parse_image_size(args.annotator_image_size, "`annotator_image_size`"),
        args.fit,
        device,
        args.annotator_revision,
        args.annotator_trust_remote_code,
        args.random_weights,
        class_names=data_names,
        prompts=args.prompts,
    )
    names = annotator.class_names
    if data_names is None:
        logger.warning(
            "%s has no column 'label': the labels get the annotator's %d classes.", args.dataset_name, len(names)
        )
        data_names = names
    elif not args.annotator.startswith(TEXT_PREFIX):  # which has the classes of the data
        choice = (
            args.annotator_class_map,
            args.annotator_ignore_extra_classes,
            f"Column {column!r} of {args.dataset_name}",
        )
        annotator.class_map, data_names = pair_classes(names, data_names, are_named, *choice)
    record_classes(args, annotator, len(data_names))
    return annotator, tuple(data_names)


def record_classes(args: AnnotateArguments, annotator: Annotator, num_classes: int) -> None:
    """Adds to the annotator's provenance how its classes were paired; `args.top_k` gets its default, and becomes the number of classes where it
    is more."""
    if args.top_k is None:
        args.top_k = num_classes if num_classes <= FEW_CLASSES else TOP_K
    elif args.top_k > num_classes:
        logger.warning(
            "--top_k %d is more than the %d classes: every cell keeps all of them.", args.top_k, num_classes
        )
        args.top_k = num_classes
    groups = annotator.class_map or ClassMap(tuple((index,) for index in range(num_classes)), num_classes)
    annotator.provenance["class_map_sha256"] = hashlib.sha256(repr(groups.groups).encode()).hexdigest()


def about_dataset(args: Any) -> dict[str, Any]:
    """What the record says of the data that options name."""
    path = Path(args.dataset_name).expanduser()
    about = {
        "dataset": path.resolve().name if path.exists() else args.dataset_name,
        "dataset_revision": args.dataset_revision,
        "dataset_config_name": args.dataset_config_name,
    }
    if args.unlabeled_dataset_name is not None:
        about["unlabeled_dataset"] = short_name(args.unlabeled_dataset_name)
    return about


def open_rows(args: AnnotateArguments, dataset) -> tuple[ImageBatches | StreamedImageBatches, dict[str, Any]]:
    """Rows in batches, and what the record says of the images.

    Raises:
        ValueError: If keys are missing or not unique.
    """
    about = about_dataset(args)
    if args.streaming:
        about |= {"dataset_state": dataset_fingerprint(args.dataset_name, args.dataset_revision)}
        per_shard = args.rows_per_shard or STREAMED_ROWS_PER_SHARD
        key_options = (args.key_column, args.number_rows)
        return StreamedImageBatches(dataset, args.image_column_name, *key_options, per_shard, args.batch_size), about
    keys, about_keys = distinct_keys(dataset, args.image_column_name, args.key_column, args.number_rows)
    about |= about_keys
    per_shard = args.rows_per_shard or default_rows_per_shard(len(keys))
    return ImageBatches(dataset, args.image_column_name, keys, per_shard, args.batch_size), about


def annotate(args: AnnotateArguments, accelerator: Accelerator) -> None:
    """Writes the shards of this process; the main process completes the set."""
    PixelLimit(args.max_image_pixels)
    dataset = open_images(args)
    annotator, class_names = open_annotator(args, dataset, accelerator.device)
    rows, about = open_rows(args, dataset)
    column, note = args.label_column_name, None
    if not args.streaming and isinstance(dataset.features.get(column), datasets.ClassLabel):
        note = describe_classes(dataset, args.train_split, column)
    title = f"Token labels of {about['dataset']} ({args.train_split}) by {annotator.provenance['annotator']}"
    about |= {
        "decoding": "reduced"
    }  # sets of versions that decoded in full are not continued: of large images they differ
    prepare = partial(prepared_ahead, preprocessing=annotator.preprocessing)
    annotation = Annotation(annotator, annotator.score_map, class_names, rows, prepare, about, title)
    if args.five_crop:
        annotation = annotation.of_five_crops(accelerator.device)
    write_label_set(args, annotation, accelerator, note)
    if accelerator.is_main_process and not args.streaming:
        for line in compare_with_labels(Path(args.output_dir), dataset, args.dataset_name, args.train_split, column):
            print(line)


def run(args: AnnotateArguments, accelerated: Callable[[AnnotateArguments, Accelerator], None] = annotate) -> None:
    """Sets up the processes of the program, and calls in each of them what annotates."""
    # a process that has fewer shards waits for the others, however long
    waiting, precision = InitProcessGroupKwargs(timeout=WAITING), "bf16" if args.bf16 else "no"
    is_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=is_cpu, mixed_precision=precision, kwargs_handlers=[waiting])
    set_up_cpu(accelerator.device)
    accelerated(args, accelerator)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    if start_missing_processes(["--module", MODULE], arguments):
        return
    with PROGRAM.refusals(torch.OutOfMemoryError, of_all_processes=False):
        (args,) = PROGRAM.parse(arguments)
        run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
