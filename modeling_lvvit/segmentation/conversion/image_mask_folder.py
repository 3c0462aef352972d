"""Turns a folder of images and a folder of masks into Parquet files for `lvvit segment`.

    lvvit masks IMAGES MASKS --output_dir my_data --class_names_file names.txt
    lvvit masks IMAGES MASKS --output_dir my_data --colors colors.json
    lvvit masks IMAGES MASKS --output_dir my_data --nearest_values 0 255

A mask has the name of its image, whatever its ending. Where both folders have the same sub-folders and all are named after splits
(train, training, val, validation, test, ...), these become splits; else everything is `train`, of which the training program holds out
a share. Masks hold class ids; or colors, of which `--colors` names the classes: a JSON file `{"road": [128, 64, 128], ...}`; or gray levels
between a few values (JPEG files, soft borders), each of which becomes the nearest one of `--nearest_values`.
"""

import io
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.hf_argparser import HfArg

from ...console import program, progress_bar
from ...data.classes.class_labels import read_class_names
from ...data.image_folder import SPLIT_FOLDERS
from ...data.images import IMAGE_ERRORS, MAX_PIXELS_HELP, PixelLimit, decode_image
from ...data.masks import IGNORED, MAX_VALUE, list_values, read_mask
from ...options import Program
from .dataset_writer import (
    Pair,
    check_pairs,
    list_images,
    pair_files,
    write_segmentation_set,
)


@dataclass
class MaskFolderArguments:
    """Options of the program."""

    images: Path = HfArg(help="Folder of images.")
    masks: Path = HfArg(help="Folder of masks.")
    output_dir: str | None = HfArg(default=None, help="Folder to create.")
    mask_suffix: str = HfArg(default="", help="What names of masks have after those of their images, e.g. _mask.")
    class_names_file: str | None = HfArg(
        default=None, help="JSON or text file with the names of the classes.", aliases=["--class_names"]
    )
    colors: str | None = HfArg(default=None, help="JSON file with the color of each class.")
    ignore_other_colors: bool = HfArg(default=False, help="Colors of no class do not count.")
    nearest_values: list[int] | None = HfArg(
        default=None, help="Values of the classes; every pixel takes the nearest, e.g. 0 255."
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)


PROGRAM = Program("lvvit masks", __doc__, (MaskFolderArguments,), ("images", "masks"), required=("output_dir",))
MAX_LISTED = 5
MAX_CLASSES_TO_SUGGEST = 16


def split_pairs(pairs: dict[str, Pair]) -> dict[str, list[Pair]]:
    """Split -> images: by the first folder of their paths, if these are all called after splits."""
    splits = defaultdict(list)
    for key, pair in pairs.items():
        folder, has_folder, _ = key.lower().partition("/")
        if not has_folder or folder not in SPLIT_FOLDERS:
            return {"train": list(pairs.values())}
        splits[SPLIT_FOLDERS[folder]].append(pair)
    return dict(splits)


