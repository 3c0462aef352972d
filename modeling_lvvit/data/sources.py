"""Where data comes from: Hub names, image folders, Parquet files and folders of them; prepared or as streams."""

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetsError
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, HfApi
from transformers.utils import logging

from .image_folder import NO_IMAGE, SPLIT_FOLDERS, image_rows, read_layout
from .reduced_copy.record import copied_files


logger = logging.get_logger(__name__)
STREAM_SHARDS = 64  # of the images of a folder, so that processes and workers can share them
SHARD_NAME = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")  # the library's own for files of splits


def looks_local(name: str) -> bool:
    """Whether a name can only be a path, not a Hub name."""
    return name.startswith((".", "~", os.sep)) or name.endswith(".parquet") or name.count("/") > 1


def short_name(name: str) -> str:
    """A Hub name, or the last part of a path."""
    return Path(name).name if looks_local(name) else name


def open_splits(
    name: str,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    split: str = "train",
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """All splits of a dataset, prepared or, with `streaming`, read one row after another. All programs open their data with it.

    In a folder of images or Parquet files, folder and file names tell the split (see `image_folder` and `parquet_splits`), unless a
    README.md configures its files or it is a reduced copy, whose record names them. What is left out is logged as a warning. Prepared files in the cache belong to the very files that
    they were made of: a folder of the same name, or files that were replaced, are read again.

    Args:
        name: Hub name, a folder (image folder, or Parquet files), or one Parquet file.
        split: What the rows of a single Parquet file are called.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it cannot be read, or files cannot be assigned to one split each.
    """
    path = Path(name).expanduser()
    if looks_local(name) and not path.exists():
        raise FileNotFoundError(
            f"There is no dataset at {path.resolve()}. Give a Hub name, a folder or a Parquet file."
        )
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{path} is neither a folder nor a .parquet file.")
    try:
        if path.is_file():
            return _open_parquet_files({split: [str(path)]}, streaming)
        if path.is_dir():
            return _open_folder(path.absolute(), config_name, streaming)
        return datasets.load_dataset(name, config_name, revision=revision, streaming=streaming)
    except OSError as error:
        check_cache(Path(datasets.config.HF_DATASETS_CACHE), error)
        if not isinstance(error, (ConnectionError, FileNotFoundError)):
            raise
        raise FileNotFoundError(
            f"{name} is neither a local folder or Parquet file (seen from {Path.cwd()}) nor a dataset that the Hub gives: "
            f"{error}"
        ) from error
    except (DatasetsError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read as a dataset: {error.__cause__ or error}") from error


def check_cache(folder: Path, cause: OSError) -> None:
    """Raises an `OSError` that says what to set if nothing can be written to a folder of a cache, as in a home that is read-only or not there,
    after an error that this may have caused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"Nothing can be written to the cache {folder}: {error.strerror}. Set the environment variable HF_HOME to a folder where that is "
            "possible."
        ) from cause


def _open_folder(
    folder: Path, config_name: str | None, streaming: bool
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    if _configures_files(folder):
        return _open_configured_folder(folder, config_name, streaming)
    if config_name not in (None, "default"):
        raise ValueError(f"{folder} has no configuration {config_name!r}: it has no README.md that names some.")
    if files := copied_files(folder):
        return _open_parquet_files(files, streaming)
    layout, metadata = read_layout(folder)
    num_images = sum(len(rows) for rows in layout.splits.values())
    if parquet_files := find_parquet_data(folder, layout.left_out, num_images > 0):
        if num_images:
            logger.warning("%s has Parquet files, which are read; %s image files are left out.", folder, num_images)
        files = parquet_splits(parquet_files)
        return _open_parquet_files({name: [str(folder / path) for path in files[name]] for name in files}, streaming)
    if not num_images:
        return _open_configured_folder(folder, config_name, streaming)
    for line in layout.warnings():
        logger.warning("%s: %s", folder, line)
    rows = image_rows(folder, layout, metadata)
    if not streaming:
        return rows
    return datasets.IterableDatasetDict(
        {name: part.to_iterable_dataset(num_shards=min(len(part), STREAM_SHARDS)) for name, part in rows.items()}
    )


def _configures_files(folder: Path) -> bool:
    """Whether a README.md says which files make up the splits."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    return bool(MetadataConfigs.from_dataset_card_data(DatasetCard.load(card, ignore_metadata_errors=True).data))


def _open_configured_folder(
    folder: Path, config_name: str | None, streaming: bool
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """A folder whose files the `datasets` library finds: those that a README.md names, or CSV, JSON, archives and so on.

    Its cache knows a folder by its name (datasets 5.2), so that another one, or changed files, would not be noticed: each state of each
    folder has a cache of its own.
    """
    if glob.has_magic(str(folder.resolve())):
        raise ValueError(
            f"{folder}: the `datasets` library finds the files of this folder, and takes *, ? and [ in a path for a pattern. Rename it."
        )
    state = hashlib.sha256(f"{folder.resolve()}\0{dataset_fingerprint(str(folder), None)}".encode()).hexdigest()[:32]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "folders" / state
    builder = datasets.load_dataset_builder(str(folder), config_name, cache_dir=str(cache))
    files = {name: [str(path) for path in paths] for name, paths in (builder.config.data_files or {}).items()}
    split_of: dict[str, str] = {}
    for name, paths in files.items():
        for path in paths:
            if split_of.setdefault(path, name) != name:
                raise ValueError(f"{path} is in the splits {split_of[path]} and {name}.")
    endings = {Path(path).suffix.lower() for path in split_of}
    others = [
        path for path in sorted(_files_below(folder)) if path.suffix.lower() in endings and str(path) not in split_of
    ]
    if others:
        logger.warning("%s: %s files are in no split: %s", folder, len(others), ", ".join(map(str, others[:3])))
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def find_parquet_data(folder: Path, left_out: Mapping[str, Sequence[str]], has_images: bool) -> list[str]:
    """Parquet files that are the data of a folder, relative to it: those in it, unless there are image files, and no images in them.

    Args:
        left_out: Files that are no images, see `list_folder`.
        has_images: Whether the folder has image files.
    """
    files = [path for path in left_out.get(NO_IMAGE, ()) if path.lower().endswith(".parquet")]
    return files if not has_images or any(_holds_images(folder / path) for path in files) else []


def _holds_images(file: Path) -> bool:
    """Whether a Parquet file has a column of image files, not only of features or boxes."""
    types = parquet.read_schema(file).types
    return any(pa.types.is_struct(column) and column.get_field_index("bytes") >= 0 for column in types)


def parquet_splits(paths: list[str]) -> dict[str, list[str]]:
    """Split -> Parquet files, by the first or last word of their names or by folders: `train.parquet`, `val-0.parquet`, `my_test.parquet`,
    `data/test-00000-of-00002.parquet`, `train/0.parquet`; without such names all are `train`.

    Args:
        paths: Relative to their folder.

    Raises:
        ValueError: If only some files are called after splits, or a split has two names.
    """
    words = {path: _split_word(PurePosixPath(path)) for path in sorted(paths)}
    if not any(words.values()):
        return {"train": sorted(paths)}
    if others := [path for path, word in words.items() if word is None]:
        raise ValueError(
            f"{', '.join(others[:3])} {'are' if len(others) > 1 else 'is'} of no split, while other Parquet files are called after "
            f"splits ({', '.join(sorted(set(words.values()) - {None}))}). Rename or move them."
        )
    splits: dict[str, list[str]] = {}
    for path, word in words.items():
        splits.setdefault(SPLIT_FOLDERS.get(word.casefold(), word), []).append(path)
    for name, files in splits.items():
        if len(same := sorted({words[path] for path in files})) > 1:
            raise ValueError(
                f"The Parquet files of {' and '.join(same)} are both the split {name}. Rename or move some."
            )
    return splits


def _split_word(path: PurePosixPath) -> str | None:
    """The part of a path that names a split, as it is written."""
    if match := SHARD_NAME.fullmatch(path.stem):
        return match[1]
    words = re.findall(r"[^-_. \d]+", path.stem.partition("-of-")[0])
    candidates = [*words[:1], *words[-1:], *reversed(path.parts[:-1])]
    return next((word for word in candidates if word.casefold() in SPLIT_FOLDERS), None)


def _open_parquet_files(
    files: dict[str, list[str]], streaming: bool
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Parquet files that are named one by one: then their sizes and times are part of the name in the cache. Splits are opened by
    themselves, as the library would give all of them the class names of one."""
    splits = {}
    for name, paths in files.items():
        _check_class_names_agree(paths)
        escaped = {name: [glob.escape(path) for path in paths]}
        splits[name] = datasets.load_dataset("parquet", data_files=escaped, split=name, streaming=streaming)
    return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(splits)


def _check_class_names_agree(paths: list[str]) -> None:
    """A `ValueError` if class ids mean other classes in one file than in another: the library would take the names of one for all."""
    first: dict[str, tuple[str, list[str]]] = {}
    for path in paths:
        for column, feature in datasets.Features.from_arrow_schema(parquet.read_schema(path)).items():
            if isinstance(feature, datasets.ClassLabel):
                other, names = first.setdefault(column, (path, feature.names))
                if names != feature.names:
                    raise ValueError(
                        f"{path} and {other} name the classes of column {column!r} differently: {feature.names[:5]} and {names[:5]}. "
                        "Write them again with one order of the classes."
                    )


def open_parquet(paths: list[str], split: str) -> datasets.Dataset:
    """Rows of Parquet files; a `ValueError` if they cannot be read."""
    try:
        return _open_parquet_files({split: paths}, streaming=False)[split]
    except (DatasetsError, pa.ArrowException, FileNotFoundError) as error:
        raise ValueError(f"{Path(paths[0]).parent} cannot be read: {error.__cause__ or error}") from error


def streamed_rows(source: tuple, state: str) -> Iterator[dict[str, Any]]:
    """Rows of a split, images undecoded."""
    name, config_name, revision, split, image_column, count = source
    rows = open_splits(name, config_name, revision, streaming=True, split=split)[split]
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    yield from rows if count is None else rows.take(count)


def _files_below(folder: Path) -> Iterator[Path]:
    """Files of a folder and those below it, links followed."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (file for name in names if (file := Path(place, name)).is_file())


def dataset_fingerprint(name: str, revision: str | None) -> str:
    """What changes when a dataset changes: sizes and times of local files, or the commit on the Hub."""
    path = Path(name).expanduser()
    if not path.exists():
        return HfApi().dataset_info(name, revision=revision).sha
    digest = hashlib.sha256()
    for file in sorted(_files_below(path)) if path.is_dir() else [path]:
        name, about = file.relative_to(path) if path.is_dir() else file.name, file.stat()
        digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()
