"""Image folders: which files are images, and which split and class each belongs to.

The first folder level names splits if all its folders are called after splits (`SPLIT_FOLDERS`); the next level names classes. A folder
that holds nothing but one other folder is passed over. Every file that Pillow can open is an image. Nothing is left out without a word:
`Layout.left_out` has the other files with the reasons. The rule is our own, because the `datasets` library guesses splits from any part
of a path, classes from the innermost folder, and passes over what does not fit.
"""

import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import datasets
import pandas as pd
import pyarrow as pa
from PIL import Image

from .images import IMAGE_ERRORS, pillow_errors


SPLIT_FOLDERS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "eval": "validation", "test": "test", "testing": "test",
}  # fmt: skip
SYSTEM_NAMES = {"@eadir", "__macosx", "lost+found", "system volume information", "$recycle.bin", "thumbs.db", "desktop.ini"}  # fmt: skip
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"
UNREADABLE = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow recognizes these, but cannot decode them by itself
MAX_NAMED, MAX_ENDINGS = 3, 6

NO_IMAGE, NO_CLASS, NO_SPLIT = "no image files", "in no class folder", "in no folder of a split"
NO_TEXT = "names that are no UTF-8"
TWICE, LOOP, NO_FILE, NO_ROW = "links to an image that is there already", "a link to a folder above it", "a link to nothing", "without a row in the metadata"  # fmt: skip


