"""A page on which a classifier is tried: its classes for an image, where it looks for each of them, what it says of single patches;
or a segmentation model of ours.

    lvvit demo outputs/digit_scenes
    lvvit demo MODEL --export_space DIR        # a folder to upload as a Space instead

Needs the extra `demo`: pip install "modeling-lvvit[demo]".
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg

from ..console import program, require
from ..data.images import MAX_PIXELS_HELP, PixelLimit
from ..launching import set_up_cpu
from ..options import Program
from .space import export_space


@dataclass
class DemoArguments:
    """Options of the program."""

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Folder or Hub name of a classifier or segmentation model, or timm/NAME.",
        aliases=["--model"],
    )
    export_space: str | None = HfArg(default=None, help="Folder to write a Space to instead.")
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    host: str = HfArg(default="127.0.0.1", help="Address to listen at; default: 127.0.0.1, this machine.")
    port: int | None = HfArg(default=None, help="Default: the first free one from 7860.")
    share: bool = HfArg(default=False, help="Make the page public for a while, through Gradio's servers.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")


PROGRAM = Program("lvvit demo", __doc__, (DemoArguments,), ("model_name_or_path",), required=("model_name_or_path",))


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    with PROGRAM.refusals(OverflowError, ImportError):  # for impossible ports, and a page without gradio
        (args,) = PROGRAM.parse(arguments)
        show(args)


def show(args: DemoArguments) -> None:
    """Opens the page, or writes a Space."""
    if args.export_space is None:
        require("demo", "gradio")
    from .explanation import Explainer  # not above: what is missing is said first
    from .segmentation import Segmenter, is_segmentation_model

    PixelLimit(args.max_image_pixels)
    model_name = args.model_name_or_path
    is_segmenter = is_segmentation_model(model_name)
    model = Segmenter(model_name) if is_segmenter else Explainer(model_name, args.trust_remote_code)
    if args.export_space is not None:
        export_space(model_name, Path(args.export_space), args.trust_remote_code)
        print(f"saved to {args.export_space}")
        return
    import gradio as gr

    from .page import build_page, build_segmentation_page

    build = build_segmentation_page if is_segmenter else build_page
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    build(model).launch(server_name=args.host, server_port=args.port, share=args.share, theme=theme)


if __name__ == "__main__":
    main(sys.argv[1:])
