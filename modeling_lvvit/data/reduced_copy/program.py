"""Writes a copy of an image dataset with smaller images: training on large photographs then decodes small files.

    lvvit cache path/to/photographs --max_side 512 --output_dir small
    lvvit train --dataset_name small --output_dir runs/mine

The copy has the same splits, rows and columns. The program can be killed at any time and started again; the result is the same.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import PIL
import pyarrow as pa
import torch
from PIL import features
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ...console import program, progress_bar
from ...launching import num_cpu_cores, start_worker
from ...options import Program
from ..files.shard_folder import default_rows_per_shard, package_versions
from ..image_dataset import MAX_REPORTED_PROBLEMS, check_has_columns, with_image_column
from ..images import MAX_PIXELS_HELP, MAX_VALUE, ROTATED, PixelLimit, SampleError, decode_image, read_content
from ..sources import open_splits, short_name
from .reduce import CopyFacts, ReducedRows, Reduction, local_prefix
from .writer import CopyWriter, Shard, rows_digest


logger = logging.get_logger(__name__)


@dataclass
class CacheArguments:
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {"dataset_name": "images", "max_side": "copy"}

    dataset_name: str | None = HfArg(
        default=None, help="Images: Hub name, image folder, Parquet file or folder of them.", aliases=["--dataset"]
    )
    dataset_config_name: str | None = HfArg(default=None, help="Configuration on the Hub.")
    dataset_revision: str | None = HfArg(default=None, help="Revision on the Hub.")
    image_column_name: str = HfArg(default="image", help="Column of images.", aliases=["--image_column"])
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    max_side: int = HfArg(
        default=512,
        help="Longer side of the copied images in pixels, about twice the input of the model; smaller images are copied byte for byte.",
    )
    quality: int = HfArg(default=90, help="Quality of the JPEG files, 1 to 100.")
    output_dir: str | None = HfArg(default=None, help="Folder of the copy; an unfinished one is continued.")
    rows_per_shard: int | None = HfArg(default=None, help="Rows of a Parquet file.")
    num_workers: int | None = HfArg(
        default=None, help="Processes that make images smaller; default: one for each core."
    )

    def __post_init__(self):
        for name in ("max_side", "rows_per_shard", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality must lie in 1 to 100, got {self.quality}.")


PROGRAM = Program(
    "lvvit cache", __doc__, (CacheArguments,), ("dataset_name",), required=("dataset_name", "output_dir")
)


def open_source(args: CacheArguments) -> dict[str, datasets.Dataset]:
    """All splits of the dataset.

    Raises:
        FileNotFoundError, ValueError: If there is no such dataset or column, or it has masks.
    """
    source, output = (Path(name).expanduser().resolve() for name in (args.dataset_name, args.output_dir))
    if source.is_dir() and output.is_relative_to(source):
        raise ValueError(
            f"{args.output_dir} lies in {args.dataset_name}, and would be read with it. Choose another folder."
        )
    splits = {}
    for split, rows in open_splits(args.dataset_name, args.dataset_config_name, args.dataset_revision).items():
        if not len(rows):
            logger.warning("Split %s of %s has no rows and is left out.", split, args.dataset_name)
            continue
        check_has_columns(rows, [args.image_column_name], f"{args.dataset_name} ({split})")
        rows = splits[split] = with_image_column(rows, args.image_column_name)
        others = [
            name for name in rows.features if name != args.image_column_name and _holds_images(rows.features[name])
        ]
        if others:
            raise ValueError(
                f"{args.dataset_name} has more columns of images: {', '.join(others)}. Masks must have the size of their images, and their "
                "values do not survive JPEG: data with masks is not copied. Leave these columns out of the data, or train on it as it is."
            )
    return splits


def _holds_images(feature: Any) -> bool:
    """Whether a column is one of images, or of lists of them and the like."""
    if isinstance(feature, (dict, list)):
        return any(map(_holds_images, feature.values() if isinstance(feature, dict) else feature))
    return isinstance(feature, datasets.Image) or _holds_images(getattr(feature, "feature", []))


def open_writer(args: CacheArguments, source: ReducedRows) -> CopyWriter:
    """The writer of the copy, with the settings on which it depends."""
    about = {
        split: {
            "num_rows": len(rows),
            "rows_per_shard": args.rows_per_shard or default_rows_per_shard(len(rows)),
            "rows_sha256": rows_digest(rows, source),
        }
        for split, rows in source.splits.items()
    }
    path = Path(args.dataset_name).expanduser()
    settings = {
        "dataset": short_name(str(path.resolve())) if path.exists() else args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "dataset_revision": args.dataset_revision,
        "image_column": args.image_column_name,
        "max_side": args.max_side,
        "quality": args.quality,
        "splits": about,
    }
    versions = {**package_versions(PIL), "libjpeg": features.version("libjpeg_turbo") or features.version("jpg")}
    return CopyWriter(Path(args.output_dir), settings, versions)


def reduced_blocks(
    source: ReducedRows, shards: Sequence[Shard], num_workers: int
) -> Iterator[tuple[pa.Table, CopyFacts]]:
    """Copied rows of shards, made ahead in worker processes, with a progress bar.

    Raises:
        SampleError: If an image cannot be read.
    """
    places = [place for shard in shards for place in shard.blocks()]
    if not places:
        return
    starts_fast = "fork" in multiprocessing.get_all_start_methods()
    loader = torch.utils.data.DataLoader(
        source,
        batch_size=None,
        sampler=places,
        num_workers=min(num_workers, len(places)),
        multiprocessing_context="fork" if starts_fast else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )
    with progress_bar(total=sum(len(rows) for _, rows in places), desc="Copying", unit="image") as progress:
        for block in loader:
            if isinstance(block, SampleError):
                raise block
            progress.update(len(block[0]))
            yield block


def write_copy(args: CacheArguments) -> list[str]:
    """Writes the shards that are not there yet; returns what there is to say.

    Raises:
        ValueError: If the data cannot be copied, an image cannot be read, or the folder holds something else.
        OSError: If nothing can be written.
    """
    PixelLimit(args.max_image_pixels)
    reduction = Reduction(args.max_side, args.quality)
    source = ReducedRows(open_source(args), args.image_column_name, local_prefix(args.dataset_name), reduction)
    writer = open_writer(args, source)
    writer.begin()
    try:
        shards = writer.shards()
        missing = [shard for shard in shards if not writer.is_written(shard)]
        writer.check_source([shard for shard in shards if shard not in set(missing)], source)
        blocks = reduced_blocks(source, missing, args.num_workers or num_cpu_cores())
        for shard in missing:
            writer.write(shard, source.schemas[shard.split], blocks)
        report = writer.finish()
    finally:
        writer.release()
    warn_of_images(report)
    before, after = decode_times(writer, source)
    return [
        f"{report['images']:,} images: {report['reduced']:,} made smaller (longer side {args.max_side} pixels), "
        f"{report['images'] - report['reduced']:,} copied byte for byte",
        f"{report['bytes_before'] / 1e6:,.1f} MB of images before, {report['bytes'] / 1e6:,.1f} MB in {writer.folder}",
        f"one core decodes an image in {before:.1f} ms before, {after:.1f} ms now",
    ]


def warn_of_images(report: dict[str, Any]) -> None:
    """Says what cannot be seen in the copy any more."""
    for note, number in report["notes"].items():
        if note == ROTATED:  # pixels and tag are those of the source
            continue
        logger.warning("%s: %d of %d images that were made smaller.", note, number, report["reduced"])
    if damaged := report["damaged"]:
        logger.warning(
            "libjpeg reports damage in %d of the images that were made smaller. They can be read, but parts of them may show something else: "
            "replace them, and make the copy again in another folder.\n  %s",
            len(damaged), "\n  ".join(damaged[:MAX_REPORTED_PROBLEMS]),
        )  # fmt: skip
    if 0 < report["brightest"] <= MAX_VALUE // 2:
        logger.warning(
            "The largest value of 16-bit grayscale is %d of %d: the copied 8-bit images are nearly black. Save the images with 8 bits, scaled "
            "to 0 to 255, and copy those.",
            report["brightest"], MAX_VALUE,
        )  # fmt: skip


def decode_times(writer: CopyWriter, source: ReducedRows) -> tuple[float, float]:
    """Milliseconds that decoding an image takes, of the source and of the copy; the mean of some of both."""
    contents: list[tuple[bytes, bytes]] = []
    for shard, row, value in writer.sample(writer.shards(), source.image_column):
        original = source.splits[shard.split][row : row + 1][source.image_column][0].as_py()
        contents.append((read_content(original), value["bytes"]))
    times = []
    for files in zip(*contents):
        start = time.perf_counter()
        for content in files:
            decode_image({"bytes": content, "path": None})
        times.append(1e3 * (time.perf_counter() - start) / len(files))
    return tuple(times) or (0.0, 0.0)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        print("\n".join(write_copy(args)))


if __name__ == "__main__":
    main(sys.argv[1:])
