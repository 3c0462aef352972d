"""Looks over a whole label set: damage, ranges, how sharp its targets are, and what it says."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...console import progress_bar
from ...data.classes.class_matching import shown_names
from ...data.image_keys import repeated_keys
from ..columns import SCORES_COLUMN, LabelMapError, label_map_problems, list_nesting
from ..label_crops import top_classes
from ..label_maps import mass_outside
from ..packing import unpack
from ..reader import label_class_names
from ..storage import (
    EPOCH_COLUMN,
    INDEX_COLUMN,
    KEY_COLUMN,
    NOTE_COLUMN,
    OUTSIDE_COLUMN,
    PALETTE_COLUMN,
    map_problems,
    read_maps,
)
from ..writer import DATA, RECORD


ROWS_PER_BATCH = 1024
MAX_PROBLEMS = 20
SAMPLED_MAPS = 2048  # for the search of a temperature
TARGET_MASS = 0.1  # outside the kept classes, where the annotator's own is not known
FLAT_MARGIN = 0.1  # more than this above it is flat
REQUIRED = (KEY_COLUMN, PALETTE_COLUMN, INDEX_COLUMN, SCORES_COLUMN)


@dataclass
class LabelSetReport:
    """What a check found.

    Args:
        problems: Damage, each a line that names file and row.
        num_maps, num_empty: Rows, and those with an empty label.
        shape: `[K, rows, columns]`.
        stored_mass: Mean probability that a softmax of the scores gives to classes outside the K of a cell.
        annotator_mass: That of the annotator itself; `None` if it is not recorded.
        temperature: Proposed `label_temperature`, `None` if the targets need none, 0 if none helps.
        top_classes: How often each class is the first of a whole map.
        notes: How often each note on an image comes.
    """

    problems: list[str] = field(default_factory=list)
    num_maps: int = 0
    num_empty: int = 0
    class_names: list[str] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    score_range: tuple[float, float] = (np.inf, -np.inf)
    stored_mass: float | None = None
    annotator_mass: float | None = None
    temperature: float | None = None
    top_classes: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)

    def add_problem(self, text: str) -> None:
        """Keeps the first problems and counts the others."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)
        elif len(self.problems) == MAX_PROBLEMS:
            self.problems.append("... (further problems are not listed)")

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.num_maps:,} label maps, {self.num_empty:,} of them empty"]
        if self.shape is not None:
            k, rows, columns = self.shape
            lines.append(f"maps of {rows} x {columns} cells, {k} of {len(self.class_names):,} classes in each")
        if self.stored_mass is not None:
            lines.append(f"scores from {self.score_range[0]:.2f} to {self.score_range[1]:.2f}")
            line = f"probability of the classes that a cell does not name: {100 * self.stored_mass:.1f} % in the training targets"
            if self.annotator_mass is not None:
                line += f", {100 * self.annotator_mass:.1f} % by the annotator itself"
            lines.append(line)
        if self.temperature == 0:
            lines.append(
                "WARNING: most scores are below the 0 of the classes that are not named, so that the targets are mostly of those. No "
                "`label_temperature` mends it: annotate again with `scores` relative."
            )
        elif self.temperature is not None:
            lines.append(
                "WARNING: the targets are flat, because the scores are small next to the 0 of the classes that are not "
                f"named. Train with `label_temperature` {self.temperature:.2g}, or annotate again with `scores` relative."
            )
        if self.top_classes:
            names = shown_names(self.class_names)
            first = ", ".join(f"{names[index]} {count}" for index, count in self.top_classes.most_common(5))
            lines.append(
                f"{len(self.top_classes):,} of {len(self.class_names):,} classes are the first of a map; most often: {first}"
            )
        lines += [f"{count:,} x {note}" for note, count in sorted(self.notes.items())]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        return lines


