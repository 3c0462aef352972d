"""A page on which a classifier is tried: its classes for an image, where it looks for each of them, what it says of single patches;
or a segmentation model of ours.

    python -m modeling_lvvit.demo --model outputs/digit_scenes
    python -m modeling_lvvit.demo --model MODEL --export_space DIR        # a folder to upload as a Space instead

Needs the extra `demo`: pip install -e ".[demo]".
"""

import argparse
import sys
from pathlib import Path

import torch

from ..console import program
from ..data.images import MAX_PIXELS_HELP, PixelLimit
from ..launching import name_options, set_up_cpu


MODULE = "modeling_lvvit.demo"


def parser() -> argparse.ArgumentParser:
    """Options of the program."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of a classifier, or timm/NAME")
    parser.add_argument("--export_space", type=Path, metavar="DIR", help="write a Space there instead")
    parser.add_argument("--max_image_pixels", type=int, help=MAX_PIXELS_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: %(default)s, this machine")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="make the page public for a while, through Gradio's servers"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="allow code of a Hub repository to run")
    return parser


@program(MODULE)
def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    set_up_cpu(torch.device("cpu"))
    try:
        import gradio as gr

        from .explanation import Explainer
        from .page import build_page, build_segmentation_page
        from .segmentation import Segmenter, is_segmentation_model
        from .space import export_space
    except ImportError as error:
        sys.exit(f'{MODULE}: {error}. Install what the page needs: pip install -e ".[demo]"')
    try:
        PixelLimit(args.max_image_pixels)
        if is_segmentation_model(args.model):
            build, model = build_segmentation_page, Segmenter(args.model)
        else:
            build, model = build_page, Explainer(args.model, args.trust_remote_code)
        if args.export_space is not None:
            export_space(args.model, args.export_space, args.trust_remote_code)
            print(f"saved to {args.export_space}")
            return
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
        build(model).launch(server_name=args.host, server_port=args.port, share=args.share, theme=theme)
    except (ValueError, OSError, OverflowError) as error:  # the last for impossible ports
        sys.exit(f"{MODULE}: {name_options(error, 'max_image_pixels')}")


if __name__ == "__main__":
    main(sys.argv[1:])
