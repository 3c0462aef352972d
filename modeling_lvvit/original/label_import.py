"""Turns the authors' label files into a label set that `lvvit train --token_labels` joins to the images.

    python -m modeling_lvvit.original.label_import label_top5_train_nfnet --output_dir nfnet_labels

Their pack has one file for each training image of ImageNet, `n01440764/n01440764_10026.pt`: a tensor [2, K, rows, columns]
of float16, scores first and class ids second (main.py and generate_label.py of the authors' repository). A map covers the
center square of its image, as wide as its shorter side; this is recorded, so that later crops are cut from the right place.

The program can be killed at any time and started again; the result is the same.
"""

import hashlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from ..console import program, progress_bar
from ..data.classes.class_labels import read_class_names
from ..data.classes.class_matching import imagenet_class_names
from ..data.files.shard_folder import default_rows_per_shard, package_versions
from ..hub.repository import HubUploadArguments
from ..labels.publishing import finish_label_set, open_label_set_target
from ..labels.storage import LabelMaps, LabelSetLayout
from ..labels.writer import LabelSetWriter
from ..launching import num_cpu_cores, start_worker
from ..options import Program
from .checkpoint import LOAD_ERRORS


@dataclass
class ImportArguments(HubUploadArguments):
    """Options of the program."""

    option_groups: ClassVar[dict[str, str]] = {"label_dir": "options", "hub_model_id": "upload"}

    label_dir: str | None = HfArg(default=None, help="Folder of label files.")
    output_dir: str | None = HfArg(default=None, help="Folder of the label set; an unfinished one is continued.")
    train_split: str = HfArg(default="train", help="Name of the split.", aliases=["--split"])
    class_names_file: str | None = HfArg(
        default=None,
        help="Text file with one class name a line, in the order of the ids; default: the WordNet ids of ImageNet.",
        aliases=["--class_names"],
    )
    image_suffix: str = HfArg(
        default=".JPEG", help="Ending of the image files, which keys of the label set have instead of .pt."
    )
    score_type: Literal["float16", "int8"] = HfArg(
        default="float16", help="float16 is lossless; int8 rounds scores to 0.375."
    )
    num_workers: int | None = HfArg(default=None, help="Processes; default: one for each core.")
    on_error: Literal["stop", "empty"] = HfArg(default="stop", help="Damaged file: stop, or an empty label.")
    rows_per_shard: int | None = HfArg(default=None, help="Rows of a Parquet file.")

    def __post_init__(self):
        for name in ("num_workers", "rows_per_shard"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        self.check_upload()


PROGRAM = Program(
    "import_original_labels", __doc__, (ImportArguments,), ("label_dir",), required=("label_dir", "output_dir")
)


def find_label_files(folder: Path) -> list[str]:
    """Label files below a folder, as sorted relative paths; a `FileNotFoundError` if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt") if not path.is_dir())
    if not files:
        raise FileNotFoundError(f"There is no .pt file in {folder} or its folders.")
    return files


def read_label_file(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and scores of one of the authors' files, `[K, rows, columns]` int32 and float16.

    Raises:
        ValueError: If it is damaged or holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} cannot be read: {reason}") from error
    is_plain = isinstance(content, torch.Tensor) and content.layout == torch.strided and not content.is_meta
    if not is_plain or content.is_complex() or content.ndim != 4 or len(content) != 2 or not content.numel():
        shape = tuple(content.shape) if isinstance(content, torch.Tensor) else type(content).__name__
        raise ValueError(f"{path} must hold a tensor [2, K, rows, columns], scores and class ids; it holds {shape}.")
    scores, ids = content.detach().float().numpy()
    if not (np.isfinite(ids).all() and np.isfinite(scores).all()):
        raise ValueError(f"{path} has NaN or infinite values.")
    if np.abs(scores).max() > np.finfo(np.float16).max:
        raise ValueError(f"{path} has scores beyond the float16 range (65504).")
    if (ids != np.rint(ids)).any() or ids.min() < 0 or ids.max() >= num_classes:
        raise ValueError(
            f"{path} has class ids from {ids.min():g} to {ids.max():g}; expected whole numbers in [0, {num_classes})."
        )
    ordered = np.sort(ids, axis=0)
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"{path} names a class twice in a cell.")
    return ids.astype(np.int32), scores.astype(np.float16)


def import_shard(folder: Path, files: list[str], writer: LabelSetWriter, shard: int, args: ImportArguments) -> int:
    """Reads the files of one shard, writes it and returns the number of its rows."""
    shape = (len(files), writer.layout.k, *writer.layout.map_size)
    ids, scores = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float16)
    notes = [""] * len(files)
    for row, name in enumerate(files):
        try:
            values = read_label_file(folder / name, len(writer.layout.class_names))
            if values[0].shape != shape[1:]:
                raise ValueError(f"{folder / name} has a map {values[0].shape}, the first file {shape[1:]}.")
            ids[row], scores[row] = values
        except ValueError as error:
            if args.on_error == "stop":
                raise ValueError(f"{error} Such files get an empty label with --on_error empty.") from error
            notes[row] = "unreadable label file"
    keys = ["/".join(name.split("/")[-2:]).removesuffix(".pt") + args.image_suffix for name in files]
    unknown = [None] * len(files)
    maps = LabelMaps(ids, scores, np.full((len(files), 4), np.nan, dtype=np.float32))  # the center square
    writer.write(shard, writer.layout.table(keys, unknown, maps, unknown, notes, [bool(note) for note in notes]))
    return len(files)


def import_shards(folder: Path, files: list[str], writer: LabelSetWriter, args: ImportArguments) -> int:
    """Writes the shards that are not there yet, in several processes; returns the number of all shards."""
    size = writer.rows_per_shard
    parts = [files[start : start + size] for start in range(0, len(files), size)]
    missing = [shard for shard in range(len(parts)) if not writer.is_written(shard)]
    workers = min(args.num_workers or num_cpu_cores(), max(1, len(missing)))
    progress = progress_bar(total=sum(len(parts[shard]) for shard in missing), desc="Importing", unit="map")
    # children start again: a copy of a process with the threads of PyTorch may hang
    context = multiprocessing.get_context("spawn")
    with progress, ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        tasks = [pool.submit(import_shard, folder, parts[shard], writer, shard, args) for shard in missing]
        try:
            for task in as_completed(tasks):
                progress.update(task.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(parts)


def first_shape(folder: Path, files: list[str], num_classes: int, on_error: str) -> tuple[int, ...]:
    """`[K, rows, columns]` of the first file that can be read; a `ValueError` if none can, or the first cannot and that is not allowed."""
    for name in files:
        try:
            return read_label_file(folder / name, num_classes)[0].shape
        except ValueError as error:
            if on_error == "stop":
                raise ValueError(f"{error} Such files get an empty label with --on_error empty.") from error
    raise ValueError(f"None of the {len(files)} label files in {folder} can be read.")


def import_labels(args: ImportArguments) -> list[str]:
    """Imports all label files of a folder; returns lines for the user. Errors are those of its functions, and of writing."""
    folder = Path(args.label_dir).expanduser()
    files = find_label_files(folder)
    class_names = (
        imagenet_class_names() if args.class_names_file is None else read_class_names(Path(args.class_names_file))
    )
    k, *map_size = first_shape(folder, files, len(class_names), args.on_error)
    layout = LabelSetLayout(tuple(class_names), k, tuple(map_size), args.score_type)
    settings = {
        "source": "label files of the authors of the paper, one for each image",
        "label_dir": folder.resolve().name,
        "num_rows": len(files),
        "files_sha256": hashlib.sha256("\0".join(files).encode()).hexdigest(),
        "class_names_sha256": hashlib.sha256("\0".join(class_names).encode()).hexdigest(),
        "scores": "logits",
        "fit": "center_crop",
        "image_suffix": args.image_suffix,
    }
    per_shard = args.rows_per_shard or default_rows_per_shard(len(files))
    writer = LabelSetWriter(
        Path(args.output_dir), args.train_split, layout, settings, package_versions(torch), per_shard
    )
    target = None
    if args.push_to_hub:
        target = open_label_set_target(args.hub_model_id, args.train_split, args.hub_private_repo, args.hub_revision)
    try:
        writer.begin()
        num_shards = import_shards(folder, files, writer, args)
        return list(finish_label_set(writer, num_shards, f"Token labels from {settings['label_dir']}", target))
    finally:
        writer.release()


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        print("\n".join(import_labels(args)))


if __name__ == "__main__":
    main(sys.argv[1:])
