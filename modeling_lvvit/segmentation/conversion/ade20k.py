"""Turns the scene-parsing release of ADE20K into Parquet files for `lvvit segment`.

    python -m modeling_lvvit.segmentation.conversion.ade20k ADEChallengeData2016 --output_dir ade20k

The folder is that of the release (MIT Scene Parsing Benchmark, 2016): `images/` and `annotations/` with `training` and `validation`,
`objectInfo150.txt`, `sceneCategories.txt`. Files are stored as they are: in masks 0 is no class and 1 to 150 are the classes, so that
training needs `--reduce_labels true`, which the recipes have; `mask_settings.json` says so, and training without it is refused.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import datasets
from transformers.hf_argparser import HfArg

from ...console import program
from ...options import Program
from .dataset_writer import (
    Pair,
    check_pairs,
    list_images,
    pair_files,
    write_segmentation_set,
)


@dataclasses.dataclass
class ReleaseArguments:
    """Options of the program."""

    release: Path = HfArg(help="Folder ADEChallengeData2016.")
    output_dir: str | None = HfArg(default=None, help="Folder to create.")


PROGRAM = Program("ade20k", __doc__, (ReleaseArguments,), ("release",), required=("output_dir",))
SPLITS = {"train": "training", "validation": "validation"}
NUM_CLASSES = 150
NOTES = (
    "ADE20K, scene-parsing release (http://sceneparsing.csail.mit.edu, Zhou et al., CVPR 2017). In masks 0 is no class and 1 to 150 are "
    "the classes of `id2label.json`, whose ids begin with 0 (`reduce_labels`)."
)


def class_names(path: Path) -> list[str]:
    """The 150 names of `objectInfo150.txt`: the first of the synonyms, all of them where the first one is not unique; a `ValueError` if the
    file holds something else."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}; it belongs to the release.")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    try:
        names = {int(row["Idx"]): row["Name"].strip() for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must have the columns Idx and Name, separated by tabs: {error!r}.") from error
    if sorted(names) != list(range(1, NUM_CLASSES + 1)):
        raise ValueError(f"{path} must name the classes 1 to {NUM_CLASSES}, got {len(names)}.")
    ordered = [names[index] for index in range(1, NUM_CLASSES + 1)]
    short = [name.split(",")[0].split(";")[0].strip() for name in ordered]
    return [first if short.count(first) == 1 else name for first, name in zip(short, ordered)]


def scene_categories(path: Path) -> dict[str, str]:
    """Image -> scene, empty if the release has no such file."""
    if not path.is_file():
        return {}
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2}


def build(release: Path, output_dir: Path) -> dict[str, int]:
    """Writes the dataset and returns the number of images of each split."""
    names = class_names(release / "objectInfo150.txt")
    scenes = scene_categories(release / "sceneCategories.txt")
    features = {"scene_category": datasets.Value("string")}
    splits: dict[str, list[Pair]] = {}
    for split, folder in SPLITS.items():
        pairs = pair_files(list_images(release / "images" / folder), list_images(release / "annotations" / folder))
        splits[split] = [
            dataclasses.replace(pair, extra={"scene_category": scenes.get(key)}) for key, pair in pairs.items()
        ]
    for pairs in splits.values():
        check_pairs(pairs, allows_colors=False)
    return write_segmentation_set(output_dir, splits, names, NOTES, extra_features=features, reduce_labels=True)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        counts = build(args.release, Path(args.output_dir))
    print(f"{' and '.join(f'{count:,} {split}' for split, count in counts.items())} images -> {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
