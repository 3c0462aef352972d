"""Images of what classifiers look at in an image, side by side.

    lvvit visualize image.jpg outputs/digit_scenes --output_file looks.png
    lvvit visualize image.jpg MODEL OTHER_MODEL --classes tabby 207 --annotator ANNOTATOR

For each model: the image as it sees it, attention of the class token, relevance for the classes (its best ones, or those of
`--classes`), patch predictions where it has them, and dense labels where an annotator is given.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.hf_argparser import HfArg

from ..annotators.annotator import load_annotator
from ..annotators.text.prompts import PROMPTS_HELP, check_text_options
from ..console import program
from ..data.classes.class_matching import normalized, readable_names, shown_names
from ..data.images import MAX_PIXELS_HELP, PixelLimit, parse_image_size
from ..evaluate.classifier import Classifier, InputOptions, load_classifier
from ..launching import set_up_cpu
from ..options import Program
from .figures import heat, save_relevance_figure
from .panels import ANNOTATOR_HELP, cells_panel, read_image_file, short, shown_image
from .relevance import relevance_maps


NUM_CLASSES = 2  # best classes that are explained


@dataclass
class VisualizationArguments:
    """Options of the program."""

    image: str | None = HfArg(default=None, help="Image file.")
    models: list[str] | None = HfArg(
        default=None,
        help="Classifiers of transformers or timm with a class token.",
        aliases=["--model", "--model_name_or_path"],
    )
    classes: list[str] | None = HfArg(
        default=None, help="Names or ids of classes to explain; default: the two best ones of each model."
    )
    annotator: str | None = HfArg(default=None, help=ANNOTATOR_HELP)
    prompts: str | None = HfArg(default=None, help=PROMPTS_HELP)
    image_size: list[int] | None = HfArg(
        default=None, help="Side of the input in pixels, or height and width; default: that of each model."
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    output_file: str | None = HfArg(default=None, help="PNG to write; default: relevance.png.", aliases=["--output"])
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")


PROGRAM = Program(
    "lvvit visualize", __doc__, (VisualizationArguments,), ("image", "models*"), required=("image", "models")
)


def class_id(wanted: str, names: list[str]) -> int:
    """Id of a class by its name, one of its synonyms, or its id.

    Raises:
        ValueError: If there is none, or several have the name.
    """
    matches = [index for index, name in enumerate(names) if normalized(wanted) == normalized(name)]
    matches = matches or [
        index
        for index, name in enumerate(names)
        if normalized(wanted) in {normalized(part) for part in name.split(",")}
    ]
    if not matches and wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if len(matches) != 1:
        raise ValueError(
            f"{'Several classes have' if matches else f'None of {len(names)} classes has'} the name {wanted!r}; give its id."
        )
    return matches[0]


def draw_panels(classifier: Classifier, image: Image.Image, wanted: list[str] | None) -> list[tuple[str, np.ndarray]]:
    """Titles and images of one model."""
    pixel_values = classifier.transform(image)[None]
    names = shown_names(classifier.class_names)
    both = zip(classifier.class_names, readable_names(classifier.class_names))
    synonyms = [name if name == readable else f"{name}, {readable}" for name, readable in both]
    with torch.no_grad():
        probabilities = classifier.probabilities(classifier.logits(pixel_values))[0]
    ids = [class_id(name, synonyms) for name in wanted or ()] or probabilities.topk(
        min(NUM_CLASSES, len(names))
    ).indices.tolist()
    shown = shown_image(pixel_values[0])
    panels = [(_title(names, probabilities, int(probabilities.argmax())), shown)]
    for index in ids:
        maps = relevance_maps(classifier.model, pixel_values, torch.tensor([index]), classifier.forward_options)
        if len(panels) == 1:
            panels.append(("attention of the class token", heat(shown, maps.attention[0].numpy())))
        panels.append((f"relevance\n{_title(names, probabilities, index)}", heat(shown, maps.relevance[0].numpy())))
    if maps.patch_logits is not None:
        cells = maps.patch_logits[0].unflatten(0, maps.relevance.shape[1:])
        panels.append(cells_panel(shown, cells, names, "patch predictions"))
    return panels


def dense_label_panel(
    args: VisualizationArguments, image: Image.Image, class_names: list[str]
) -> tuple[str, np.ndarray]:
    """Dense labels of the annotator over the whole image; an image-text model scores the given classes."""
    about_texts = {"class_names": class_names, "prompts": args.prompts}
    annotator = load_annotator(args.annotator, trust_remote_code=args.trust_remote_code, **about_texts)
    pixels, _ = annotator.preprocessing(image)
    with torch.inference_mode():
        scores = annotator.score_map(pixels[None])[0]  # (classes, rows, columns)
    shown = np.asarray(image.resize(pixels.shape[:0:-1])) / 255.0
    return cells_panel(shown, scores.permute(1, 2, 0), shown_names(annotator.class_names), "dense labels")


def _title(names: list[str], probabilities: torch.Tensor, index: int) -> str:
    return f"{short(names[index])} {100 * probabilities[index]:.0f} %"


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    with PROGRAM.refusals():
        (args,) = PROGRAM.parse(arguments)
        check_text_options(args.annotator, args.prompts)
        PixelLimit(args.max_image_pixels)
        if files := [name for name in args.models if Path(name).expanduser().is_file()]:
            raise ValueError(
                f"It takes one image, and then models: {', '.join(files)} is no model. Usage: {PROGRAM.usage}"
            )
        image = read_image_file(args.image)
        size = parse_image_size(args.image_size, "`image_size`")
        rows, class_names = [], []
        for name in args.models:
            classifier = load_classifier(name, InputOptions(size), trust_remote_code=args.trust_remote_code)
            rows.append((Path(name).name, draw_panels(classifier, image, args.classes)))
            class_names = class_names or classifier.class_names
        if args.annotator is not None:
            rows[0][1].append(dense_label_panel(args, image, class_names))
        output = Path(args.output_file or "relevance.png")
        output.parent.mkdir(parents=True, exist_ok=True)
        save_relevance_figure(output, rows)
    print(f"saved to {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
