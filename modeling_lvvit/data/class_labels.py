"""The label column of image data: class names, class ids or `ClassLabel`, in the end always `ClassLabel`; and which of an
annotator's classes are those of the data."""

from collections.abc import Sequence
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
            folders = " (An image folder gets labels only when it has two or more class folders.)"
            raise ValueError(
                f"{name} has no column {column!r}; it has {rows.column_names}. Name it with `{parameter}`."
                + (folders if column == "label" else "")
            )


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
    values = rows.select_columns(column).with_format("arrow")[:][column]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return sorted(set(pc.unique(values.drop_null()).to_pylist())), True
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
    ids = rows.select_columns(column).with_format("numpy")[:][column]
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
) -> datasets.Dataset:
    """Turns a column of class names, or of plain integers, into a `ClassLabel` column.

    Args:
        name: What messages call the data.
        like: Rows whose classes these must have.
        class_names: Names of the classes that plain integers count, if they are told elsewhere.

    Raises:
        ValueError: If a label is missing, is no class, or is a class that `like` lacks.
    """
    if not len(rows):
        raise ValueError(f"{name} has no rows in split {rows.split}.")
    column_type = rows.features.arrow_schema.field(column).type
    is_text = pa.types.is_string(column_type) or pa.types.is_large_string(column_type)
    if not (is_text or pa.types.is_integer(column_type) or pa.types.is_boolean(column_type)):
        raise ValueError(f"Column {column!r} of {name} must hold class ids or names, got {column_type}.")
    values = rows.select_columns(column).with_format("arrow")[:][column]
    if values.null_count:
        row = pc.index(values.is_null().combine_chunks(), True).as_py()
        raise ValueError(f"Row {row} of {name}, split {rows.split}, has no label in column {column!r}.")
    if like is not None:
        names = like.features[column].names
        if is_text and (foreign := sorted(set(pc.unique(values).to_pylist()) - set(names))):
            raise ValueError(f"Split {rows.split} of {name} has classes that training lacks: {foreign[:MAX_NAMED]}.")
        others = getattr(rows.features[column], "names", names)
        if others != names and has_names(names) and has_names(others):
            return _renumbered(rows, name, column, like.features[column])
    elif isinstance(rows.features[column], datasets.ClassLabel):
        names = rows.features[column].names
    elif is_text:
        names = sorted(set(pc.unique(values).to_pylist()))
    else:
        lowest, highest = (value.as_py() for value in pc.min_max(pc.cast(values, pa.int64())).values())
        if not 0 <= lowest <= highest < MAX_CLASSES:
            raise ValueError(
                f"Column {column!r} of {name} has ids from {lowest} to {highest}; class ids count from 0 "
                f"and stay below {MAX_CLASSES:,}."
            )
        names = [str(index) for index in range(highest + 1)]
        if class_names is not None and highest < len(class_names):
            names = class_names
    if len(names) < 2:
        raise ValueError(f"{name} has {len(names)} class in column {column!r}; a classifier needs two.")
    feature = datasets.ClassLabel(names=names)
    if rows.features[column] == feature:
        return rows
    if rows.features[column].dtype == "large_string":  # which the library cannot turn into class ids
        rows = rows.cast_column(column, datasets.Value("string"))
    return rows.cast_column(column, feature)
