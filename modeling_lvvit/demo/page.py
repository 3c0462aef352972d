"""The page."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL import Image

from ..backbones.loading import first_line
from ..data.images import IMAGE_ERRORS, decode_image
from ..launching import name_options
from .explanation import Explainer
from .segmentation import Segmenter


NUM_CLASSES = 5  # best classes that are listed
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}  # explaining changes the model for a moment
HOW_TO_READ = (
    "*Relevance* is gradient-weighted attention: where the model looks for the chosen class. *Attention* is that of the class token, whatever "
    "the class. *Cells* are the classes that single patches are given; rest the pointer on a name to see its cells alone."
)


def read_image(payload: Any) -> Image.Image | None:
    """The upright RGB image of an uploaded file. Only files that were uploaded are opened, and never an address.

    Raises:
        gr.Error: If it is none; the page shows the message.
    """
    if payload is None:
        return None
    if not payload.path or not is_in_or_equal(payload.path, get_upload_folder()) or not Path(payload.path).is_file():
        raise gr.Error("Upload an image first.", print_exception=False)
    name = payload.orig_name or "The file"
    try:
        return decode_image({"bytes": Path(payload.path).read_bytes(), "path": None})
    except IMAGE_ERRORS as error:
        reason = first_line(error).partition("<")[0].rstrip()
        message = name_options(f"{name} cannot be read as an image: {reason}", "max_image_pixels")
        raise gr.Error(message, print_exception=False) from error


def build_segmentation_page(segmenter: Segmenter) -> gr.Blocks:
    """The page of a segmentation model."""

    def look(image: Image.Image | None):
        return None if image is None else segmenter.segment(image)

    with gr.Blocks(title="LV-ViT", analytics_enabled=False) as page:
        gr.Markdown(f"# What is where?\n{segmenter.description}")
        with gr.Row():
            upload = image_input()
            classes = gr.AnnotatedImage(label="Classes", height=480)
        looked = gr.on([upload.upload, upload.clear], look, upload, classes, **ONE_AT_A_TIME, api_name="segment")
        looked.failure(lambda: None, outputs=classes, api_visibility="private")
    return page


def image_input() -> gr.Image:
    """Where an image is dropped; files that are none get a message."""
    image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], height=360)
    image.preprocess = read_image
    return image


def build_page(explainer: Explainer) -> gr.Blocks:
    """The page of a classifier."""
    names = explainer.distinct_names
    every_class = [(name, index) for index, name in enumerate(names)]

    def look(image: Image.Image | None):
        """Everything about a new image."""
        if image is None:
            return nothing()
        probabilities = explainer.probabilities(image)
        order = probabilities.argsort(descending=True).tolist()
        best = {names[index]: float(probabilities[index]) for index in order[:NUM_CLASSES]}
        choices = [(names[index], index) for index in order]
        reasons = explainer.explain(image, order[0])
        cells, missing = explainer.cells(image)
        notes = "\n\n".join(note for note in (reasons.note, missing) if note)
        return best, gr.Dropdown(choices=choices, value=order[0]), reasons.relevance, reasons.attention, cells, notes

    def nothing():
        return None, gr.Dropdown(value=None), None, None, None, ""

    def look_for(image: Image.Image | None, class_id: int | None):
        """Relevance for another class."""
        if image is None or class_id is None:
            return None
        return explainer.explain(image, class_id).relevance

    with gr.Blocks(title="LV-ViT", analytics_enabled=False) as page:
        gr.Markdown(f"# What does it see?\n{explainer.description}")
        with gr.Row():
            with gr.Column():
                upload = image_input()
                best = gr.Label(label="Classes", num_top_classes=NUM_CLASSES)
            with gr.Column():
                chosen = gr.Dropdown(
                    label="Show relevance for", choices=every_class, value=None, interactive=True, filterable=True
                )
                relevance = gr.Image(label="Relevance", interactive=False, height=360)
            with gr.Column():
                cells = gr.AnnotatedImage(label="Cells", height=360)
                attention = gr.Image(label="Attention of the class token", interactive=False, height=360)
        notes = gr.Markdown()
        gr.Markdown(HOW_TO_READ)
        shown = [best, chosen, relevance, attention, cells, notes]
        looked = gr.on(
            [upload.upload, upload.clear],
            look,
            upload,
            shown,
            **ONE_AT_A_TIME,
            show_progress_on=best,
            api_name="classify",
        )
        looked.failure(nothing, outputs=shown, api_visibility="private")  # nothing of the image before stays
        chosen.input(look_for, [upload, chosen], relevance, **ONE_AT_A_TIME, api_name="relevance")
    return page
