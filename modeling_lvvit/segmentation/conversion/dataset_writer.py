"""Writes images and masks of a folder as a dataset of Parquet files, which appears only when it is complete."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from transformers.utils import logging

from ...console import progress_bar
from ...data.files.atomic_files import atomic_directory, write_json
from ...data.image_folder import Layout, list_folder
from ...data.images import IMAGE_ERRORS, pillow_errors, upright_size
from ...data.masks import read_file_facts, read_mask, size_problem
from ...hub.file_checks import CARD
from ..data import MASKS_FILE, NAMES_FILE


logger = logging.get_logger(__name__)
ROWS_PER_SHARD, ROWS_PER_GROUP = 2000, 100
MAX_REPORTED_PROBLEMS = 10


@dataclass(frozen=True)
class Pair:
    """An image file, its mask file, and values of further columns."""

    image: Path
    mask: Path
    extra: Mapping[str, Any] = field(default_factory=dict)


def list_images(folder: Path) -> dict[str, Path]:
    """Image files of a folder and those below it, see `list_folder`: path without ending, relative to the folder -> file. Two files may
    not differ only in their ending (`ValueError`); other files are named in a warning."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    content = list_folder(folder)
    files: dict[str, Path] = {}
    for path in sorted(content.images):
        key = PurePosixPath(path).with_suffix("").as_posix()
        if key in files:
            raise ValueError(f"{files[key]} and {folder / path} differ only in their ending; keep one of them.")
        files[key] = folder / path
    for line in Layout(left_out=content.left_out).warnings():
        logger.warning("%s: %s", folder, line)
    return files


def pair_files(images: Mapping[str, Path], masks: Mapping[str, Path], mask_suffix: str = "") -> dict[str, Pair]:
    """Images with the masks of the same name, both from `list_images`; `mask_suffix` is what masks have after the name of the image.
    Raises a `ValueError` if there are none, or an image has no mask or the other way round."""
    by_image = {key.removesuffix(mask_suffix): file for key, file in masks.items() if key.endswith(mask_suffix)}
    if not images:
        raise ValueError("There are no images.")
    alone = [f"image {images[key]}" for key in images if key not in by_image]
    alone += [f"mask {file}" for key, file in by_image.items() if key not in images]
    if alone:
        listed = "; ".join(alone[:MAX_REPORTED_PROBLEMS]) + ("; ..." * (len(alone) > MAX_REPORTED_PROBLEMS))
        raise ValueError(
            f"{len(alone)} of {len(images)} images and {len(masks)} masks have no partner of the same name (what masks have after it "
            f"is `mask_suffix`, now {mask_suffix!r}): {listed}"
        )
    return {key: Pair(file, by_image[key]) for key, file in images.items()}


def check_pairs(pairs: Sequence[Pair], allows_colors: bool) -> None:
    """Raises a `ValueError` unless all files can be opened and masks have the size of their images and, unless colors are allowed, one
    channel."""
    problems = []
    for pair in progress_bar(pairs, desc="Looking at the files", unit="image"):
        sizes, broken = [], []
        for path in (pair.image, pair.mask):
            try:
                with pillow_errors(), Image.open(path) as image:
                    sizes.append(upright_size(image))
            except IMAGE_ERRORS as error:
                broken.append(f"{path} cannot be opened as an image ({error})")
        if broken:
            problems += broken
        elif sizes[0] != sizes[1]:
            facts = read_file_facts({"bytes": None, "path": str(pair.image)})
            problems.append(f"{pair.mask} {size_problem(sizes[1], sizes[0], facts.orientation)}")
        elif not allows_colors and (problem := _color_problem(pair.mask)):
            problems.append(f"{pair.mask}: {problem}")
        if len(problems) >= MAX_REPORTED_PROBLEMS:
            problems.append("... (the check stopped here)")
            break
    if problems:
        raise ValueError("These files cannot be used:\n  " + "\n  ".join(problems))


def write_segmentation_set(
    output_dir: Path,
    splits: Mapping[str, Sequence[Pair]],
    class_names: Sequence[str] | None,
    notes: str,
    mask_content: Callable[[Path], bytes] = Path.read_bytes,
    extra_features: Mapping[str, Any] | None = None,
    reduce_labels: bool = False,
) -> dict[str, int]:
    """Writes `data/SPLIT-*.parquet` with the columns `image` and `annotation`, `id2label.json` and a card; returns the number of images of each split.

    Args:
        class_names: By id; `None` writes no names.
        notes: Markdown text for the card.
        mask_content: From a mask file to the PNG that is stored.
        extra_features: Features of the columns in `Pair.extra`.
        reduce_labels: Whether 0 in masks is no class; then a file says so, and training without that option is refused.

    Raises:
        FileExistsError: If `output_dir` is there and not empty.
        ValueError: If a mask cannot be read.
    """
    columns = {"image": datasets.Image(), "annotation": datasets.Image(), **(extra_features or {})}
    schema = datasets.Features(columns).arrow_schema
    with atomic_directory(output_dir) as partial:
        (partial / "data").mkdir()
        for split, pairs in splits.items():
            _write_split(partial / "data", split, pairs, schema, mask_content)
        if class_names is not None:
            names = json.dumps(dict(enumerate(class_names)), indent=1, ensure_ascii=False)
            (partial / NAMES_FILE).write_text(names + "\n", encoding="utf-8")
        if reduce_labels:
            write_json(partial / MASKS_FILE, {"reduce_labels": True})
        counts = {split: len(pairs) for split, pairs in splits.items()}
        listed = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        card = DatasetCardData(task_categories=["image-segmentation"], pretty_name=output_dir.name)
        DatasetCard(f"---\n{card}\n---\n\n# {output_dir.name}\n\nImages and masks: {listed}.\n\n{notes}\n").save(
            partial / CARD
        )
    return counts


def _write_split(
    folder: Path, split: str, pairs: Sequence[Pair], schema: pa.Schema, mask_content: Callable[[Path], bytes]
) -> None:
    starts = range(0, len(pairs), ROWS_PER_SHARD)
    progress = iter(progress_bar(pairs, desc=f"Writing {split}", unit="image"))
    for shard, _ in enumerate(starts):
        path = folder / f"{split}-{shard:05d}-of-{len(starts):05d}.parquet"
        shard_pairs = islice(progress, ROWS_PER_SHARD)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            while rows := [_row(pair, mask_content) for pair in islice(shard_pairs, ROWS_PER_GROUP)]:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _row(pair: Pair, mask_content: Callable[[Path], bytes]) -> dict[str, Any]:
    try:
        mask = mask_content(pair.mask)
    except IMAGE_ERRORS as error:
        raise ValueError(f"{pair.mask} cannot be used: {error}") from error
    image = {"bytes": pair.image.read_bytes(), "path": pair.image.name}
    return {"image": image, "annotation": {"bytes": mask, "path": pair.mask.name}, **pair.extra}


def _color_problem(path: Path) -> str | None:
    """Why a mask does not hold class ids, `None` if its image mode can. Only color images are decoded, as they may be grey."""
    with Image.open(path) as image:
        if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
            return None
    try:
        read_mask({"bytes": None, "path": str(path)})
    except IMAGE_ERRORS as error:
        return str(error)
    return None
