"""Images: what a model sees, predicts and looks at."""

from .figures import (
    class_colors,
    label_map_strengths,
    overlay,
    panel_step,
    save_contact_sheet,
    save_relevance_figure,
    save_segmentation_figure,
)
from .prediction_figure import save_prediction_figure
from .relevance import RelevanceMaps, relevance_maps


__all__ = [
    "RelevanceMaps",
    "class_colors",
    "label_map_strengths",
    "overlay",
    "panel_step",
    "relevance_maps",
    "save_contact_sheet",
    "save_prediction_figure",
    "save_relevance_figure",
    "save_segmentation_figure",
]
