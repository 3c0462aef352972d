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

from ..console import program
from ..data.images import MAX_PIXELS_HELP, PixelLimit
from ..launching import set_up_cpu
from ..options import Program


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
    with PROGRAM.refusals(OverflowError):  # for impossible ports
        (args,) = PROGRAM.parse(arguments)
        show(args)


def show(args: DemoArguments) -> None:
    """Opens the page, or writes a Space."""
    try:
        import gradio as gr

        from .explanation import Explainer
        from .page import build_page, build_segmentation_page
        from .segmentation import Segmenter, is_segmentation_model
        from .space import export_space
    except ImportError as error:
        raise ValueError(f'{error}. Install what the page needs: pip install "modeling-lvvit[demo]"') from error
    PixelLimit(args.max_image_pixels)
    model_name = args.model_name_or_path
    if is_segmentation_model(model_name):
        build, model = build_segmentation_page, Segmenter(model_name)
    else:
        build, model = build_page, Explainer(model_name, args.trust_remote_code)
    if args.export_space is not None:
        export_space(model_name, Path(args.export_space), args.trust_remote_code)
        print(f"saved to {args.export_space}")
        return
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    build(model).launch(server_name=args.host, server_port=args.port, share=args.share, theme=theme)


if __name__ == "__main__":
    main(sys.argv[1:])