@dataclass
class Layout:
    """What an image folder holds. Paths are relative to it, with slashes.

    Args:
        splits: Split -> paths and classes of its images, sorted by path; class `None` in a split without class folders.
        left_out: Reason -> paths of files and folders that are not used.
        notes: Sentences about choices that a user may not expect.
    """

    splits: dict[str, list[tuple[str, str | None]]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Classes of all splits, sorted."""
        return sorted({name for rows in self.splits.values() for _, name in rows if name is not None})

    def warnings(self) -> list[str]:
        """Sentences about all that a user should know of, see `notes` and `left_out`."""
        lines = list(self.notes)
        for reason, paths in self.left_out.items():
            endings = Counter(PurePosixPath(path).suffix or "no ending" for path in paths)
            most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:MAX_ENDINGS]
            counts = ", ".join(f"{count:,} {ending}" for ending, count in most)
            about = f" ({counts})" if reason == NO_IMAGE else ""
            lines.append(f"Left out, {reason}: {len(paths):,}{about}: {_first(paths)}.")
        return lines


@dataclass
class FolderContent:
    """All files of a folder and those below it, links followed, hidden and system files ignored. Paths as in `Layout`.

    Args:
        images: Files that Pillow can open, with device and inode, which are those of the target of a link.
        metadata: Metadata files.
        empty: Folders without files.
        left_out: See `Layout`.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def image_suffixes() -> set[str]:
    """Endings, in lower case, of the image files that Pillow can decode."""
    return {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in UNREADABLE
    }


def read_layout(folder: Path) -> tuple[Layout, pd.DataFrame | None]:
    """Finds the images of a folder, their splits and their classes, and the rows of its metadata files by the path of their image.

    Raises:
        ValueError: If folders are partly called after splits, two are the same split, an image is in two splits or classes, or metadata
            does not fit the files.
    """
    content = list_folder(folder)
    layout = Layout(left_out=content.left_out, notes=[f"The folder {path} is empty." for path in content.empty])
    rows = _read_metadata(folder, content, layout) if content.metadata else None
    images = content.images if rows is None else {path: content.images[path] for path in rows.index}
    _arrange(layout, images, is_listed=rows is not None)
    return layout, rows


def list_folder(folder: Path) -> FolderContent:
    """All files of a folder and those below it."""
    content = FolderContent()
    _list_folder(folder, "", content, image_suffixes(), ())
    # some file systems (FUSE) give all entries of a folder one inode; those of the files themselves cost a call each
    number = Counter(content.images.values())
    for path, file in content.images.items():
        if number[file] > 1:
            status = os.stat(folder / path)
            content.images[path] = status.st_dev, status.st_ino
    return content


def image_rows(folder: Path, layout: Layout, metadata: pd.DataFrame | None) -> datasets.DatasetDict:
    """The images of a folder, see `read_layout`, as rows with the columns `image`, `label` (where there are class folders) and those of metadata files
    (`metadata.csv`, `.jsonl` or `.parquet` with the column `file_name`; `X_file_name` becomes a column `X` of images).
    """
    names = layout.class_names
    if metadata is not None and ("label" in metadata or len(names) < 2):
        names = []
    splits = {}
    for split, images in layout.splits.items():
        paths, classes = zip(*images)
        columns = {"image": _image_column(folder, paths)}
        features = {"image": datasets.Image()}
        if names and classes[0] is not None:
            ids = {name: index for index, name in enumerate(names)}
            columns["label"] = pa.array([ids[name] for name in classes], pa.int64())
            features["label"] = datasets.ClassLabel(names=names)
        if metadata is not None:
            more, more_features = _metadata_columns(folder, metadata.loc[list(paths)])
            columns, features = {**columns, **more}, {**features, **more_features}
        table = pa.table(columns)
        info = datasets.DatasetInfo(features=datasets.Features(features))
        splits[split] = datasets.Dataset(table, info=info, split=datasets.NamedSplit(split))
    return datasets.DatasetDict(splits)


def _list_folder(root: Path, path: str, content: FolderContent, suffixes: set[str], above: tuple) -> None:
    """Adds the files below `path`; `above` has device and inode of the folders on the way, so that links in circles end."""
    status = os.stat(root / path)
    above = (*above, (status.st_dev, status.st_ino))
    has_files = False
    with os.scandir(root / path) as iterator:
        entries = sorted(iterator, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_NAMES:
            continue
        has_files, name = True, f"{path}/{entry.name}" if path else entry.name
        shown = os.fsencode(name).decode(errors="replace")
        if shown != name:
            content.left_out[NO_TEXT].append(shown)
        elif _leads_nowhere(entry):
            content.left_out[NO_FILE].append(name)
        elif entry.is_dir():
            target = entry.stat()
            if (target.st_dev, target.st_ino) in above:
                content.left_out[LOOP].append(name)
            else:
                _list_folder(root, name, content, suffixes, above)
        elif entry.name.casefold() in METADATA_FILES:
            content.metadata.append(name)
        elif _is_image(entry, suffixes):
            target = entry.stat() if entry.is_symlink() else None
            content.images[name] = (target.st_dev, target.st_ino) if target else (status.st_dev, entry.inode())
        else:
            content.left_out[NO_IMAGE].append(name)
    if path and not has_files:
        content.empty.append(path)


def _leads_nowhere(entry: os.DirEntry) -> bool:
    try:
        return not (entry.is_dir() or entry.is_file())
    except OSError:  # to itself
        return True


def _is_image(entry: os.DirEntry, suffixes: set[str]) -> bool:
    stem, dot, ending = entry.name.rpartition(".")
    if dot and stem:
        return f".{ending.lower()}" in suffixes
    try:  # a name without an ending says nothing
        with pillow_errors(), Image.open(entry.path) as image:
            return image.format not in UNREADABLE
    except IMAGE_ERRORS:
        return False


def _arrange(layout: Layout, images: dict[str, tuple[int, int]], is_listed: bool) -> None:
    """Sorts images into splits and classes; metadata may list images outside class folders (`is_listed`)."""
    prefix = _only_folder(images)
    if prefix:
        layout.notes.append(f"The images are read from {prefix}, the only folder with images.")
    tops = defaultdict(list)
    for path in sorted(images):
        top, slash, _ = path[len(prefix) :].partition("/")
        tops[top if slash else ""].append(path)
    folders = [top for top in tops if top]
    with_folders = {top for top in folders if _has_folders(tops[top], f"{prefix}{top}/")}
    split_names = _split_names(folders, with_folders)
    if split_names:
        layout.left_out[NO_SPLIT] += tops.get("", [])
        splits = {
            split: _with_classes(layout, tops[top], f"{prefix}{top}/", is_listed) for top, split in split_names.items()
        }
        layout.splits = {split: splits[split] for split in SPLIT_FOLDERS.values() if split in splits}
    elif images:
        layout.splits = {"train": _with_classes(layout, sorted(images), prefix, is_listed)}
    _drop_repeated(layout, images)
    layout.left_out = {reason: paths for reason, paths in layout.left_out.items() if paths}


def _only_folder(images: Iterable[str]) -> str:
    """The folders that all images have in common and that neither are splits nor classes: "photos/" of photos/cat/1.jpg and
    photos/dog/2.jpg; "" if there are none."""
    prefix, paths = "", list(images)
    while paths:
        top, slash, _ = paths[0][len(prefix) :].partition("/")
        longer = f"{prefix}{top}/"
        if not slash or top.casefold() in SPLIT_FOLDERS or not all(path.startswith(longer) for path in paths):
            break
        if not _has_folders(paths, longer):
            break
        prefix = longer
    return prefix


def _has_folders(paths: Iterable[str], prefix: str) -> bool:
    """Whether some of the paths, which begin with the prefix, lie in folders below it."""
    return any("/" in path[len(prefix) :] for path in paths)


def _split_names(folders: list[str], with_folders: set[str]) -> dict[str, str]:
    """Folder -> split, empty if the folders are classes.

    Args:
        folders: Names of the first level.
        with_folders: Those that hold folders with images.
    """
    splits = {top: SPLIT_FOLDERS[top.casefold()] for top in folders if top.casefold() in SPLIT_FOLDERS}
    others = [top for top in folders if top not in splits]
    if others and not with_folders & set(splits):
        return {}  # a class may be called "train"
    if others and splits:
        raise ValueError(
            f"The folders {_first(list(splits))} are called after splits, {_first(others)} are not. Move the latter away, "
            f"or rename them: {', '.join(SPLIT_FOLDERS)}."
        )
    for split in set(splits.values()):
        same = [top for top, name in splits.items() if name == split]
        if len(same) > 1:
            raise ValueError(f"The folders {' and '.join(same)} are both the split {split}. Keep one, or join them.")
    return splits


def _with_classes(layout: Layout, paths: list[str], prefix: str, is_listed: bool) -> list[tuple[str, str | None]]:
    """Images of a split with their classes, the folders below `prefix`; without such folders all have none, and so have images that
    metadata list, if some lie in none."""
    rest = [path[len(prefix) :].split("/") for path in paths]
    are_outside = [len(parts) == 1 for parts in rest]
    if all(are_outside) or (is_listed and any(are_outside)):
        return [(path, None) for path in paths]
    layout.left_out[NO_CLASS] += [path for path, parts in zip(paths, rest) if len(parts) == 1]
    if deeper := [path for path, parts in zip(paths, rest) if len(parts) > 2]:
        layout.notes.append(
            f"{len(deeper):,} images lie in folders inside class folders and have the class of the outer one: {_first(deeper)}."
        )
    # file systems write accents in two ways
    return [(path, unicodedata.normalize("NFC", parts[0])) for path, parts in zip(paths, rest) if len(parts) > 1]


def _drop_repeated(layout: Layout, images: dict[str, tuple[int, int]]) -> None:
    """Keeps the first of links to one file; a `ValueError` if they are in two splits, or in two classes of one."""
    first: dict[tuple[int, int], tuple[str, str, str | None]] = {}
    for split, rows in layout.splits.items():
        once = []
        for path, name in rows:
            other = first.setdefault(images[path], (split, path, name))
            if other[1] == path:
                once.append((path, name))
            elif other[0] != split:
                raise ValueError(
                    f"{path} is the same file as {other[1]}: an image must not be in the splits {split} and {other[0]}."
                )
            elif other[2] != name:
                raise ValueError(f"{path} is the same file as {other[1]}, and both are classes. Remove one.")
            else:
                layout.left_out[TWICE].append(path)
        layout.splits[split] = once


def _read_metadata(folder: Path, content: FolderContent, layout: Layout) -> pd.DataFrame:
    """Rows of all metadata files, by the path of their image."""
    parts = []
    for name in content.metadata:
        place = name.rpartition("/")[0]
        try:
            part = _READERS[PurePosixPath(name).suffix.lower()](folder / name)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}") from error
        file_columns = [column for column in part if column == FILE_NAME or column.endswith(f"_{FILE_NAME}")]
        if FILE_NAME not in part:
            raise ValueError(f"{folder / name} needs a column {FILE_NAME!r}; it has {list(part)}.")
        for column in file_columns:
            part[column] = [
                os.path.normpath(f"{place}/{value}" if place else value) for value in part[column].astype(str)
            ]
            if absent := [path for path in part[column] if not (folder / path).is_file()]:
                raise ValueError(f"{folder / name} names {len(absent)} files that are not there: {_first(absent)}.")
        parts.append(part)
    rows = pd.concat(parts, ignore_index=True)
    if repeated := rows[FILE_NAME][rows[FILE_NAME].duplicated()].tolist():
        raise ValueError(f"The metadata of {folder} has several rows for {_first(repeated)}.")
    if foreign := [path for path in rows[FILE_NAME] if path not in content.images]:
        raise ValueError(f"The metadata of {folder} names files that are no images: {_first(foreign)}.")
    used = {path for column in rows if column.endswith(FILE_NAME) for path in rows[column]}
    layout.left_out[NO_ROW] += [path for path in content.images if path not in used]
    return rows.set_index(FILE_NAME)


_READERS = {
    ".csv": pd.read_csv,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),  # text stays text: "001"
    ".parquet": pd.read_parquet,
}


def _metadata_columns(folder: Path, rows: pd.DataFrame) -> tuple[dict[str, pa.Array], dict]:
    columns, features = {}, {}
    for name in rows:
        if name.endswith(f"_{FILE_NAME}"):
            short = name.removesuffix(f"_{FILE_NAME}")
            columns[short], features[short] = _image_column(folder, rows[name]), datasets.Image()
        else:
            columns[name] = pa.Array.from_pandas(rows[name])
            features[name] = datasets.features.features.generate_from_arrow_type(columns[name].type)
    return columns, features


def _image_column(folder: Path, paths: Iterable[str]) -> pa.StructArray:
    """Storage of an image column: the files stay where they are."""
    start = os.path.join(folder, "")
    files = pa.array([start + path for path in paths], pa.string())
    return pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), files], ["bytes", "path"])


def _first(paths: list[str]) -> str:
    return ", ".join(paths[:MAX_NAMED]) + (", ..." if len(paths) > MAX_NAMED else "")
