"""Annotates images: any image dataset, any image classifier, a label set that `lvvit train --token_labels` joins to them.

    lvvit annotate path/to/images --annotator timm/dm_nfnet_f6.dm_in1k --annotator_image_size 576 --output_dir labels

The program can be killed at any time and started again; the result is the same.
"""

import hashlib
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import PIL
import timm
import torch
import transformers
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..console import program, progress_bar
from ..data.class_labels import describe_classes, names_in_data, pair_classes
from ..data.class_matching import ClassMap
from ..data.image_keys import hash_keys, read_keys, repeated_keys
from ..data.images import PixelLimit, parse_image_size
from ..data.sources import dataset_fingerprint, open_splits
from ..data.splits import take_subset
from ..hub.repository import HubError
from ..labels.publishing import finish_label_set, open_label_set_target
from ..labels.storage import LabelSetLayout
from ..labels.writer import LabelSetWriter, default_rows_per_shard, package_versions
from ..launching import num_cpu_cores, set_up_cpu, start_missing_processes
from ..options import Program
from .agreement import compare_with_labels
from .annotator import Annotator, load_annotator
from .arguments import DEFAULT_COLUMN, AnnotateArguments
from .image_batches import ImageBatches, StreamedImageBatches
from .pipeline import Scorer, ShardBuilder, prepared_ahead


logger = logging.get_logger(__name__)
MODULE = "modeling_lvvit.annotators.annotate"
STREAMED_ROWS_PER_SHARD = 1024


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
        rows = take_subset(rows, args.max_train_samples, args.label_column_name)
    elif args.max_train_samples is not None:
        rows = rows.take(args.max_train_samples)
    if not args.streaming and not len(rows):
        raise ValueError(f"{args.dataset_name} has no rows in split {args.train_split}.")
    return rows


def match(args: AnnotateArguments, annotator: Annotator, rows) -> tuple[str, ...]:
    """Gives the annotator the classes of the data, and returns their names. `args.top_k` becomes their number where it is more.

    Raises:
        ValueError: If the classes of both do not match or cannot be compared.
    """
    names, column = annotator.class_names, args.label_column_name
    data_names, are_named = names_in_data(rows, args.dataset_name, column)
    if data_names is None and (column != DEFAULT_COLUMN or args.annotator_class_map is not None):
        raise ValueError(
            f"{args.dataset_name} has no column {column!r} to match classes with; it has {rows.column_names}."
        )
    if data_names is None:
        logger.warning(
            "%s has no column 'label': the labels get the annotator's %d classes.", args.dataset_name, len(names)
        )
        data_names = names
    else:
        choice = (
            args.annotator_class_map,
            args.annotator_ignore_extra_classes,
            f"Column {column!r} of {args.dataset_name}",
        )
        annotator.class_map, data_names = pair_classes(names, data_names, are_named, *choice)
    if args.top_k > len(data_names):
        logger.warning(
            "--top_k %d is more than the %d classes: every cell keeps all of them.", args.top_k, len(data_names)
        )
        args.top_k = len(data_names)
    groups = annotator.class_map or ClassMap(tuple((index,) for index in range(len(names))), len(names))
    annotator.provenance["class_map_sha256"] = hashlib.sha256(repr(groups.groups).encode()).hexdigest()
    return tuple(data_names)


def open_rows(args: AnnotateArguments, dataset) -> tuple[ImageBatches | StreamedImageBatches, dict[str, Any]]:
    """Rows in batches, and what the record says of the images.

    Raises:
        ValueError: If keys are missing or not unique.
    """
    path = Path(args.dataset_name).expanduser()
    about = {"dataset": path.resolve().name if path.exists() else args.dataset_name}
    about |= {"dataset_revision": args.dataset_revision, "dataset_config_name": args.dataset_config_name}
    if args.streaming:
        about |= {"dataset_state": dataset_fingerprint(args.dataset_name, args.dataset_revision)}
        per_shard = args.rows_per_shard or STREAMED_ROWS_PER_SHARD
        key_options = (args.key_column, args.number_rows)
        return StreamedImageBatches(dataset, args.image_column_name, *key_options, per_shard, args.batch_size), about
    keys = read_keys(dataset, args.image_column_name, args.key_column, args.number_rows)
    if duplicates := repeated_keys(keys):
        raise ValueError(
            f"Several images have the same key: {', '.join(map(repr, duplicates))}. Name a column that tells them apart "
            "with --key_column, or tell them apart by their row with --number_rows."
        )
    about |= {"num_rows": len(keys), "keys_sha256": hashlib.sha256(hash_keys(keys).tobytes()).hexdigest()}
    per_shard = args.rows_per_shard or default_rows_per_shard(len(keys))
    return ImageBatches(dataset, args.image_column_name, keys, per_shard, args.batch_size), about