def read_colors(path: Path) -> dict[str, tuple[int, int, int]]:
    """Class name -> color, in the order of the class ids; a `ValueError` if the file holds something else, or a color twice."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of colors {path}.")
    try:
        colors = {name: tuple(map(int, color)) for name, color in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} must be JSON like {{"road": [128, 64, 128]}}: {error}') from error
    if len(colors) > IGNORED or not all(len(c) == 3 and all(0 <= v <= 255 for v in c) for c in colors.values()):
        raise ValueError(f"{path} must give each of at most {IGNORED} classes three numbers from 0 to 255.")
    if len(set(colors.values())) != len(colors):
        raise ValueError(f"{path} has a color twice.")
    return colors


def colors_to_ids(colors: dict[str, tuple[int, int, int]], ignores_others: bool) -> Callable[[Path], bytes]:
    """From a file in colors to a PNG of class ids; other colors are errors, or with `ignores_others` become 255."""
    table = np.full(1 << 24, IGNORED, dtype=np.uint8)
    for index, (red, green, blue) in enumerate(colors.values()):
        table[red << 16 | green << 8 | blue] = index

    def content(path: Path) -> bytes:
        channels = np.asarray(decode_image({"bytes": None, "path": str(path)})).astype(np.uint32)
        codes = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
        ids = table[codes]
        if not ignores_others and (ids == IGNORED).any():
            others = np.unique(codes[ids == IGNORED])
            listed = ", ".join(f"[{c >> 16}, {c >> 8 & 255}, {c & 255}]" for c in others[:MAX_LISTED].tolist())
            more = ", ..." if len(others) > MAX_LISTED else ""
            raise ValueError(
                f"it has {len(others)} colors that no class has: {listed}{more} (--ignore_other_colors marks them 255)"
            )
        return as_png(ids)

    return content


def nearest_ids(values: Sequence[int]) -> Callable[[Path], bytes]:
    """From a file with gray levels to a PNG of class ids: of the nearest of some values, of two the first."""
    if not 2 <= len(set(values)) == len(values) <= IGNORED or not all(0 <= value <= MAX_VALUE for value in values):
        raise ValueError(
            f"`nearest_values` must be 2 to {IGNORED} different values from 0 to {MAX_VALUE}, got {list(values)}."
        )
    table = np.abs(np.arange(MAX_VALUE + 1)[:, None] - np.array(values)).argmin(axis=1).astype(np.uint8)
    return lambda path: as_png(table[read_mask({"bytes": None, "path": str(path)})])


def as_png(ids: np.ndarray) -> bytes:
    """A PNG file of class ids, uint8 `(height, width)`."""
    buffer = io.BytesIO()
    Image.fromarray(ids).save(buffer, format="PNG")
    return buffer.getvalue()


def values_note(pairs: Sequence[Pair]) -> str:
    """Which values the masks hold, and the option that they need in training where they do not count classes."""
    is_there = np.zeros(MAX_VALUE + 1, dtype=bool)
    for pair in progress_bar(pairs, desc="Counting values", unit="mask"):
        try:
            is_there[np.unique(read_mask({"bytes": None, "path": str(pair.mask)}))] = True
        except IMAGE_ERRORS as error:
            raise ValueError(f"{pair.mask} cannot be used: {error}") from error
    values = np.flatnonzero(is_there)
    note = f"Masks are stored as they were, with the values {list_values(values)}."
    others = values[values != IGNORED]
    if 1 < len(values) <= MAX_CLASSES_TO_SUGGEST and (len(others) < 2 or others[-1] >= len(others)):
        note += (
            f" If each is a class, train with `--mask_values {' '.join(map(str, values))}`; else {IGNORED} is ignored."
        )
    return note


def build(args: MaskFolderArguments) -> tuple[dict[str, int], str]:
    """Writes the dataset; returns the number of images of each split and what there is to say of the masks."""
    PixelLimit(args.max_image_pixels)
    if args.colors is not None and (args.class_names_file or args.nearest_values):
        raise ValueError(
            "Give --colors, which names the classes, or --class_names_file and --nearest_values, not both."
        )
    colors = read_colors(Path(args.colors)) if args.colors is not None else None
    names = (
        read_class_names(Path(args.class_names_file)) if args.class_names_file is not None else colors and list(colors)
    )
    contents, notes = {}, f"Masks hold class ids; {IGNORED} does not count."
    if args.nearest_values is not None:
        contents = {"mask_content": nearest_ids(args.nearest_values)}
        notes = f"Masks hold class ids, of the nearest of the values {args.nearest_values}."
        if names is not None and len(names) != len(args.nearest_values):
            raise ValueError(f"There are {len(names)} class names and {len(args.nearest_values)} `nearest_values`.")
    pairs = pair_files(list_images(args.images), list_images(args.masks), args.mask_suffix)
    check_pairs(list(pairs.values()), allows_colors=colors is not None)
    if colors is not None:
        contents = {"mask_content": colors_to_ids(colors, args.ignore_other_colors)}
    elif not contents:
        notes = values_note(list(pairs.values()))
    return write_segmentation_set(Path(args.output_dir), split_pairs(pairs), names, notes, **contents), notes


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        counts, notes = build(args)
    print(f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} images -> {args.output_dir}. {notes}")


if __name__ == "__main__":
    main(sys.argv[1:])
