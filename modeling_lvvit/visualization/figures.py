"""Images of dense labels and patch predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image


LEGEND_COLUMNS, MAX_LEGEND = 6, 60
SMALL = {"fontsize": 8, "parse_math": False}  # class names may hold dollar signs
MAX_PANEL_SIDE = 640  # pixels


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


@dataclass
class ClassMaps:
    """Maps of where the labelled class of images is, for a figure.

    Args:
        masks: Bool `(height, width)` of each image: where it is.
        maps: By title, `(B, rows, columns)` each.
        peaks: By title, for each image row and column of the largest value, in pixels of its mask.
        note: What stands below the figure.
    """

    masks: Sequence[np.ndarray]
    maps: Mapping[str, np.ndarray]
    peaks: Mapping[str, Sequence[tuple[int, int]]]
    note: str

    def draw(self, image_axis: Axes, axes: Sequence[Axes], image: np.ndarray, index: int) -> None:
        """Outlines the mask of an image `(height, width, 3)` uint8 in `image_axis`, and draws each map into one of `axes`, its largest
        value marked: green on the mask, red beside it."""
        height, width = image.shape[:2]
        mask = self.masks[index]
        scale_y, scale_x = height / mask.shape[0], width / mask.shape[1]
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # left, right, bottom, top: as `imshow` places the image
        for axis, (title, maps) in zip(axes, self.maps.items()):
            axis.imshow(heat(image / 255, maps[index]))
            row, column = self.peaks[title][index]
            color = "lime" if mask[row, column] else "red"
            place = ((column + 0.5) * scale_x - 0.5, (row + 0.5) * scale_y - 0.5)
            axis.plot(*place, marker="o", markersize=6, markeredgecolor="white", markerfacecolor=color)
            axis.set(xticks=[], yticks=[])
        for axis in (image_axis, *axes):
            axis.contour(mask, levels=[0.5], colors="cyan", linewidths=0.7, extent=extent, origin="upper")


def save_prediction_figure(
    path: Path,
    images: Sequence[Image.Image],
    labels: Sequence[int],
    logits: torch.Tensor,
    patch_logits: torch.Tensor,
    grid_size: tuple[int, int],
    class_names: Sequence[str],
    label_maps: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    class_maps: ClassMaps | None = None,
) -> None:
    """One column for each image: the image with its true and predicted class, its dense labels, the model's patches, and maps of where
    its class is.

    Args:
        images: RGB images as the model saw them.
        logits, patch_logits: `(B, C)` and `(B, N, C)`.
        grid_size: Token rows and columns.
        label_maps: Ids and scores of each image, `(K, rows, columns)` each; `None` leaves that row out.
    """
    num_classes = len(class_names)
    colors = class_colors(num_classes)
    names = ["image"] + (["dense labels"] if label_maps is not None else []) + ["patch predictions"]
    num_painted = len(names)
    names += [] if class_maps is None else class_maps.maps
    figure = Figure(figsize=(1.5 * len(images) + 0.6, 1.6 * len(names) + 0.5), layout="constrained")
    axes = figure.subplots(len(names), len(images), squeeze=False)
    ids_of_cells, strengths = best_cells(patch_logits.unflatten(1, grid_size))  # (B, rows, columns)
    for column, image in enumerate(images):
        panels = [np.asarray(image)]
        if label_maps is not None:
            ids, scores = label_maps[column]
            panels.append(overlay(image, ids[0], label_map_strengths(scores, num_classes), colors))
        panels.append(overlay(image, ids_of_cells[column], strengths[column], colors))
        _show_column(axes[:num_painted, column], panels)
        if class_maps is not None:
            class_maps.draw(axes[0, column], axes[num_painted:, column], np.asarray(image), column)
        predicted = int(logits[column].argmax())
        is_right = predicted == labels[column]
        axes[0, column].set_title(
            f"{class_names[labels[column]]}\n{'✓' if is_right else '✗'} {class_names[predicted]}",
            color="tab:green" if is_right else "tab:red",
            **SMALL,
        )
    _label_rows(axes, names)
    if class_maps is not None:
        figure.supxlabel(class_maps.note, **SMALL)
    FigureCanvasAgg(figure).print_png(path)


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
    colors = class_colors(len(class_names))
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
        _show_column(axes[:, column], (np.asarray(image), truth, colors[prediction], errors))
    _label_rows(axes, names)
    handles = [Patch(color=colors[index], label=_shortened(class_names[index])) for index in seen]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
    FigureCanvasAgg(figure).print_png(path)


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
    figure = Figure(figsize=(2.4 * columns + 0.4, 2.75 * len(rows) + (0.3 if note else 0)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for row, (name, panels) in enumerate(rows):
        for column, (title, image) in enumerate(panels):
            axes[row, column].imshow(image.clip(0, 1))
            axes[row, column].set_title(title, **SMALL)
        axes[row, 0].set_ylabel(name, **SMALL)
    if note:
        figure.supxlabel(note, **SMALL)
    FigureCanvasAgg(figure).print_png(path)


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
        upper.set_title(_shortened(label), **SMALL)
        lower.imshow(overlay(covered, ids[0], label_map_strengths(scores, len(class_names)), colors))
        for line, index in enumerate(most):
            share = 100 * counts[named == index][0] / ids[0].size
            lower.text(
                0.0, -0.08 - 0.1 * line, f"{_shortened(class_names[index])} {share:.0f} %", fontsize=7,
                color=colors[index] * 0.8, transform=lower.transAxes, parse_math=False,
            )  # fmt: skip
    FigureCanvasAgg(figure).print_png(path)


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness of an image, `(height, width, 1)` in [0, 1]."""
    return np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255.0


def _show_column(axes: np.ndarray, panels: Sequence[np.ndarray]) -> None:
    for axis, panel in zip(axes, panels):
        axis.imshow(panel)
        axis.set(xticks=[], yticks=[])


def _label_rows(axes: np.ndarray, names: Sequence[str]) -> None:
    for axis, name in zip(axes[:, 0], names):
        axis.set_ylabel(name, fontsize=8)


def _shortened(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
