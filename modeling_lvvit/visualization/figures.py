"""Images of label maps, segmentation and relevance, and what all figures are made of."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from ..data.classes.class_matching import shown_names
from ..data.files.atomic_files import write_atomically


LEGEND_COLUMNS, MAX_LEGEND = 6, 60
SMALL = {"fontsize": 8, "parse_math": False}  # class names may hold dollar signs
MAX_PANEL_SIDE = 640  # pixels
MIN_STRENGTH = 0.1  # of cells that say something: below it they are about at chance
PANEL_WIDTH, LINE_HEIGHT = 2.4, 0.16  # inches
CHARACTERS_PER_INCH = 14  # of small letters


def class_colors(num_classes: int) -> np.ndarray:
    """A color for each class, `(num_classes, 3)` in [0, 1]; distinct up to 20 classes, then around the color wheel."""
    if num_classes <= 10:
        colors = matplotlib.colormaps["tab10"](np.arange(10))[:num_classes, :3]
        colors[7:8] = (1.0, 0.85, 0.1)  # its grey would vanish on grey images
        return colors
    if num_classes <= 20:
        return matplotlib.colormaps["tab20"](np.arange(num_classes))[:, :3]
    order = np.random.default_rng(0).permutation(num_classes)  # neighbours in number should not be neighbours in hue
    return matplotlib.colormaps["hsv"](order / num_classes)[:, :3]


def overlay(image: Image.Image, class_ids: np.ndarray, strengths: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Paints a grid of classes over a darkened grey copy of an RGB image.

    Args:
        class_ids: `(rows, columns)` integers.
        strengths: `(rows, columns)` in [0, 1]; 0 leaves the cell grey.
        colors: `(num_classes, 3)` in [0, 1].

    Returns:
        `(height, width, 3)` in [0, 1].
    """
    grey = 0.6 * _grey(image)
    paint = np.dstack([colors[class_ids], strengths]).astype(np.float32)
    channels = [
        Image.fromarray(paint[..., channel]).resize(image.size, Image.Resampling.NEAREST) for channel in range(4)
    ]
    *rgb, opacity = (np.asarray(channel) for channel in channels)
    opacity = 0.85 * opacity[..., None]
    return grey * (1 - opacity) + np.dstack(rgb) * opacity


def label_map_strengths(scores: np.ndarray, num_classes: int) -> np.ndarray:
    """Probability of the first class of each cell, rescaled so that a flat distribution is 0, `(rows, columns)`, from the scores of K
    classes `(K, rows, columns)`, descending; all others have score 0."""
    exponentials = np.exp(scores.astype(np.float32))
    probability = exponentials[0] / (exponentials.sum(axis=0) + num_classes - len(scores))
    return np.clip((probability - 1 / num_classes) / (1 - 1 / num_classes), 0, 1)


