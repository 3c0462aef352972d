"""Exports a saved classifier or segmentation model to a folder that runs without this package.

    lvvit export outputs/digit_scenes exported
    python exported/predict.py image.png                      # with onnxruntime, numpy and Pillow alone
    lvvit export MODEL DIR --dtype float16
    lvvit export MODEL DIR --format torch

The file takes any number of images, with sides that are multiples of the patch size. It is compared with the model
before it is put in place. ONNX needs the extra `export`: pip install "modeling-lvvit[export]".
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..console import program
from ..launching import set_up_cpu
from ..options import Program
from .folder import FORMATS, export_folder
from .torch_program import DTYPES


@dataclass
class ExportArguments:
    """Options of the program."""

    model_name_or_path: str | None = HfArg(
        default=None, help="Folder or Hub name of an LV-ViT classifier or segmentation model.", aliases=["--model"]
    )
    output_dir: str | None = HfArg(default=None, help="Folder to write; must not exist or be empty.")
    format: Literal[tuple(FORMATS)] = HfArg(default="onnx", help="onnx, or torch for `torch.export`.")
    dtype: Literal[tuple(DTYPES)] = HfArg(default="float32", help="Of weights and computation.")
    fuse: bool = HfArg(default=True, help="Fold batch norms and the residual divisor into weights.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a Hub name.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")


PROGRAM = Program(
    "lvvit export",
    __doc__,
    (ExportArguments,),
    ("model_name_or_path", "output_dir"),
    required=("model_name_or_path", "output_dir"),
)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with PROGRAM.refusals(ImportError):
        (args,) = PROGRAM.parse(arguments)
        agreement = export_folder(
            args.model_name_or_path,
            Path(args.output_dir),
            args.format,
            args.dtype,
            args.fuse,
            args.model_revision,
            args.trust_remote_code,
        )
    sizes = ", ".join(f"{height} x {width}" for height, width in agreement.sizes)
    print(f"largest difference to PyTorch at {sizes} pixels: {agreement.difference:.1e} (bound {agreement.bound:.1e})")
    print(f"same best class: {agreement.same_class:.2%}")
    print(f"saved {FORMATS[args.format]} to {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
