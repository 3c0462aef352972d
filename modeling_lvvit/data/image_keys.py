"""Keys: what tells images apart and finds their label maps.

The key of an image is the value of a column that the user names; else the last two parts of its path ("cat/1.jpg", which
survives a move of the folder and the way through an archive or Parquet); else its number, "row:17". Keys are columns of Arrow
strings, as they are stored; where they are compared, accents are composed, because file systems write them in two ways.
"""

import hashlib
import re
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


Strings = pa.StringArray | pa.ChunkedArray

ROW_PREFIX = "row:"
LAST_TWO_PARTS = r"(?P<part>(?:[^/\\]+[/\\])?[^/\\]+)$"
FILE_NAME = r"(?P<part>[^/\\]+)$"
ROWS_PER_BLOCK = 65_536  # hashed at a time
MAX_NAMED = 10
NO_FIRST_PATH = (
    "Row 0 has no path, though other rows have one. Name a column of keys (`key_column`), or tell images apart by their row "
    "(`number_rows`)."
)


def row_keys(start: int, stop: int) -> pa.StringArray:
    """Keys of images that are known by their number only."""
    return pa.array([f"{ROW_PREFIX}{row}" for row in range(start, stop)], pa.string())


def path_keys(paths: Strings, start: int = 0) -> Strings:
    """Keys of images with paths; `zip://a/b/1.jpg::https://...` counts as `a/b/1.jpg`.

    Raises:
        ValueError: If one of the rows, which follow each other from number `start`, has no path.
    """
    innermost = pc.list_element(pc.split_pattern(paths, "::", max_splits=1), 0)
    keys = pc.replace_substring(_matched_part(innermost, LAST_TWO_PARTS), "\\", "/")
    if keys.null_count:
        row = start + pc.index(keys.is_null(), True).as_py()
        raise ValueError(
            f"Row {row} has no path, though the first row has one: there is no key to tell it by. Name a column of keys "
            "(`key_column`), or tell images apart by their row (`number_rows`)."
        )
    return keys


def value_keys(values: pa.Array | pa.ChunkedArray, column: str, start: int = 0) -> Strings:
    """Keys from a column of rows that follow each other from number `start`; a `ValueError` if one has no value."""
    if values.null_count:
        row = start + pc.index(values.is_null(), True).as_py()
        raise ValueError(f"Row {row} has no value in column {column!r}: there is no key to tell it by.")
    return values.cast(pa.string())


def read_keys(
    dataset: datasets.Dataset,
    image_column: str | None = None,
    key_column: str | None = None,
    number_rows: bool = False,
) -> Strings:
    """Keys of the rows of a dataset.

    Args:
        dataset: Images, or a label set with the name of its key column.
        key_column: Column whose values are the keys; default: paths where images have them, else row numbers.
        number_rows: Whether rows are known by their number even where images have paths.

    Raises:
        ValueError: If `key_column` is missing, or a row has no value or path.
    """
    if key_column is not None and key_column not in dataset.column_names:
        raise ValueError(f"There is no column {key_column!r} to take keys from; the data has {dataset.column_names}.")
    if key_column is None and number_rows:
        return row_keys(0, len(dataset))
    column = dataset.data.column(key_column or image_column)
    if key_column is None and pa.types.is_struct(column.type):
        # only the paths are read, not the images next to them; a row without an image has none
        column = pc.struct_field(column, "path")
    if dataset._indices is not None:  # rows that were selected or shuffled
        column = column.take(dataset._indices.column(0))
    if key_column is not None:
        return value_keys(column, key_column)
    if column.null_count == len(column):
        return row_keys(0, len(dataset))
    if not column[0].is_valid:
        raise ValueError(NO_FIRST_PATH)
    return path_keys(column.cast(pa.string()))


def cut_keys(keys: Strings, pattern: str) -> Strings:
    """Keys cut by a regular expression of Python: its first group, or else what it matches.

    Raises:
        ValueError: If it is none, or does not match a key.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`key_pattern` {pattern!r} is no regular expression: {error}.") from error
    parts = []
    for key in keys.to_pylist():
        match = expression.search(key)
        parts.append(match and match.group(1 if expression.groups else 0))
        if parts[-1] is None:
            raise ValueError(f"`key_pattern` {pattern!r} does not match the key {key!r}.")
    return pa.array(parts, pa.string())


def file_names(keys: Strings) -> Strings:
    """The last part of every key."""
    return _matched_part(keys, FILE_NAME)


def _matched_part(texts: Strings, pattern: str) -> Strings:
    """The group "part" of an expression of RE2 in every text, null where it does not match."""
    return pc.struct_field(pc.extract_regex(texts, pattern), "part")


def repeated_keys(keys: Strings) -> list[str]:
    """The first keys that come more than once."""
    keys = _composed(keys)
    if len(pc.unique(keys)) == len(keys):  # a third of the time of counting
        return []
    counts = pc.value_counts(keys)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[:MAX_NAMED].to_pylist()


def find_keys(keys: Strings, among: Strings) -> np.ndarray:
    """Row of each key among others, which are all different, `(n,)` int64; -1 for a key that is not there."""
    rows = pc.index_in(_composed(keys), value_set=_composed(among))
    return pc.fill_null(rows, -1).to_numpy().astype(np.int64)


def have_equal_keys(keys: Strings, others: Strings) -> bool:
    """Whether two columns of keys are the same in the same order."""
    return len(keys) == len(others) and pc.all(pc.equal(_composed(keys), _composed(others)), min_count=0).as_py()


def _composed(keys: Strings) -> Strings:
    return pc.utf8_normalize(keys, form="NFC")


def hash_keys(keys: Strings) -> np.ndarray:
    """64-bit hashes of keys, `(n,)` int64. Records of label sets hold a digest of them, so that they never change."""
    digests = bytearray()
    for start in range(0, len(keys), ROWS_PER_BLOCK):
        for key in keys[start : start + ROWS_PER_BLOCK].to_pylist():
            digests += hashlib.blake2b(unicodedata.normalize("NFC", key).encode(), digest_size=8).digest()
    return np.frombuffer(digests, dtype="<i8")