def annotate(args: AnnotateArguments, accelerator: Accelerator) -> None:
    """Writes the shards of this process; the main process completes the set."""
    main = accelerator.is_main_process
    PixelLimit(args.max_image_pixels)
    dataset = open_images(args)
    image_size = parse_image_size(args.annotator_image_size, "`annotator_image_size`")
    source = (args.annotator_revision, args.annotator_trust_remote_code, args.random_weights)
    annotator = load_annotator(args.annotator, image_size, args.fit, accelerator.device, *source)
    class_names = match(args, annotator, dataset)
    layout = LabelSetLayout(class_names, args.top_k, tuple(annotator.dense.grid_size), args.score_type)
    rows, about = open_rows(args, dataset)
    # not --on_error: finished shards are the same whatever it says
    options = {"scores": args.scores, "batch_size": args.batch_size, "bf16": args.bf16}
    settings = {**about, **annotator.provenance, **options, "max_samples": args.max_train_samples}
    versions = package_versions(torch, transformers, timm, PIL)
    writer = LabelSetWriter(Path(args.output_dir), args.train_split, layout, settings, versions, rows.rows_per_shard)
    problem, target = [None], None
    if main:
        try:
            if args.push_to_hub:
                target = open_label_set_target(
                    args.hub_model_id, args.train_split, args.hub_private_repo, args.hub_revision
                )
            writer.begin()
        except (HubError, ValueError) as error:
            problem = [str(error)]
        except OSError as error:
            problem = [f"Nothing can be written: {error}"]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])
    column = args.label_column_name
    if main and not args.streaming and isinstance(dataset.features.get(column), datasets.ClassLabel):
        print(describe_classes(dataset, args.train_split, column), flush=True)
    try:
        write_shards(args, annotator, rows, writer, accelerator)
        accelerator.wait_for_everyone()
        if not main:
            return
        title = f"Token labels of {about['dataset']} ({args.train_split}) by {annotator.provenance['annotator']}"
        print("\n".join(finish_label_set(writer, rows.num_shards, title, target)))
    finally:
        writer.release()
    if not args.streaming:
        for line in compare_with_labels(writer.folder, dataset, args.dataset_name, args.train_split, column):
            print(line)


def write_shards(
    args: AnnotateArguments,
    annotator: Annotator,
    rows: ImageBatches | StreamedImageBatches,
    writer: LabelSetWriter,
    accelerator: Accelerator,
) -> None:
    """Annotates and writes every n-th of the shards that are not there yet, with a progress bar in the main process."""
    scorer = Scorer(annotator.score_map, writer.layout, args.scores, accelerator.device, accelerator.autocast)
    builder = ShardBuilder(scorer, writer.layout, keep_damaged=args.on_error == "empty")
    workers = args.num_workers or max(1, num_cpu_cores() // accelerator.num_processes)
    share = f", share of process 1 of {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    rank, number, total = accelerator.process_index, accelerator.num_processes, None
    if isinstance(rows, StreamedImageBatches):
        batches = rows.batches(lambda shard: shard % number == rank and not writer.is_written(shard))
    else:
        missing = [None]
        if accelerator.is_main_process:
            missing = [[shard for shard in range(rows.num_shards) if not writer.is_written(shard)]]
        broadcast_object_list(missing)  # all must share one list: shards that appear meanwhile would shift it
        shards = missing[0][rank::number]
        batches, total = rows.batches(shards), sum(rows.shard_size(shard) for shard in shards)
    progress = progress_bar(
        total=total, desc=f"Annotating{share}", unit="image", disable=not accelerator.is_main_process
    )
    with progress:
        for batch, images in prepared_ahead(batches, annotator.preprocessing, workers):
            table = builder.add(batch.keys, images, batch.is_last)
            progress.update(len(images))
            if table is not None:
                writer.write(batch.shard, table)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    if start_missing_processes(["--module", MODULE], arguments):
        return
    with PROGRAM.refusals(torch.OutOfMemoryError, of_all_processes=False):
        (args,) = PROGRAM.parse(arguments)
        # a process that has fewer shards waits for the others, however long
        waiting, precision = InitProcessGroupKwargs(timeout=timedelta(days=30)), "bf16" if args.bf16 else "no"
        is_cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=is_cpu, mixed_precision=precision, kwargs_handlers=[waiting])
        set_up_cpu(accelerator.device)
        annotate(args, accelerator)


if __name__ == "__main__":
    main(sys.argv[1:])