def best_cells(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scores of cells `(..., classes)` to the best class of each, and by how much its probability lies above chance in [0, 1], both
    `(...)`."""
    number = logits.shape[-1]
    best, ids = logits.float().softmax(dim=-1).max(dim=-1)
    return ids.numpy(), ((best - 1 / number) / (1 - 1 / number)).clamp(0, 1).numpy()


def note_on_weak_cells(strengths: np.ndarray, num_classes: int) -> str | None:
    """What to say where no cell stands out, so that a gray image is no riddle; `None` where one does. `strengths` as of `best_cells`."""
    strongest = float(strengths.max())
    if strongest >= MIN_STRENGTH:
        return None
    best = strongest * (1 - 1 / num_classes) + 1 / num_classes
    return f"no cell stands out: at most {100 * best:.2g} %"


def panel_step(size: tuple[int, int]) -> int:
    """By what to divide the sides of an image so that it has no more pixels than a panel shows."""
    return max(1, max(size) // MAX_PANEL_SIDE)


def save_segmentation_figure(
    path: Path,
    images: Sequence[Image.Image],
    masks: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    class_names: Sequence[str],
    ignore_index: int,
) -> None:
    """One column for each image: the image, its mask, the prediction, and where they differ; below them the classes that occur.

    Args:
        images: RGB images.
        masks, predictions: Class ids `(height, width)` of each; pixels of the mask that are `ignore_index` are grey.
    """
    colors, class_names = class_colors(len(class_names)), shown_names(class_names)
    width, height = (float(np.mean(sides)) for sides in zip(*(image.size for image in images)))
    names = ("image", "mask", "prediction", "errors")
    seen = np.unique(np.concatenate([maps.ravel() for maps in (*masks, *predictions)]))
    seen = [index for index in seen.tolist() if index != ignore_index][:MAX_LEGEND]
    legend_rows = -(-len(seen) // LEGEND_COLUMNS)
    figure_height = 2.2 * height / width * len(names) + 0.3 + 0.22 * legend_rows
    figure = Figure(figsize=(2.2 * len(images) + 0.6, figure_height), layout="constrained")
    axes = figure.subplots(len(names), len(images), squeeze=False)
    for column, (image, mask, prediction) in enumerate(zip(images, masks, predictions)):
        step = panel_step(image.size)
        image, mask, prediction = image.reduce(step), mask[::step, ::step], prediction[::step, ::step]
        is_ignored = mask == ignore_index
        truth = np.where(is_ignored[..., None], 0.5, colors[np.where(is_ignored, 0, mask)])
        errors = np.where(((prediction != mask) & ~is_ignored)[..., None], (0.9, 0.1, 0.1), 0.6 * _grey(image))
        show_column(axes[:, column], (np.asarray(image), truth, colors[prediction], errors))
    label_rows(axes, names)
    handles = [Patch(color=colors[index], label=shortened(class_names[index])) for index in seen]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(path, figure)


def heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A map `(rows, columns)` painted over a darkened grey copy of an image `(height, width, 3)` in [0, 1]: its smallest value is left
    grey, its largest one is bright."""
    height, width = image.shape[:2]
    spread = float(values.max() - values.min())
    scaled = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    wide = Image.fromarray(scaled.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    strength = np.asarray(wide).clip(0, 1)
    grey = image.mean(axis=2, keepdims=True) * 0.6 * np.ones(3)
    opacity = 0.8 * strength[..., None]
    return grey * (1 - opacity) + matplotlib.colormaps["inferno"](strength)[..., :3] * opacity


def save_relevance_figure(
    path: Path, rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], note: str | None = None
) -> None:
    """A row of panels for each model.

    Args:
        rows: Name of the model, and its panels: title and image `(height, width, 3)` in [0, 1].
    """
    columns = max(len(panels) for _, panels in rows)
    heights = []
    for _, panels in rows:
        sides = [PANEL_WIDTH * image.shape[0] / image.shape[1] for _, image in panels]
        lines = max(title.count("\n") + 1 for title, _ in panels)
        heights.append(max(sides) + LINE_HEIGHT * (lines + 1))
    size = (PANEL_WIDTH * columns + 0.6, sum(heights) + (2 * LINE_HEIGHT if note else 0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for row, (name, panels) in enumerate(rows):
        for column, (title, image) in enumerate(panels):
            axes[row, column].imshow(image.clip(0, 1))
            axes[row, column].set_title(title, **SMALL)
        letters = max(1, round(CHARACTERS_PER_INCH * heights[row]))
        axes[row, 0].set_ylabel(textwrap.fill(name, letters), **SMALL)
    if note:
        figure.supxlabel(note, **SMALL)
    save_figure(path, figure)


def save_contact_sheet(
    path: Path,
    images: Sequence[tuple[Image.Image, Image.Image]],
    label_maps: Sequence[tuple[np.ndarray, np.ndarray]],
    labels: Sequence[str],
    class_names: Sequence[str],
    columns: int = 6,
) -> None:
    """Pairs of an image and its label map, painted over the part that the map covers.

    Args:
        images: RGB images, each with the part that its map covers.
        label_maps: Ids and scores of each, `(K, rows, columns)`, in any order of K.
        columns: Pairs in a row.
    """
    names = dict(zip(class_names, shown_names(class_names)))
    labels, class_names = [names.get(label, label) for label in labels], list(names.values())
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * columns + 0.2, 4.6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    colors = class_colors(len(class_names))
    for position, ((image, covered), (ids, scores), label) in enumerate(zip(images, label_maps, labels)):
        row, column = divmod(position, columns)
        order = np.argsort(-scores.astype(np.float32), axis=0, kind="stable")
        ids, scores = np.take_along_axis(ids, order, axis=0), np.take_along_axis(scores, order, axis=0)
        named, counts = np.unique(ids[0], return_counts=True)
        most = named[np.argsort(-counts, kind="stable")[:3]]
        upper, lower = axes[2 * row : 2 * row + 2, column]
        upper.imshow(np.asarray(image))
        upper.set_title(shortened(label), **SMALL)
        lower.imshow(overlay(covered, ids[0], label_map_strengths(scores, len(class_names)), colors))
        for line, index in enumerate(most):
            share = 100 * counts[named == index][0] / ids[0].size
            lower.text(
                0.0, -0.08 - 0.1 * line, f"{shortened(class_names[index])} {share:.0f} %", fontsize=7,
                color=colors[index] * 0.8, transform=lower.transAxes, parse_math=False,
            )  # fmt: skip
    figure.supxlabel("%: share of cells whose first class this is", fontsize=7)
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, with all of its texts, also those that stand over its edges."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.05))


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness of an image, `(height, width, 1)` in [0, 1]."""
    return np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255.0


def show_column(axes: np.ndarray, panels: Sequence[np.ndarray]) -> None:
    """Shows images, one in each of some axes."""
    for axis, panel in zip(axes, panels):
        axis.imshow(panel)
        axis.set(xticks=[], yticks=[])


def label_rows(axes: np.ndarray, names: Sequence[str]) -> None:
    """Names the rows of a grid of axes."""
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, fontsize=8)


def shortened(name: str, length: int = 22) -> str:
    """A name that fits above a panel."""
    return name if len(name) <= length else name[: length - 1] + "…"
