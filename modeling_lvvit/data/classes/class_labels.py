"""The label column of image data: class names, class ids or `ClassLabel`, in the end always `ClassLabel`; and which of an
annotator's classes are those of the data."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .class_matching import (
    ClassMap,
    find_namesakes,
    has_names,
    match_classes,
    read_class_map,
    same_classes,
    wordnet_names,
)


logger = logging.get_logger(__name__)
MAX_CLASSES = 1_000_000  # ids beyond are no class ids
MAX_NAMED = 10


def check_columns(rows: datasets.Dataset | datasets.IterableDataset, name: str, image: str, label: str) -> None:
    """Raises a `ValueError` if image data, which messages call by `name`, lacks one of the two columns."""
    for column, parameter in ((image, "image_column"), (label, "label_column")):
        if column not in rows.column_names:
            folders = f" In an image folder the class folders are the labels (train/cat/1.jpg); {_count_rows(rows)} lie in none."
            raise ValueError(
                f"{name} has no column {column!r}; it has {rows.column_names}. Name it with `{parameter}`."
                + (folders if column == "label" else "")
            )


def check_single_classes(rows: datasets.Dataset, name: str, column: str) -> None:
    """Raises a `ValueError` if images have lists of classes in a column."""
    column_type = rows.features.arrow_schema.field(column).type
    if pa.types.is_nested(column_type):
        raise ValueError(
            f"Column {column!r} of {name} holds several values of each image ({column_type}). Here each has one class: name another column "
            "with `label_column`. Images with several classes (multi-label) can be trained on with plain labels, evaluated and predicted."
        )


def _count_rows(rows: datasets.Dataset | datasets.IterableDataset) -> str:
    """How many rows of a split there are, for a message."""
    split = f" of split {rows.split}" if rows.split else ""
    return f"the {len(rows):,} rows{split}" if isinstance(rows, datasets.Dataset) else f"the rows{split}"


def class_counts(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Rows of each class of a `ClassLabel` column, `(classes,)` int64."""
    ids = class_ids(rows, column)
    return np.bincount(ids[ids >= 0], minlength=rows.features[column].num_classes)


