"""The end of a label set: its card, and its way to the Hub."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from ..data.files.atomic_files import write_text
from ..data.files.digests import DIGESTS
from ..data.image_keys import MAX_NAMED
from ..hub.file_checks import CARD, check_digests, matches
from ..hub.folders import CARD_TEMPLATES
from ..hub.repository import HubTarget
from .packing import is_worth_packing
from .writer import DATA, RECORD, LabelSetWriter


FEW_IMAGES = 50_000  # up to which the preset is made for
OPTIONS_FOR_FEW, OPTIONS_FOR_MANY = "--preset own_images --variant auto", "--variant lvvit_s_224"


def finish_label_set(writer: LabelSetWriter, num_shards: int, title: str, target: HubTarget | None) -> Sequence[str]:
    """Completes a label set whose shards are all there, and uploads it if asked; returns lines for the user."""
    record = writer.finish(num_shards)
    write_card(writer, record, title)
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


def write_card(writer: LabelSetWriter, record: dict[str, Any], title: str) -> None:
    """Writes README.md, with the record that `LabelSetWriter.finish` returned: how the set was made and how to use it."""
    # Named in the card, local files would share one cache entry with those of any other folder of the same name: the
    # library (5.2) then identifies them by their pattern alone. It finds these splits by itself.
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
        template_path=str(CARD_TEMPLATES / "label_set.md"),
        title=title,
        **record,
        is_packed=is_worth_packing(writer.layout.k, len(writer.layout.class_names)),
        dataset_name=shlex.quote(record["settings"].get("dataset") or "IMAGES"),
        model_options=OPTIONS_FOR_FEW if record["report"]["num_images"] < FEW_IMAGES else OPTIONS_FOR_MANY,
        class_names=writer.layout.class_names[:MAX_NAMED],
    )
    write_text(writer.folder / CARD, str(card))


def _size_category(count: int) -> str:
    """The Hub's name for a number of rows, `1K<n<10K` for example."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B")
    digits = max(len(str(count)) - 3, 0)  # beyond three
    return f"{names[digits - 1]}<n<{names[digits]}" if digits else f"n<{names[0]}"


def push_label_set(folder: Path, target: HubTarget) -> str:
    """Uploads a finished label set (see `check_finished`) and returns the address of the commit; shards of the same split that it
    does not have go.

    Raises:
        ValueError: If a file is damaged, or the repository holds another split.
        HubError: If the Hub cannot be reached or refuses.
    """
    split = json.loads((folder / RECORD).read_text(encoding="utf-8"))["settings"]["split"]
    _check_splits(target, split)
    return target.upload(folder, "Upload label set", (f"{DATA}/{split}-*.parquet", DIGESTS))


def open_label_set_target(repo_id: str, split: str, private: bool | None, revision: str | None) -> HubTarget:
    """Where a label set will be published (see `HubTarget`), opened before the long work.

    Raises:
        HubError: If the Hub cannot be reached or refuses.
        ValueError: If the repository holds another split.
    """
    target = HubTarget(repo_id, "dataset", private, revision).open()
    _check_splits(target, split)
    return target


def _check_splits(target: HubTarget, split: str) -> None:
    for name in target.files():
        if matches(name, (f"{DATA}/*.parquet",)) and not matches(name, (f"{DATA}/{split}-*.parquet",)):
            raise ValueError(
                f"{target.repo_id} holds {name}, of another split: its card and record speak of one set only. Publish the split "
                f"{split!r} under another name."
            )


def check_finished(folder: Path) -> None:
    """Raises a `ValueError` that says what is missing or damaged if a folder holds no label set that was written to its end."""
    record = folder / RECORD
    try:
        report = json.loads(record.read_text(encoding="utf-8")).get("report") if record.is_file() else None
    except ValueError as error:
        raise ValueError(f"{record} is damaged: {error}. Make the set again or take it from a copy.") from error
    if report is None or not (folder / CARD).is_file():
        raise ValueError(f"{folder} is no finished label set: it needs {RECORD} with a report, and {CARD}.")
    check_digests(folder)
    num_rows = 0
    for path in (folder / DATA).glob("*.parquet"):
        try:
            num_rows += pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}. The command that made the set makes it again.") from error
    if num_rows != report["num_images"]:
        raise ValueError(f"{folder} lacks shards: it has {num_rows:,} rows, its record says {report['num_images']:,}.")
