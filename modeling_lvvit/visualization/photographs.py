"""Photographs with dense labels of an annotator, and with patch predictions and best classes of other classifiers, all by name.

    python -m modeling_lvvit.visualization.photographs cat.jpg cup.jpg --annotator ANNOTATOR --image_size 448
    python -m modeling_lvvit.visualization.photographs cat.jpg cup.jpg --annotator ANNOTATOR --models runs/mine

Shows before a large run what an annotator says of your images. Images are cut to their central square. Below each map stand its largest
classes; other cells, and those of which a classifier is unsure, stay gray.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from transformers.hf_argparser import HfArg

from ..annotators.annotator import Annotator, load_annotator
from ..annotators.text.prompts import PROMPTS_HELP, check_text_options
from ..console import program
from ..data.classes.class_matching import shown_names
from ..data.files.atomic_files import write_atomically
from ..data.images import MAX_PIXELS_HELP, PixelLimit, parse_image_size
from ..evaluate.classifier import Classifier, InputOptions, load_classifier
from ..launching import set_up_cpu
from ..options import Program
from .figures import SMALL, best_cells, class_colors, overlay
from .panels import ANNOTATOR_HELP, read_image_file


MODULE = "modeling_lvvit.visualization.photographs"
NUM_NAMED, NUM_COLORS = 3, 10  # classes named below a map, colors
WEAKEST_SHARE = 0.02  # of the cells, weighted by their probability, for a class to be named
SIDE = 320  # pixels of a drawn photograph
LINE = 0.115  # height of a line of text, as a share of an image


@dataclass
class PhotographArguments:
    """Options of the program."""

    images: list[str] | None = HfArg(default=None, help="Image files.")
    annotator: str | None = HfArg(default=None, help=ANNOTATOR_HELP)
    prompts: str | None = HfArg(default=None, help=PROMPTS_HELP)
    models: list[str] | None = HfArg(
        default=None,
        help="Classifiers whose patch predictions and best classes are shown: folders or Hub names.",
        aliases=["--model", "--model_name_or_path"],
    )
    image_size: list[int] | None = HfArg(
        default=None, help="Side of the annotator's input in pixels, or height and width; default: its own."
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    output_file: str | None = HfArg(
        default=None, help="PNG or JPEG to write; default: photographs.png.", aliases=["--output"]
    )
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")


PROGRAM = Program(
    MODULE,
    __doc__,
    (PhotographArguments,),
    ("images*",),
    required=("images", "annotator"),
)


@dataclass
class MapPanel:
    """What is drawn of one classifier and one image.

    Args:
        painted: `(height, width, 3)` in [0, 1].
        legend: Names of classes and their colors, the largest first.
        best: Best classes of the whole image and their probabilities; empty for an annotator.
    """

    painted: np.ndarray
    legend: list[tuple[str, np.ndarray]]
    best: list[tuple[str, float]]


def map_panel(
    annotator: Annotator,
    names: list[str],
    image: Image.Image,
    classifier: Classifier | None,
    color_order: dict[str, int],
) -> MapPanel:
    """Paints the largest classes of the cells of an image.

    Args:
        annotator: What scores the cells.
        names: Of its classes, for people.
        image: RGB image.
        classifier: The same network for whole images, if its best classes are wanted.
        color_order: Numbers of the colors of names in the panels of this image; new names are added.
    """
    pixels, _ = annotator.preprocessing(image)
    with torch.inference_mode():
        scores = annotator.score_map(pixels[None])[0]  # (classes, rows, columns)
    ids, strengths = best_cells(scores.permute(1, 2, 0))
    areas = np.bincount(ids.ravel(), weights=strengths.ravel(), minlength=len(names)) / ids.size
    largest = [index for index in np.argsort(-areas, kind="stable")[:NUM_NAMED] if areas[index] >= WEAKEST_SHARE]
    colors = class_colors(NUM_COLORS)
    legend = [
        (names[index], colors[color_order.setdefault(names[index], len(color_order)) % NUM_COLORS])
        for index in largest
    ]
    color_of_class = np.zeros((len(names), 3))
    color_of_class[largest] = [color for _, color in legend] if legend else np.empty((0, 3))
    # the root, so that a probability of a third is seen
    painted = overlay(image, ids, np.where(np.isin(ids, largest), np.sqrt(strengths), 0), color_of_class)
    best = []
    if classifier is not None:
        with torch.inference_mode():
            probabilities = classifier.logits(classifier.transform(image)[None])[0].softmax(dim=0)
        best = [(names[index], float(probabilities[index])) for index in probabilities.topk(2).indices.tolist()]
    return MapPanel(painted, legend, best)


def draw_photographs(
    path: Path, images: Sequence[Image.Image], rows: Sequence[tuple[str, Sequence[MapPanel]]]
) -> None:
    """One column for each image: the image, and below it the map of each classifier with its names.

    Args:
        images: Square RGB images.
        rows: What each row is called, and its panels, one for each image.
    """
    lines = [max(len(panel.legend) + len(panel.best) for panel in panels) for _, panels in rows]
    heights = [1.0, *(1.0 + LINE * (count + 0.4) for count in lines)]
    width = 1.75  # inches
    figure = Figure(figsize=(width * len(images) + 0.35, width * sum(heights) * 1.03), dpi=150)
    grid = figure.add_gridspec(
        len(heights),
        len(images),
        height_ratios=heights,
        hspace=0.03,
        wspace=0.04,
        left=0.035,
        right=0.998,
        top=0.998,
        bottom=0.002,
    )
    axes = np.array(
        [[figure.add_subplot(grid[row, column]) for column in range(len(images))] for row in range(len(heights))]
    )
    for column, image in enumerate(images):
        _show(axes[0, column], np.asarray(image))
        for row, (_, panels) in enumerate(rows, start=1):
            _show(axes[row, column], panels[column].painted)
            _write_legend(axes[row, column], panels[column])
    for axis, (name, _) in zip(axes[:, 0], [("image", None), *rows]):
        axis.set_ylabel(name, **SMALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"format": "png"}
    if path.suffix.lower() in (".jpg", ".jpeg"):
        options = {"format": "jpeg", "pil_kwargs": {"quality": 88, "subsampling": 0}}
    write_atomically(path, lambda file: figure.savefig(file, **options))


def _show(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image)
    axis.set(xticks=[], yticks=[], anchor="N")


def _write_legend(axis: Axes, panel: MapPanel) -> None:
    texts = [(f"{name} {100 * share:.0f} %", "black", "bold") for name, share in panel.best]
    texts += [(f"■ {name}", color * 0.85, "normal") for name, color in panel.legend]
    for line, (text, color, weight) in enumerate(texts):
        axis.text(
            0.0, -0.03 - LINE * line, text, color=color, weight=weight, transform=axis.transAxes, va="top", **SMALL
        )


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        check_text_options(args.annotator, args.prompts)
        PixelLimit(args.max_image_pixels)
        squares = partial(ImageOps.fit, size=(SIDE, SIDE), method=Image.Resampling.LANCZOS)
        images = [squares(read_image_file(path)) for path in args.images]
        trusted = {"trust_remote_code": args.trust_remote_code}
        size = parse_image_size(args.image_size, "`image_size`")
        rows = [("dense labels", load_annotator(args.annotator, size, prompts=args.prompts, **trusted), None)]
        for name in args.models or ():
            classifier = load_classifier(name, InputOptions(), **trusted)
            rows.append((f"patches, {Path(name).name}", load_annotator(name, **trusted), classifier))
        panels, color_orders = [], [{} for _ in images]
        for title, annotator, classifier in rows:
            about = (annotator, shown_names(annotator.class_names))
            row = [map_panel(*about, image, classifier, order) for image, order in zip(images, color_orders)]
            panels.append((title, row))
        output = Path(args.output_file or "photographs.png")
        draw_photographs(output, images, panels)
    print(f"saved to {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
