"""The end of a label set: its card, and its way to the Hub."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from .hub import HubTarget
from .image_keys import MAX_NAMED
from .label_columns import SCORES_COLUMN
from .label_set_writer import CARD, DATA, RECORD, LabelSetWriter
from .label_sets import HASH_COLUMN, INDEX_COLUMN, KEY_COLUMN, PALETTE_COLUMN
from .whole_files import write_text


def finish_label_set(
    writer: LabelSetWriter, num_shards: int, template: Path, title: str, target: HubTarget | None
) -> Sequence[str]:
    """Completes a label set whose shards are all there, and uploads it if asked; returns lines for the user."""
    record = writer.finish(num_shards)
    write_card(writer, template, record, title, target)
    report = record["report"]
    lines = [
        f"{report['num_images']:,} label maps of {writer.layout.k} x {writer.layout.map_size[0]} x "
        f"{writer.layout.map_size[1]}, {report['bytes_per_image']:,.0f} bytes an image -> {writer.folder}"
    ]
    for note, about in report["notes"].items():
        lines.append(f"  {about['count']:,} x {note}: {', '.join(about['first'])}")
    if target is not None:
        lines.append(f"published: {push_label_set(writer.folder, target)}")
    return lines


def write_card(
    writer: LabelSetWriter, template: Path, record: dict[str, Any], title: str, target: HubTarget | None
) -> None:
    """Writes README.md: how the set was made and how to use it.

    Args:
        writer: The set.
        template: Card with the variables that this function fills.
        record: What `LabelSetWriter.finish` returned.
        title: What the set is called.
        target: Where it is published, for the example.
    """
    # Named in the card, local files would share one cache entry with those of any other folder of the same name: the
    # library (5.2) then identifies them by their pattern alone. It finds these splits by itwriter.
    configs = None
    if writer.split not in ("train", "validation", "test"):
        split = {"split": writer.split, "path": f"{DATA}/{writer.split}-*.parquet"}
        configs = [{"config_name": "default", "data_files": [split]}]
    data = DatasetCardData(
        configs=configs,
        tags=["token-labeling", "lvvit", "dense-labels"],
        task_categories=["image-classification"],
        size_categories=_size_category(record["report"]["num_images"]),
        pretty_name=title,
    )
    card = DatasetCard.from_template(
        data,
        template_path=str(template),
        title=title,
        name=target.repo_id if target is not None else "THIS_FOLDER",  # not its name: equal sets have equal cards
        **record,
        columns=[KEY_COLUMN, HASH_COLUMN, PALETTE_COLUMN, INDEX_COLUMN, SCORES_COLUMN],
        class_names=writer.layout.class_names[:MAX_NAMED],
    )
    write_text(writer.folder / CARD, str(card))


def _size_category(count: int) -> str:
    """The Hub's name for a number of rows, `1K<n<10K` for example."""
    limits = ((1_000, "1K"), (10_000, "10K"), (100_000, "100K"), (1_000_000, "1M"), (10_000_000, "10M"))
    for (low, low_name), (high, high_name) in pairwise(limits):
        if low <= count < high:
            return f"{low_name}<n<{high_name}"
    return f"n<{limits[0][1]}" if count < limits[0][0] else f"n>{limits[-1][1]}"


def push_label_set(folder: Path, target: HubTarget) -> str:
    """Uploads a finished label set and returns the address of the commit; shards of the same split that it does not have go.

    Raises:
        ValueError: If the folder holds no finished label set, or a damaged one.
        HubError: If the Hub cannot be reached or refuses.
    """
    check_finished(folder)
    splits = {path.name.rpartition("-")[0] for path in (folder / DATA).glob("*.parquet")}
    return target.upload(folder, "Upload label set", tuple(f"{DATA}/{split}-*.parquet" for split in sorted(splits)))


def check_finished(folder: Path) -> None:
    """Makes sure that a folder holds a label set that was written to its end.

    Raises:
        ValueError: If it does not; the message says what is missing.
    """
    record = folder / RECORD
    report = json.loads(record.read_text(encoding="utf-8")).get("report") if record.is_file() else None
    if report is None or not (folder / CARD).is_file():
        raise ValueError(f"{folder} is no finished label set: it needs {RECORD} with a report, and {CARD}.")
    try:
        found = sum(pq.read_metadata(path).num_rows for path in (folder / DATA).glob("*.parquet"))
    except pa.ArrowException as error:
        raise ValueError(f"A shard in {folder / DATA} is damaged: {error}") from error
    if found != report["num_images"]:
        raise ValueError(f"{folder} lacks shards: it has {found:,} rows, its record says {report['num_images']:,}.")