def check_label_set(folder: Path, split: str = "train") -> LabelSetReport:
    """Reads every shard of a label set; a `FileNotFoundError` if the folder has none of the split."""
    paths = sorted((folder / DATA).glob(f"{split}-*.parquet"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no label set of split {split!r}: there is no {DATA}/{split}-*.parquet.")
    report, sample, masses, keys, outside = LabelSetReport(), [], [], [], []
    for path, table in _tables(paths, report):
        keys += _keys_in_epochs(table).chunks
        if OUTSIDE_COLUMN in table.column_names:
            outside.append(table[OUTSIDE_COLUMN].drop_null().to_numpy())
        scores = _check_rows(table, path, report)
        if scores is not None:
            masses.append(mass_outside(scores, len(report.class_names)).mean(axis=(1, 2)))
            if sum(map(len, sample)) < SAMPLED_MAPS:
                sample.append(scores)
    for key in repeated_keys(pa.chunked_array(keys, pa.string())):
        report.add_problem(f"key {key!r} comes more than once")
    if sum(map(len, outside)):
        report.annotator_mass = float(np.concatenate(outside).mean(dtype=np.float64))
    if masses:
        report.stored_mass = float(np.concatenate(masses).mean(dtype=np.float64))
        report.temperature = _proposed_temperature(report, np.concatenate(sample)[:SAMPLED_MAPS])
    _compare_with_record(folder, paths, split, report)
    return report


def _keys_in_epochs(table: pa.Table) -> pa.ChunkedArray:
    """Keys of rows; in a set of crops, where an image has a row in each epoch, with the number of the epoch before them."""
    keys = table[KEY_COLUMN].fill_null("")
    if EPOCH_COLUMN not in table.column_names:
        return keys
    epochs = table[EPOCH_COLUMN].cast(pa.string()).fill_null("?")
    return pc.binary_join_element_wise("epoch ", epochs, ", ", keys, "")


def _tables(paths: list[Path], report: LabelSetReport) -> Iterator[tuple[Path, pa.Table]]:
    """Rows of all shards a batch at a time; shards that cannot be read, or unlike the first one, are problems."""
    first_schema = None
    for path in progress_bar(paths, desc="Checking", unit="shard"):
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                plain = unpack(schema.empty_table()).schema
                missing = [name for name in REQUIRED if name not in plain.names]
                if missing:
                    report.add_problem(f"{path.name}: no column {', '.join(missing)}")
                    continue
                if first_schema is None:
                    first_schema = schema
                    report.class_names = label_class_names(datasets.Dataset(schema.empty_table())) or []
                    report.shape = tuple(list_nesting(plain.field(INDEX_COLUMN).type)[1])
                elif not schema.equals(first_schema, check_metadata=True):
                    report.add_problem(f"{path.name}: other columns, map size, K or classes than {paths[0].name}")
                    continue
                for batch in file.iter_batches(ROWS_PER_BATCH):
                    yield path, unpack(pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError, ValueError) as error:
            report.add_problem(f"{path.name}: damaged, cannot be read ({str(error).splitlines()[0]})")


def _check_rows(table: pa.Table, path: Path, report: LabelSetReport) -> np.ndarray | None:
    """Checks a batch of rows; returns the scores of its sound maps."""
    num_classes = len(report.class_names) or 2**31
    report.num_maps += len(table)
    for notes in table[NOTE_COLUMN].to_pylist() if NOTE_COLUMN in table.column_names else []:
        report.notes.update(note.split(":")[0] for note in filter(None, (notes or "").split("; ")))
    try:
        lengths = np.asarray(table[PALETTE_COLUMN].combine_chunks().value_lengths().fill_null(-1))
        report.num_empty += int((lengths == 0).sum())
        problems = map_problems(table, num_classes)
        keys = table[KEY_COLUMN]
        if not problems:
            table = table.filter(pa.array(lengths > 0))
            if not len(table):
                return None
            keys = table[KEY_COLUMN]
            maps = read_maps(table, num_classes)
            problems = label_map_problems(maps.ids, maps.scores, num_classes)
    except LabelMapError as error:
        problems = [(error.row, str(error))]
    for row, text in problems:
        report.add_problem(f"{path.name}, image {keys[row].as_py()}: {text}")
    if problems:
        return None
    low, high = report.score_range
    report.score_range = (min(low, float(maps.scores.min())), max(high, float(maps.scores.max())))
    if report.class_names:
        report.top_classes.update(top_classes(maps, num_classes).tolist())
    return maps.scores


def _proposed_temperature(report: LabelSetReport, scores: np.ndarray) -> float | None:
    """Largest temperature at which the targets are as sharp as the annotator's, `None` if 1 does, 0 if none makes them so."""
    wanted = TARGET_MASS if report.annotator_mass is None else report.annotator_mass
    num_classes = len(report.class_names)
    if not num_classes or report.stored_mass <= wanted + FLAT_MARGIN:
        return None
    low, high = 0.01, 1.0
    for _ in range(20):
        middle = (low * high) ** 0.5
        too_flat = mass_outside(scores, num_classes, middle).mean() > wanted
        low, high = (low, middle) if too_flat else (middle, high)
    return low if mass_outside(scores, num_classes, low).mean() <= wanted + FLAT_MARGIN else 0.0


def _compare_with_record(folder: Path, paths: list[Path], split: str, report: LabelSetReport) -> None:
    """Compares what there is with what the set says of itself."""
    record = folder / RECORD
    if not record.is_file():
        return
    try:
        content: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        settings, expected = content["settings"], content.get("report", {}).get("num_images")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        report.add_problem(f"{RECORD} is damaged ({error!r})")
        return
    if expected is None:
        report.add_problem(f"{RECORD} has no report: the set is not finished; start the program that writes it again")
    elif expected != report.num_maps:
        report.add_problem(f"{RECORD} counts {expected:,} maps, {report.num_maps:,} could be read")
    if report.shape is not None and (settings.get("k"), *settings.get("map_size", ())) != report.shape:
        report.add_problem(
            f"{RECORD} says K {settings.get('k')} and map size {settings.get('map_size')}, maps are {report.shape}"
        )
    expected_names = {f"{split}-{shard:05d}.parquet" for shard in range(len(paths))}
    for name in sorted(expected_names - {path.name for path in paths}):
        report.add_problem(f"{name} is missing")
