"""Annotates images: any image dataset, any image classifier, a label set that `train_tl.py --token_labels` joins to them.

accelerate launch dataset_scripts/annotate.py --dataset path/to/images --annotator timm/dm_nfnet_f6.dm_in1k \
    --image_size 576 --output_dir labels

The program can be killed at any time and started again; the result is the same. See --help for all options.
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from ..data.class_labels import names_in_data, pair_classes
from ..data.class_matching import ClassMap
from ..data.image_keys import hash_keys, read_keys, repeated_keys
from ..data.images import parse_image_size
from ..data.sources import dataset_fingerprint, open_splits
from ..hub.repository import HubError
from ..labels.publishing import finish_label_set, open_label_set_target
from ..labels.storage import LabelSetLayout
from ..labels.writer import LabelSetWriter, default_rows_per_shard, package_versions
from ..launching import is_main_process, name_options, num_cpu_cores, set_up_cpu, start_missing_processes
from .annotator import Annotator, load_annotator
from .image_batches import ImageBatches, StreamedImageBatches
from .pipeline import Scorer, ShardBuilder, prepared_ahead


logger = logging.get_logger(__name__)
MODULE = "modeling_lvvit.annotators.annotate"
STREAMED_ROWS_PER_SHARD = 1024


@dataclass
class AnnotateArguments:
    """Options of the program."""

    dataset: str = field(metadata={"help": "Images: Hub name, image folder, Parquet file or folder of them."})
    annotator: str = field(metadata={"help": "Classifier: Hub name or folder of transformers, or timm/NAME."})
    output_dir: str = field(metadata={"help": "Folder of the label set; an unfinished one is continued."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    split: str = field(default="train", metadata={"help": "Split to annotate."})
    streaming: bool = field(default=False, metadata={"help": "Read images one after another without preparing all."})
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column whose classes the labels shall have; default: label, if there is one."}
    )
    key_column: str | None = field(default=None, metadata={"help": "Column that tells images apart; default: paths."})
    number_rows: bool = field(default=False, metadata={"help": "Tell images apart by their row number."})
    max_samples: int | None = field(default=None, metadata={"help": "Annotate the first images only."})
    annotator_revision: str | None = field(default=None, metadata={"help": "Revision on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow code of a Hub repository to run."})
    random_weights: bool = field(default=False, metadata={"help": "Architecture without weights; to try things out."})
    image_size: list[int] | None = field(default=None, metadata={"help": "Its input: side, or height and width."})
    fit: str = field(
        default="squash",
        metadata={"help": "How images get its shape (see README).", "choices": ["squash", "pad", "center_crop"]},
    )
    top_k: int = field(default=5, metadata={"help": "Classes kept for each cell."})
    scores: str = field(
        default="logits",
        metadata={
            "help": "Logits as they are, or relative to the classes left out.",
            "choices": ["logits", "relative"],
        },
    )
    score_type: str = field(
        default="float16",
        metadata={"help": "float16 is lossless; int8 rounds scores to quarters.", "choices": ["float16", "int8"]},
    )
    class_map: str | None = field(
        default=None, metadata={"help": "File that pairs classes (JSON, CSV), or: identity."}
    )
    ignore_extra_classes: bool = field(default=False, metadata={"help": "Drop annotator classes the data lacks."})
    batch_size: int = field(default=32, metadata={"help": "Images a forward pass."})
    num_workers: int | None = field(default=None, metadata={"help": "Threads that read and resize images."})
    bf16: bool = field(default=False, metadata={"help": "Run the annotator in bfloat16."})
    on_error: str = field(
        default="stop",
        metadata={"help": "Damaged image: stop, or an empty label.", "choices": ["stop", "empty"]},
    )
    rows_per_shard: int | None = field(default=None, metadata={"help": "Rows of a Parquet file."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub name to upload the finished set to."})
    private: bool | None = field(default=None, metadata={"help": "Whether that repository, if it is new, is private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch of it, made if there is none."})

    def __post_init__(self):
        for name in ("top_k", "batch_size", "max_samples", "num_workers", "rows_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        parse_image_size(self.image_size, "--image_size")


def open_images(args: AnnotateArguments) -> datasets.Dataset | datasets.IterableDataset:
    """The rows to annotate.

    Raises:
        FileNotFoundError, ValueError: If there is no such dataset, split or column.
    """
    revision = args.dataset_revision
    if args.streaming and not Path(args.dataset).expanduser().exists():
        revision = dataset_fingerprint(args.dataset, revision)  # what is read must not move while it is read
    splits = open_splits(args.dataset, args.dataset_config_name, revision, args.streaming, args.split)
    if args.split not in splits:
        raise ValueError(f"{args.dataset} has no split {args.split!r}; it has {list(splits)}.")
    rows = splits[args.split]
    if rows.column_names is not None and args.image_column not in rows.column_names:
        raise ValueError(
            f"{args.dataset} has no column {args.image_column!r}; it has {rows.column_names}. Name it with --image_column."
        )
    if args.max_samples is not None:
        rows = rows.take(args.max_samples) if args.streaming else rows.select(range(min(args.max_samples, len(rows))))
    if not args.streaming and not len(rows):
        raise ValueError(f"{args.dataset} has no rows in split {args.split}.")
    return rows


def match(args: AnnotateArguments, annotator: Annotator, rows) -> tuple[str, ...]:
    """Gives the annotator the classes of the data, and returns their names.

    Raises:
        ValueError: If the classes of both do not match, cannot be compared, or are fewer than --top_k.
    """
    names, column = annotator.class_names, args.label_column or "label"
    data_names, are_named = names_in_data(rows, args.dataset, column)
    if data_names is None and (args.label_column is not None or args.class_map is not None):
        raise ValueError(f"{args.dataset} has no column {column!r} to match classes with; it has {rows.column_names}.")
    if data_names is None:
        logger.warning(
            "%s has no column 'label': the labels get the annotator's %d classes.", args.dataset, len(names)
        )
        data_names = names
    else:
        choice = (args.class_map, args.ignore_extra_classes)
        annotator.class_map, data_names = pair_classes(
            names, data_names, are_named, *choice, f"Column {column!r} of {args.dataset}"
        )
    if args.top_k > len(data_names):
        raise ValueError(f"--top_k {args.top_k} is more than the {len(data_names)} classes.")
    groups = annotator.class_map or ClassMap(tuple((index,) for index in range(len(names))), len(names))
    annotator.provenance["class_map_sha256"] = hashlib.sha256(repr(groups.groups).encode()).hexdigest()
    return tuple(data_names)


def open_rows(args: AnnotateArguments, dataset) -> tuple[ImageBatches | StreamedImageBatches, dict[str, Any]]:
    """Rows in batches, and what the record says of the images.

    Raises:
        ValueError: If keys are missing or not unique.
    """
    path = Path(args.dataset).expanduser()
    about = {"dataset": path.resolve().name if path.exists() else args.dataset}
    about |= {"dataset_revision": args.dataset_revision, "dataset_config_name": args.dataset_config_name}
    if args.streaming:
        about |= {"dataset_state": dataset_fingerprint(args.dataset, args.dataset_revision)}
        per_shard = args.rows_per_shard or STREAMED_ROWS_PER_SHARD
        return (
            StreamedImageBatches(
                dataset, args.image_column, args.key_column, args.number_rows, per_shard, args.batch_size
            ),
            about,
        )
    keys = read_keys(dataset, args.image_column, args.key_column, args.number_rows)
    if duplicates := repeated_keys(keys):
        raise ValueError(
            f"Several images have the same key: {', '.join(map(repr, duplicates))}. Name a column that tells them apart "
            "with --key_column, or tell them apart by their row with --number_rows."
        )
    about |= {"num_rows": len(keys), "keys_sha256": hashlib.sha256(hash_keys(keys).tobytes()).hexdigest()}
    per_shard = args.rows_per_shard or default_rows_per_shard(len(keys))
    return ImageBatches(dataset, args.image_column, keys, per_shard, args.batch_size), about


def my_batches(
    rows: ImageBatches | StreamedImageBatches, writer: LabelSetWriter, accelerator: Accelerator
) -> tuple[Iterator, int | None]:
    """Batches of the shards that this process writes, every n-th of those that are not there yet, and how many rows they
    have (`None` in a stream)."""
    if isinstance(rows, StreamedImageBatches):
        rank, number = accelerator.process_index, accelerator.num_processes
        return rows.batches(lambda shard: shard % number == rank and not writer.is_written(shard)), None
    missing = [None]
    if accelerator.is_main_process:
        missing = [[shard for shard in range(rows.num_shards) if not writer.is_written(shard)]]
    broadcast_object_list(missing)  # all must share one list: shards that appear meanwhile would shift it
    mine = missing[0][accelerator.process_index :: accelerator.num_processes]
    return rows.batches(mine), sum(rows.shard_size(shard) for shard in mine)


def annotate(args: AnnotateArguments, accelerator: Accelerator) -> None:
    """Writes the shards of this process; the main process completes the set."""
    main = accelerator.is_main_process
    dataset = open_images(args)
    image_size = parse_image_size(args.image_size, "--image_size")
    annotator = load_annotator(
        args.annotator, image_size, args.fit, accelerator.device, args.annotator_revision, args.trust_remote_code,
        args.random_weights,
    )  # fmt: skip
    layout = LabelSetLayout(
        match(args, annotator, dataset),
        args.top_k, tuple(annotator.dense.grid_size), args.score_type,
    )  # fmt: skip
    rows, about = open_rows(args, dataset)
    # not --on_error: finished shards are the same whatever it says
    options = {"scores": args.scores, "batch_size": args.batch_size, "bf16": args.bf16}
    settings = {**about, **annotator.provenance, **options, "max_samples": args.max_samples}
    versions = package_versions(torch, transformers, timm, PIL)
    writer = LabelSetWriter(Path(args.output_dir), args.split, layout, settings, versions, rows.rows_per_shard)
    problem, target = [None], None
    if main:
        try:
            if args.push_to_hub is not None:
                target = open_label_set_target(args.push_to_hub, args.split, args.private, args.hub_revision)
            writer.begin()
        except HubError as error:
            problem = [str(error)]
        except (ValueError, OSError) as error:
            problem = [f"Nothing can be written: {error}" if isinstance(error, OSError) else str(error)]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise ValueError(problem[0])
    try:
        write_shards(args, annotator, rows, writer, accelerator)
        accelerator.wait_for_everyone()
        if not main:
            return
        title = f"Token labels of {about['dataset']} ({args.split}) by {annotator.provenance['annotator']}"
        lines = finish_label_set(writer, rows.num_shards, title, target)
        print("\n".join(lines))
    finally:
        writer.release()


def write_shards(
    args: AnnotateArguments,
    annotator: Annotator,
    rows: ImageBatches | StreamedImageBatches,
    writer: LabelSetWriter,
    accelerator: Accelerator,
) -> None:
    """Annotates and writes the shards of this process, with a progress bar in the main one."""
    scorer = Scorer(annotator.score_map, writer.layout, args.scores, accelerator.device, accelerator.autocast)
    builder = ShardBuilder(scorer, writer.layout, keep_damaged=args.on_error == "empty")
    workers = args.num_workers or max(1, num_cpu_cores() // accelerator.num_processes)
    share = f", share of process 1 of {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    batches, total = my_batches(rows, writer, accelerator)
    progress = tqdm(total=total, desc=f"Annotating{share}", unit="image", disable=not accelerator.is_main_process)
    with progress:
        for batch, images in prepared_ahead(batches, annotator.preprocessing, workers):
            table = builder.add(batch.keys, images, batch.is_last)
            progress.update(len(images))
            if table is not None:
                writer.write(batch.shard, table)


def main(arguments: list[str]) -> None:
    if start_missing_processes(["--module", MODULE], arguments):
        return
    parser = HfArgumentParser(AnnotateArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        # a process that has fewer shards waits for the others, however long
        waiting = InitProcessGroupKwargs(timeout=timedelta(days=30))
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if args.bf16 else "no",
            kwargs_handlers=[waiting],
        )
        set_up_cpu(accelerator.device)
        annotate(args, accelerator)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        name = "annotate.py" if is_main_process() else "annotate.py (another process)"
        sys.exit(f"{name}: {name_options(error, AnnotateArguments)}")


if __name__ == "__main__":
    main(sys.argv[1:])