def read_column(rows: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column as it is stored."""
    return rows.select_columns(column).with_format("arrow")[:][column]


def is_text(column_type: pa.DataType) -> bool:
    """Whether the values of an Arrow column are texts."""
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def class_ids(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Values of a column of class ids, `(n,)` int64; -1 for missing ones."""
    return read_column(rows, column).fill_null(-1).to_numpy()


def describe_classes(rows: datasets.Dataset, split: str, column: str) -> str:
    """One line: images, classes, smallest and largest class of a split with a `ClassLabel` column."""
    names, counts = rows.features[column].names, class_counts(rows, column)
    present = np.flatnonzero(counts)
    if not len(present):
        return f"{split}: {f'{len(rows):,} images without label' if len(rows) else 'no images'}"
    least, most = present[counts[present].argmin()], present[counts[present].argmax()]
    sizes = f"from {counts[least]:,} ({names[least]}) to {counts[most]:,} ({names[most]})"
    if counts[least] == counts[most]:
        sizes = f"{counts[most]:,} each"
    text = f"{split}: {counts.sum():,} images of {len(present):,} classes, {sizes}"
    return f"{text}; {missing:,} images without label" if (missing := len(rows) - counts.sum()) else text


def warn_of_missing_classes(names: Sequence[str], counts: Mapping[str, np.ndarray]) -> None:
    """Warns of classes that have no training image, which cannot be learned, or no evaluation image, which are not evaluated.

    Args:
        names: Of the classes, by id.
        counts: What a part of the data is called -> images of each class, `(classes,)`.
    """
    for part, number in counts.items():
        missing = [names[index] for index in np.flatnonzero(number == 0)]
        if missing:
            more = ", ..." if len(missing) > MAX_NAMED else ""
            logger.warning(
                "%d of %d classes have no %s image: %s%s.",
                len(missing), len(names), part, ", ".join(missing[:MAX_NAMED]), more,
            )  # fmt: skip


def names_in_data(
    rows: datasets.Dataset | datasets.IterableDataset, name: str, column: str
) -> tuple[list[str] | None, bool]:
    """Class names that a label column itself tells, and whether they are more than numbers.

    Args:
        name: What messages call the data.

    Returns:
        Names in the order of the ids that `with_class_ids` gives, `None` without the column; and whether they name classes
        (plain integers, which count classes that are named elsewhere, do not).

    Raises:
        ValueError: If the column holds neither, or is text that a stream would have to be read for.
    """
    if column not in (rows.column_names or rows.features or ()):
        return None, False
    if isinstance(feature := (rows.features or {}).get(column), datasets.ClassLabel):
        return feature.names, True
    if isinstance(rows, datasets.IterableDataset):
        raise ValueError(f"In a stream column {column!r} of {name} must be a ClassLabel, got {feature}.")
    check_single_classes(rows, name, column)
    values = read_column(rows, column)
    if is_text(values.type):
        return sorted(set(pc.unique(_without_missing(values, False).drop_null()).to_pylist())), True
    if not pa.types.is_integer(values.type) or not len(values):
        raise ValueError(f"Column {column!r} of {name} must hold class ids or names, got {values.type}.")
    highest = pc.max(values).as_py()
    if highest is None or not 0 <= highest < MAX_CLASSES:
        raise ValueError(f"Column {column!r} of {name} has the id {highest}; class ids count from 0.")
    return [str(index) for index in range(highest + 1)], False


def pair_classes(
    annotator_names: Sequence[str],
    data_names: Sequence[str],
    are_named: bool,
    class_map: str | None,
    ignore_extra: bool,
    data: str,
) -> tuple[ClassMap | None, list[str]]:
    """From the classes of an annotator to those of a dataset, as the user wants it.

    Args:
        annotator_names, data_names: Class names by id.
        are_named: Whether those of the data are more than numbers.
        class_map: `None` pairs by name; `"identity"`; or a file, see `read_class_map`.
        ignore_extra: Whether the annotator may have classes that the data lacks.
        data: What messages call the data.

    Returns:
        The map, `None` if both number their classes alike, and the class names of the labels.

    Raises:
        ValueError: If the classes do not match or cannot be compared.
    """
    if class_map == "identity":
        if len(annotator_names) < len(data_names) or (are_named and len(annotator_names) != len(data_names)):
            raise ValueError(
                f"The annotator has {len(annotator_names)} classes, the data {len(data_names)}: not identical."
            )
        return None, list(data_names if are_named else annotator_names)
    if class_map is not None:
        return read_class_map(Path(class_map).expanduser(), annotator_names, data_names), list(data_names)
    if not are_named:
        examples = ", ".join(repr(name) for name in annotator_names[:2])
        raise ValueError(
            f"{data} holds numbers that are not named, so no one can tell whether they count the annotator's classes "
            f"({examples}, ...). Say so with `class_map` identity, or which is which with `class_map` FILE."
        )
    wordnet = wordnet_names([*annotator_names, *data_names])
    return match_classes(annotator_names, data_names, wordnet, ignore_extra), list(data_names)


def check_class_names(label_names: Sequence[str] | None, dataset_names: Sequence[str]) -> None:
    """Raises a `ValueError` if ids of a label set (`None` if it does not name its classes) and of image data mean other classes."""
    if label_names is None or same_classes(label_names, dataset_names):
        return
    differing = [
        f"{index}: {label_name!r} in the label set, {name!r} in the data"
        for index, (label_name, name) in enumerate(zip(label_names, dataset_names))
        if label_name != name
    ]
    raise ValueError(
        f"The label set has {len(label_names)} classes, the data has {len(dataset_names)}, and they are not the same ones"
        + (": " + "; ".join(differing[:MAX_NAMED]) if differing else "")
        + ". Annotate these images again, or use the dataset that the labels were made for."
    )


def _renumbered(rows: datasets.Dataset, name: str, column: str, feature: datasets.ClassLabel) -> datasets.Dataset:
    """Rows whose classes, paired by name, have the ids of another `ClassLabel`; errors as in `with_class_ids`."""
    names = rows.features[column].names
    partners = find_namesakes(feature.names, names)
    ids = class_ids(rows, column)
    if foreign := [names[index] for index in np.unique(ids) if index >= 0 and index not in partners]:
        raise ValueError(f"Split {rows.split} of {name} has classes that training lacks: {foreign[:MAX_NAMED]}.")
    new_ids = np.array([partners.get(index, -1) for index in range(len(names))])
    if any(old != new for old, new in partners.items()):
        text = "Split %s of %s counts its classes in another order than training; they are paired by their names."
        logger.warning(text, rows.split, name)
    return rows.remove_columns(column).add_column(column, np.where(ids < 0, ids, new_ids[ids]), feature=feature)


def with_class_ids(
    rows: datasets.Dataset,
    name: str,
    column: str,
    like: datasets.Dataset | None = None,
    class_names: list[str] | None = None,
    may_be_missing: bool = False,
) -> datasets.Dataset:
    """Turns a column of class names, or of plain integers, into a `ClassLabel` column.

    Args:
        name: What messages call the data.
        like: Rows whose classes these must have.
        class_names: Names of the classes that plain integers count, or that labels name of which some are missing, if they are told
            elsewhere.
        may_be_missing: Whether rows without a label (null, an empty text or a negative number) get the class -1.

    Raises:
        ValueError: If a label is missing and may not, is no class, or is a class that `like` lacks.
    """
    if not len(rows):
        raise ValueError(f"{name} has no rows in split {rows.split}.")
    check_single_classes(rows, name, column)
    column_type = rows.features.arrow_schema.field(column).type
    if pa.types.is_null(column_type) and may_be_missing and class_names is not None:
        rows, column_type = rows.cast_column(column, datasets.Value("string")), pa.string()
    is_name = is_text(column_type)
    if not (is_name or pa.types.is_integer(column_type) or pa.types.is_boolean(column_type)):
        raise ValueError(f"Column {column!r} of {name} must hold class ids or names, got {column_type}.")
    stored = read_column(rows, column)
    values = _without_missing(stored, may_be_missing)
    if values.null_count and not may_be_missing:
        row = pc.index(values.is_null().combine_chunks(), True).as_py()
        raise ValueError(
            f"Row {row} of {name}, split {rows.split}, has no label in column {column!r}, like {values.null_count:,} of {len(values):,} rows. "
            "Images without a label can be trained on with dense labels: `token_labels`, or `annotator`."
        )
    is_named = isinstance(rows.features[column], datasets.ClassLabel)
    if is_named:
        present = rows.features[column].names
    else:
        labels = values.drop_null()
        present = sorted(set(pc.unique(labels).to_pylist())) if is_name else _numbered_names(labels, name, column)
    names = present if like is None else like.features[column].names
    if like is None and class_names is not None and not is_named:
        # numbers count the classes of the label set; names are those of the set where some labels are missing, maybe all of a class
        is_part = (
            values.null_count and set(present) <= set(class_names) if is_name else len(present) <= len(class_names)
        )
        names = class_names if is_part else names
    if len(names) < 2:
        raise ValueError(f"{name} has {len(names)} class in column {column!r}; a classifier needs two.")
    feature = datasets.ClassLabel(names=names)
    if rows.features[column] == feature and not stored.null_count:
        return rows
    if is_named and has_names(names) and has_names(present):
        return _renumbered(rows, name, column, feature)
    if is_name:
        if foreign := sorted(set(present) - set(names)):
            raise ValueError(f"Split {rows.split} of {name} has classes that training lacks: {foreign[:MAX_NAMED]}.")
        values = pc.index_in(values.cast(pa.string()), pa.array(names))
    elif len(present) > len(names):
        raise ValueError(
            f"Split {rows.split} of {name} has class ids up to {len(present) - 1}, but there are {len(names)} classes."
        )
    ids = values.cast(pa.int64()).fill_null(-1).to_numpy()
    return rows.remove_columns(column).add_column(column, ids, feature=feature)


def _without_missing(labels: pa.ChunkedArray, with_negative: bool) -> pa.ChunkedArray:
    """Labels with null in place of empty texts, and of negative numbers if these stand for no label too."""
    if is_text(labels.type):
        is_missing = pc.equal(pc.utf8_trim_whitespace(labels), "")
    elif with_negative and pa.types.is_integer(labels.type):
        is_missing = pc.less(labels, 0)
    else:
        return labels
    return pc.if_else(is_missing, pa.scalar(None, labels.type), labels)


def _numbered_names(ids: pa.ChunkedArray, name: str, column: str) -> list[str]:
    """Names of the classes that plain integers count, "0" to the highest; a `ValueError` if they are no class ids."""
    if not len(ids):
        return []
    lowest, highest = (value.as_py() for value in pc.min_max(ids.cast(pa.int64())).values())
    if not 0 <= lowest <= highest < MAX_CLASSES:
        raise ValueError(
            f"Column {column!r} of {name} has ids from {lowest} to {highest}; class ids count from 0 and stay below {MAX_CLASSES:,}."
        )
    return [str(index) for index in range(highest + 1)]


def read_class_names(path: Path) -> list[str]:
    """Class names in the order of their ids: of a JSON file (a list, or ids to names), or of a text file with one in a line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of class names {path}.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        if isinstance(names, dict):
            names = [names[str(index)] for index in range(len(names))]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} holds no class names: expected ids from 0 to names, got an error at {error}."
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds no class names: expected a list of names, or ids to names.")
    return names
