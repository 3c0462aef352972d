"""What becomes a label set, and the processes that write it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..console import progress_bar
from ..data.files.shard_folder import package_versions
from ..data.loaders import num_preparing_workers
from ..hub.repository import HubError
from ..labels.publishing import finish_label_set, open_label_set_target
from ..labels.storage import LabelSetLayout
from ..labels.writer import LabelSetWriter
from .annotator import Annotator
from .arguments import AnnotateArguments
from .five_crop import SIDE, VIEWS, FiveCrop
from .image_batches import StreamedImageBatches
from .pipeline import Scorer, ShardBuilder
from .prefetch import prepared_ahead


@dataclass
class Annotation:
    """What becomes a label set.

    Args:
        annotator: Who makes the labels.
        score_map: From prepared pixels to its scores, see `Scorer`.
        class_names: Classes of the labels.
        rows: Rows in batches.
        prepare: Prepares the images of batches ahead, by so many workers: see `prepared_ahead`.
        about: What the record says of the images.
        title: Of the card.
        writer_class: What writes the shards.
        views: Shows the annotator several views of each image.
    """

    annotator: Annotator
    score_map: Callable[[torch.Tensor], torch.Tensor]
    class_names: tuple[str, ...]
    rows: Any
    prepare: Callable[[Iterable, int], Iterator]
    about: dict[str, Any]
    title: str
    writer_class: type[LabelSetWriter] = LabelSetWriter
    views: FiveCrop | None = None

    def of_five_crops(self, device: torch.device) -> "Annotation":
        """The same with `--five_crop`, for an annotator on a device."""
        views = FiveCrop(self.annotator, device)
        prepare, about = partial(prepared_ahead, preprocessing=views.prepare), {**self.about, "five_crop": SIDE}
        return replace(self, score_map=views.score_map, prepare=prepare, about=about, views=views)

    def writer(self, args: AnnotateArguments) -> LabelSetWriter:
        """The writer of the label set."""
        layout = LabelSetLayout(self.class_names, args.top_k, tuple(self.annotator.dense.grid_size), args.score_type)
        # not --on_error: finished shards are the same whatever it says
        options = {"scores": args.scores, "batch_size": args.batch_size, "bf16": args.bf16}
        settings = {**self.about, **self.annotator.provenance, **options, "max_samples": args.max_train_samples}
        versions = package_versions(torch, transformers, timm, PIL)
        folder, per_shard = Path(args.output_dir), self.rows.rows_per_shard
        return self.writer_class(folder, args.train_split, layout, settings, versions, per_shard)


def write_label_set(
    args: AnnotateArguments, annotation: Annotation, accelerator: Accelerator, note: str | None = None
) -> None:
    """Writes the shards of this process; the main process completes the set, and says `note` before the work.

    Raises:
        ValueError: If the output folder holds something else, or nothing can be written or uploaded.
    """
    main, writer = accelerator.is_main_process, annotation.writer(args)
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
    if main and note is not None:
        print(note, flush=True)
    try:
        write_shards(args, annotation, writer, accelerator)
        accelerator.wait_for_everyone()
        if main:
            print("\n".join(finish_label_set(writer, annotation.rows.num_shards, annotation.title, target)))
    finally:
        writer.release()


def write_shards(
    args: AnnotateArguments, annotation: Annotation, writer: LabelSetWriter, accelerator: Accelerator
) -> None:
    """Annotates and writes every n-th of the shards that are not there yet, with a progress bar in the main process."""
    rows, heads = annotation.rows, annotation.annotator.fold_heads
    scorer = Scorer(annotation.score_map, writer.layout, args.scores, accelerator.device, accelerator.autocast)
    choose_heads = None if heads is None else partial(heads.choose, passes=1 if annotation.views is None else VIEWS)
    builder = ShardBuilder(scorer, writer.layout, args.on_error == "empty", choose_heads)
    workers = num_preparing_workers(args.num_workers)
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
        for batch, images in annotation.prepare(batches, num_workers=workers):
            table = builder.add(batch.keys, images, batch.is_last)
            progress.update(len(images))
            if table is not None:
                writer.write(batch.shard, table)
    for part in (heads, annotation.views):
        if part is not None and accelerator.is_main_process:
            print(f"{part.describe()}{share}", flush=True)
