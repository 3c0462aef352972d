"""Where data comes from: Hub names, image folders, Parquet files and folders of them; prepared or as streams."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi


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
    """All splits of a dataset, prepared or, with `streaming`, read one row after another.

    Args:
        name: Hub name, a folder (image folder, or Parquet files), or one Parquet file.
        split: What the rows of a single Parquet file are called.

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it cannot be read.
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
            return datasets.load_dataset("parquet", data_files={split: str(path)}, streaming=streaming)
        return datasets.load_dataset(
            str(path) if path.is_dir() else name, config_name, revision=revision, streaming=streaming
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is neither a local folder or Parquet file (seen from {Path.cwd()}) nor a dataset that the Hub gives: "
            f"{error}"
        ) from error
    except (DatasetsError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read as a dataset: {error.__cause__ or error}") from error


def open_parquet(paths: list[str], split: str) -> datasets.Dataset:
    """Rows of Parquet files; a `ValueError` if they cannot be read."""
    try:
        return datasets.load_dataset("parquet", data_files={split: paths}, split=split)
    except (DatasetsError, pa.ArrowException, FileNotFoundError) as error:
        raise ValueError(f"{Path(paths[0]).parent} cannot be read: {error.__cause__ or error}") from error


def streamed_rows(source: tuple, state: str) -> Iterator[dict[str, Any]]:
    """Rows of a split, images undecoded."""
    name, config_name, revision, split, image_column, count = source
    rows = open_splits(name, config_name, revision, streaming=True, split=split)[split]
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    yield from rows if count is None else rows.take(count)


def dataset_fingerprint(name: str, revision: str | None) -> str:
    """What changes when a dataset changes: sizes and times of local files, or the commit on the Hub."""
    path = Path(name).expanduser()
    if not path.exists():
        return HfApi().dataset_info(name, revision=revision).sha
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name, about = file.relative_to(path) if path.is_dir() else file.name, file.stat()
        digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()
