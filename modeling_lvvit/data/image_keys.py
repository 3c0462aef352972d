"""Keys: what tells images apart and finds their label maps.

The key of an image is the value of a column that the user names; else the last two parts of its path ("cat/1.jpg", which
survives a move of the folder and the way through an archive or Parquet); else its number, "row:17". Keys are read a block
at a time and compared by their 64-bit hashes, so that no list of them is ever held: 8 bytes a row.
"""

import copy
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


ROW_PREFIX = "row:"
PATH_TAIL = re.compile(r"(?:[^/\\]+[/\\])?[^/\\]+$")  # the last two parts
FILE_NAME = re.compile(r"[^/\\]+$")
ROWS_PER_BLOCK = 65_536
MAX_NAMED = 10


def row_keys(start: int, stop: int) -> list[str]:
    """Keys of images that are known by their number only."""
    return [f"{ROW_PREFIX}{row}" for row in range(start, stop)]


def key_of_path(path: str) -> str:
    """Key of an image with a path; `zip://a/b/1.jpg::https://...` counts as `a/b/1.jpg`."""
    return PATH_TAIL.search(path.split("::")[0]).group().replace("\\", "/")


def keys_of_paths(paths: Sequence[str | None], start: int = 0) -> list[str]:
    """Keys of images with paths.

    Args:
        paths: Paths of rows that follow each other.
        start: Number of the first.

    Raises:
        ValueError: If one has no path.
    """
    if not all(paths):
        row = start + [bool(path) for path in paths].index(False)
        raise ValueError(
            f"Row {row} has no path, though the first row has one: there is no key to tell it by. Name a column of keys with "
            "--key_column, or tell images apart by their row with --number_rows."
        )
    return [key_of_path(path) for path in paths]


def keys_of_values(values: pa.Array | pa.ChunkedArray, column: str, start: int = 0) -> list[str]:
    """Keys from a column of rows that follow each other; `start` is the number of the first.

    Raises:
        ValueError: If one has no value.
    """
    keys = values.cast(pa.string()).to_pylist()
    if None in keys:
        row = start + keys.index(None)
        raise ValueError(f"Row {row} has no value in column {column!r}: there is no key to tell it by.")
    return keys


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """64-bit hashes of keys, `(n,)` int64."""
    # file systems write accents in two ways: composed, or as a letter and a mark
    composed = (unicodedata.normalize("NFC", key).encode() for key in keys)
    digests = b"".join(hashlib.blake2b(key, digest_size=8).digest() for key in composed)
    return np.frombuffer(digests, dtype="<i8")


def repeated_keys(blocks: Iterable[Sequence[str]], hashes: np.ndarray) -> list[str]:
    """The first keys that come more than once.

    Args:
        blocks: All keys; read only if there are such.
        hashes: Their hashes.
    """
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    found: dict[str, None] = {}
    if len(repeated):
        for block in blocks:
            found |= dict.fromkeys(np.asarray(block, dtype=object)[np.isin(hash_keys(block), repeated)])
            if len(found) >= MAX_NAMED:
                break
    return list(found)[:MAX_NAMED]


