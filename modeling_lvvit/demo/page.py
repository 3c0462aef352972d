"""The page."""

from typing import Any

import gradio as gr

from ..token_labeling.pictures import IMAGE_ERRORS, decode_picture
from .explanation import Explainer
from .segmentation import Segmenter


NUM_CLASSES = 5  # best classes that are listed
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}  # explaining changes the model for a moment
HOW_TO_READ = (
    "*Relevance* is gradient-weighted attention: where the model looks for the chosen class. *Attention* is that of the class token, whatever "
    "the class. *Cells* are the classes that single patches are given; rest the pointer on a name to see its cells alone."
)


def read_path(payload: Any) -> str | None:
    """The path of an uploaded file that is a picture.

    Raises:
        gr.Error: If it is none; the page shows the message.
    """
    if payload is None:
        return None
    name = payload.orig_name or "The file"
    try:
        decode_picture({"bytes": None, "path": payload.path})
    except IMAGE_ERRORS as error:
        reason = str(error).replace(payload.path, name)
        raise gr.Error(f"{name} cannot be read as a picture: {reason}", print_exception=False) from error
    return payload.path


def build_segmentation_page(segmenter: Segmenter) -> gr.Blocks:
    """The page of a segmentation model."""

    def look(path: str | None):
        return None if path is None else segmenter.segment(decode_picture({"bytes": None, "path": path}))

    with gr.Blocks(title="LV-ViT", analytics_enabled=False) as page:
        gr.Markdown(f"# What is where?\n{segmenter.description}")
        with gr.Row():
            picture = picture_input()
            classes = gr.AnnotatedImage(label="Classes", height=480)
        looked = gr.on([picture.upload, picture.clear], look, picture, classes, **ONE_AT_A_TIME, api_name="segment")
        looked.failure(lambda: None, outputs=classes, api_visibility="private")
    return page


def picture_input() -> gr.Image:
    """Where a picture is dropped; files that are none get a message."""
    picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=360)
    picture.preprocess = read_path
    return picture


def build_page(explainer: Explainer) -> gr.Blocks:
    """The page of a classifier."""
    names = explainer.class_names

    def look(path: str | None):
        """Everything about a new picture."""
        if path is None:
            return nothing()
        picture = decode_picture({"bytes": None, "path": path})
        probabilities = explainer.probabilities(picture)
        order = probabilities.argsort(descending=True).tolist()
        best = {_label(names, index): float(probabilities[index]) for index in order[:NUM_CLASSES]}
        choices = [(_label(names, index), index) for index in order]
        found = explainer.explain(picture, order[0])
        cells, missing = explainer.cells(picture)
        notes = "\n\n".join(note for note in (found.note, missing) if note)
        return best, gr.Dropdown(choices=choices, value=order[0]), found.relevance, found.attention, cells, notes

    def nothing():
        return None, gr.Dropdown(choices=[], value=None), None, None, None, ""

    def look_for(path: str | None, class_id: int | None):
        """Relevance for another class."""
        if path is None or class_id is None:
            return None
        return explainer.explain(decode_picture({"bytes": None, "path": path}), class_id).relevance

    with gr.Blocks(title="LV-ViT", analytics_enabled=False) as page:
        gr.Markdown(f"# What does it see?\n{explainer.description}")
        with gr.Row():
            with gr.Column():
                picture = picture_input()
                best = gr.Label(label="Classes", num_top_classes=NUM_CLASSES)
            with gr.Column():
                chosen = gr.Dropdown(label="Show relevance for", choices=[], interactive=True, filterable=True)
                relevance = gr.Image(label="Relevance", interactive=False, height=360)
            with gr.Column():
                cells = gr.AnnotatedImage(label="Cells", height=360)
                attention = gr.Image(label="Attention of the class token", interactive=False, height=360)
        notes = gr.Markdown()
        gr.Markdown(HOW_TO_READ)
        shown = [best, chosen, relevance, attention, cells, notes]
        looked = gr.on(
            [picture.upload, picture.clear],
            look,
            picture,
            shown,
            **ONE_AT_A_TIME,
            show_progress_on=best,
            api_name="classify",
        )
        looked.failure(nothing, outputs=shown, api_visibility="private")  # nothing of the picture before stays
        chosen.input(look_for, [picture, chosen], relevance, **ONE_AT_A_TIME, api_name="relevance")
    return page


def _label(names: list[str], index: int) -> str:
    """A name that no other class has."""
    is_unique = names.count(names[index]) == 1
    return names[index] if is_unique else f"{names[index]} ({index})"
