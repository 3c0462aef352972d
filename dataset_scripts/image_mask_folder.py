"""Turns a folder of images and a folder of masks into Parquet files for `modeling_lvvit.segmentation.train`.

    python dataset_scripts/image_mask_folder.py IMAGES MASKS --output_dir my_data --class_names names.txt
    python dataset_scripts/image_mask_folder.py IMAGES MASKS --output_dir my_data --colors colors.json

A mask has the name of its image, whatever its ending. Where both folders have the same sub-folders and all are named after splits
(train, training, val, validation, test, ...), these become splits; else everything is `train`, of which the training program holds out
a share. Masks hold class ids; or colors, of which `--colors` names the classes: a JSON file `{"road": [128, 64, 128], ...}`.
"""

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from modeling_lvvit.data.class_names import read_class_names
from modeling_lvvit.data.images import MAX_PIXELS_HELP, PixelLimit, decode_image
from modeling_lvvit.data.masks import IGNORED
from modeling_lvvit.launching import name_options
from modeling_lvvit.segmentation.dataset_writer import (
    Pair,
    check_pairs,
    list_images,
    pair_files,
    write_segmentation_set,
)


FOLDER_SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
MAX_LISTED = 5


def split_pairs(pairs: dict[str, Pair]) -> dict[str, list[Pair]]:
    """Split -> images: by the first folder of their paths, if these are all called after splits."""
    splits = defaultdict(list)
    for key, pair in pairs.items():
        folder, has_folder, _ = key.lower().partition("/")
        if not has_folder or folder not in FOLDER_SPLITS:
            return {"train": list(pairs.values())}
        splits[FOLDER_SPLITS[folder]].append(pair)
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
        buffer = io.BytesIO()
        Image.fromarray(ids).save(buffer, format="PNG")
        return buffer.getvalue()

    return content


def build(args: argparse.Namespace) -> dict[str, int]:
    """Writes the dataset and returns the number of images of each split."""
    PixelLimit(args.max_image_pixels)
    if args.colors is not None and args.class_names is not None:
        raise ValueError("Give --colors, which names the classes, or --class_names, not both.")
    colors = read_colors(args.colors) if args.colors is not None else None
    names = read_class_names(args.class_names) if args.class_names is not None else colors and list(colors)
    pairs = pair_files(list_images(args.images), list_images(args.masks), args.mask_suffix)
    check_pairs(list(pairs.values()), allows_colors=colors is not None)
    contents, notes = {}, "Masks are stored as they were."
    if colors is not None:
        contents = {"mask_content": colors_to_ids(colors, args.ignore_other_colors)}
        notes = f"Masks hold class ids; {IGNORED} does not count."
    return write_segmentation_set(args.output_dir, split_pairs(pairs), names, notes, **contents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("masks", type=Path, help="folder of masks")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--mask_suffix", default="", help="what names of masks have after those of their images, e.g. _mask"
    )
    parser.add_argument("--class_names", type=Path, help="JSON or text file with the names of the classes")
    parser.add_argument("--colors", type=Path, help="JSON file with the color of each class")
    parser.add_argument("--ignore_other_colors", action="store_true", help="colors of no class do not count")
    parser.add_argument("--max_image_pixels", type=int, help=MAX_PIXELS_HELP)
    args = parser.parse_args()
    try:
        counts = build(args)
    except (OSError, ValueError) as error:
        parser.exit(1, f"image_mask_folder.py: {name_options(error, *vars(args))}\n")
    print(f"{', '.join(f'{count:,} {split}' for split, count in counts.items())} images -> {args.output_dir}")


if __name__ == "__main__":
    main()