class ImageKeys:
    """Keys of the rows of a dataset.

    Args:
        dataset: Images, or a label set with the name of its key column.
        image_column: Name of the image column.
        key_column: Column whose values are the keys; default: paths where images have them, else row numbers.
        number_rows: Whether rows are known by their number even where images have paths.

    Raises:
        ValueError: If `key_column` is missing.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str | None = None,
        key_column: str | None = None,
        number_rows: bool = False,
    ):
        if key_column is not None and key_column not in dataset.column_names:
            raise ValueError(
                f"There is no column {key_column!r} to take keys from; the data has {dataset.column_names}."
            )
        self.column = key_column or image_column
        self.rows = dataset.select_columns(self.column).with_format("arrow")
        self.patterns: list[re.Pattern] = []
        self.kind = "column" if key_column is not None else "path"
        if self.kind == "path" and (number_rows or not len(self.rows) or self._has_no_paths()):
            self.kind = "row"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> str:
        return self.block(row, row + 1)[0]

    def block(self, start: int, stop: int) -> list[str]:
        """Keys of the rows `start` to `stop - 1`.

        Raises:
            ValueError: If a row has no value or path, or a pattern does not match.
        """
        stop = min(stop, len(self))
        if self.kind == "row":
            keys = row_keys(start, stop)
        elif self.kind == "path":
            keys = keys_of_paths(self._paths(start, stop).to_pylist(), start)
        else:
            keys = keys_of_values(self.rows[start:stop][self.column], self.column, start)
        for pattern in self.patterns:
            keys = [cut_key(key, pattern) for key in keys]
        return keys

    def blocks(self) -> Iterator[list[str]]:
        """All keys, a block at a time."""
        for start in range(0, len(self), ROWS_PER_BLOCK):
            yield self.block(start, start + ROWS_PER_BLOCK)

    def hashes(self) -> np.ndarray:
        """Hashes of all keys, `(n,)` int64."""
        blocks = [hash_keys(block) for block in self.blocks()]
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)

    def cut(self, pattern: re.Pattern) -> "ImageKeys":
        """The keys cut by a regular expression: its first group, or else what it matches."""
        keys = copy.copy(self)
        keys.patterns = [*self.patterns, pattern]
        return keys

    def duplicates(self, hashes: np.ndarray | None = None) -> list[str]:
        """The first keys that come more than once."""
        hashes = self.hashes() if hashes is None else hashes
        return repeated_keys(self.blocks(), hashes)

    def _has_no_paths(self) -> bool:
        if not self._paths(0, 1).null_count:
            return False
        for start in range(0, len(self), ROWS_PER_BLOCK):
            paths = self._paths(start, start + ROWS_PER_BLOCK)
            if paths.null_count < len(paths):
                raise ValueError(
                    "Row 0 has no path, though other rows have one. Name a column of keys with --key_column, or tell images "
                    "apart by their row with --number_rows."
                )
        return True

    def _paths(self, start: int, stop: int) -> pa.ChunkedArray:
        column = self.rows[start:stop][self.column]
        if not pa.types.is_struct(column.type):
            return column.cast(pa.string())
        # only the paths are read, not the images next to them; a row without an image has none
        return pa.chunked_array([pc.struct_field(chunk, "path") for chunk in column.chunks], pa.string())


def cut_key(key: str, pattern: re.Pattern) -> str:
    """The first group of a regular expression in a key, or else what it matches.

    Raises:
        ValueError: If it matches nothing.
    """
    found = pattern.search(key)
    part = None if found is None else found.group(1 if pattern.groups else 0)
    if part is None:
        raise ValueError(f"--key_pattern {pattern.pattern!r} does not match the key {key!r}.")
    return part


def compiled_pattern(pattern: str) -> re.Pattern:
    """A user's regular expression.

    Raises:
        ValueError: If it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--key_pattern {pattern!r} is no regular expression: {error}.") from error


class KeyIndex:
    """Finds the rows of keys; 16 bytes a row.

    Args:
        keys: Keys to be found.
        hashes: Their hashes, if they are there already.

    Raises:
        ValueError: If a key comes more than once.
    """

    def __init__(self, keys: ImageKeys, hashes: np.ndarray | None = None):
        hashes = keys.hashes() if hashes is None else hashes
        self.order = np.argsort(hashes, kind="stable")
        self.sorted_hashes = hashes[self.order]
        if (self.sorted_hashes[1:] == self.sorted_hashes[:-1]).any():
            raise ValueError(
                f"Keys come more than once in the label set: {', '.join(map(repr, keys.duplicates(hashes)))}."
            )

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """Row of each key, given by its hash, `(n,)` int64; -1 for a key that is not there."""
        if not len(self.order):
            return np.full(len(hashes), -1)
        places = np.searchsorted(self.sorted_hashes, hashes).clip(max=len(self.order) - 1)
        return np.where(self.sorted_hashes[places] == hashes, self.order[places], -1)
