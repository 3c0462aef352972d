"""A page on which a classifier is tried: its classes for an image, where it looks for each of them, what it says of single patches;
or a segmentation model of ours.

    lvvit demo outputs/digit_scenes
    lvvit demo MODEL --export_space DIR        # a folder to upload as a Space instead
    lvvit demo MODEL --export_static DIR       # a folder for any web server: the model runs in the browser

Needs the extra `demo`, or for `--export_static` the extra `export`: pip install "modeling-lvvit[demo,export]".
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..console import program, require
from ..data.images import MAX_PIXELS_HELP, PixelLimit
from ..export.__main__ import FileArguments
from ..launching import set_up_cpu
from ..options import Program
from .space import export_space
from .static_page import export_static_page


@dataclass
class DemoArguments:
    """Options of the program."""

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Folder or Hub name of a classifier or segmentation model, or timm/NAME.",
        aliases=["--model"],
    )
    further_models: list[str] = HfArg(
        default_factory=list, help="With `--export_static`: further models among which the page lets its user choose."
    )
    export_space: str | None = HfArg(default=None, help="Folder to write a Space to instead.")
    export_static: str | None = HfArg(
        default=None, help="Folder to write static files to instead, a page that runs the model in the browser."
    )
    runtime: str | None = HfArg(
        default=None,
        help="With `--export_static`: folder of the npm package onnxruntime-web; default: npm fetches it once.",
    )
    max_image_pixels: int | None = HfArg(default=None, help=MAX_PIXELS_HELP)
    host: str = HfArg(default="127.0.0.1", help="Address to listen at; default: 127.0.0.1, this machine.")
    port: int | None = HfArg(default=None, help="Default: the first free one from 7860.")
    share: bool = HfArg(default=False, help="Make the page public for a while, through Gradio's servers.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")


PROGRAM = Program(
    "lvvit demo",
    __doc__,
    (DemoArguments, FileArguments),
    ("model_name_or_path", "further_models*"),
    required=("model_name_or_path",),
)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    with PROGRAM.refusals(OverflowError, ImportError):  # for impossible ports, and a page without gradio
        show(*PROGRAM.parse(arguments))


def show(args: DemoArguments, files: FileArguments) -> None:
    """Opens the page, or writes a Space or static files."""
    if args.export_static is not None:
        write_static_page(args, files)
        return
    if args.further_models:
        raise ValueError(
            f"`further_models` ({', '.join(args.further_models)}) are for `export_static`; name one model."
        )
    if args.runtime is not None or files != FileArguments():
        raise ValueError("`runtime` and the options of exported files are for `export_static`; leave them out.")
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


def write_static_page(args: DemoArguments, files: FileArguments) -> None:
    """Writes a folder of static files."""
    if args.export_space is not None:
        raise ValueError("Give `export_static` or `export_space`, not both.")
    logging.set_verbosity_error()
    folder = Path(args.export_static).expanduser().resolve()
    names = [args.model_name_or_path, *args.further_models]
    runtime = None if args.runtime is None else Path(args.runtime)
    export_static_page(names, folder, files.settings(), args.trust_remote_code, runtime)
    print(f"saved to {folder}; to try it: python -m http.server --directory {shlex.quote(str(folder))}")


if __name__ == "__main__":
    main(sys.argv[1:])
