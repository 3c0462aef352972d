"""The figure of predictions of a classifier: dense labels, patch predictions, and maps of where the labelled class is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..data.classes.class_matching import shown_names
from .figures import (
    SMALL,
    best_cells,
    class_colors,
    heat,
    label_map_strengths,
    label_rows,
    note_on_weak_cells,
    overlay,
    save_figure,
    shortened,
    show_column,
)


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
        if mask.any():  # else there is nothing to outline
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
        class_maps: Of the labelled classes; `None` leaves them out.
    """
    num_classes, class_names = len(class_names), shown_names(class_names)
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
        show_column(axes[:num_painted, column], panels)
        if class_maps is not None:
            class_maps.draw(axes[0, column], axes[num_painted:, column], np.asarray(image), column)
        axes[num_painted - 1, column].set_xlabel(note_on_weak_cells(strengths[column], num_classes) or "", fontsize=6)
        predicted = int(logits[column].argmax())
        is_right = predicted == labels[column]
        axes[0, column].set_title(
            f"{shortened(class_names[labels[column]])}\n{'✓' if is_right else '✗'} {shortened(class_names[predicted])}",
            color="tab:green" if is_right else "tab:red",
            **SMALL,
        )
    label_rows(axes, names)
    if class_maps is not None:
        figure.supxlabel(class_maps.note, **SMALL)
    save_figure(path, figure)
