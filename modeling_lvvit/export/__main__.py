"""Exports a saved classifier or segmentation model to a folder that runs without this package.

    python -m modeling_lvvit.export --model outputs/digit_scenes --output_dir exported
    python exported/predict.py image.png                      # with onnxruntime, numpy and Pillow alone
    python -m modeling_lvvit.export --model MODEL --output_dir DIR --dtype float16
    python -m modeling_lvvit.export --model MODEL --output_dir DIR --format torch

The file takes any number of images, with sides that are multiples of the patch size. It is compared with the model
before it is put in place. ONNX needs the extra `export`: pip install -e ".[export]".
"""

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from ..console import program
from ..launching import set_up_cpu
from .folder import FORMATS, export_folder
from .torch_program import DTYPES


MODULE = "modeling_lvvit.export"


def parser() -> argparse.ArgumentParser:
    """Options of the program."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="folder or Hub name of an LV-ViT classifier or segmentation model"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and computation; default: %(default)s"
    )
    parser.add_argument("--no_fuse", action="store_true", help="keep batch norms and residual divisor as they are")
    parser.add_argument("--model_revision", help="branch, tag or commit of a Hub name")
    parser.add_argument("--trust_remote_code", action="store_true", help="allow code of a Hub repository to run")
    return parser


@program(MODULE)
def main(arguments: list[str] | None = None) -> None:
    options = parser()
    args = options.parse_args(arguments)
    set_up_cpu(torch.device("cpu"))
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        agreement = export_folder(
            args.model,
            args.output_dir,
            args.format,
            args.dtype,
            not args.no_fuse,
            args.model_revision,
            args.trust_remote_code,
        )
    except (ValueError, OSError, ImportError) as error:
        options.exit(1, f"{MODULE}: {error}\n")
    sizes = ", ".join(f"{height} x {width}" for height, width in agreement.sizes)
    print(f"largest difference to PyTorch at {sizes} pixels: {agreement.difference:.1e} (bound {agreement.bound:.1e})")
    print(f"same best class: {agreement.same_class:.2%}")
    print(f"saved {FORMATS[args.format]} to {args.output_dir}")


if __name__ == "__main__":
    main()
