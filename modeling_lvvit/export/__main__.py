"""Exports a saved image classifier or segmentation model to a folder that runs without this package.

    lvvit export outputs/digit_scenes exported
    python exported/predict.py image.png                      # with onnxruntime, numpy and Pillow alone
    lvvit export MODEL DIR --dtype float32 int8 --check_images DATASET
    lvvit export MODEL DIR --format torch

ONNX files take images of any size and prepare them. They run in Python, and with transformers.js in Node and browsers. Each is compared
with the model before the folder is put in place. ONNX needs the extra `export`: pip install "modeling-lvvit[export]".
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from ..console import program
from ..launching import set_up_cpu
from ..options import Program
from .folder import FORMATS, ONNX_FILES, ExportSettings, export_folder


@dataclass
class FileArguments:
    """Options of exported files, and of how they are checked."""

    dtype: list[str] = field(
        default_factory=lambda: ["float32"],
        metadata={
            "help": f"Of weights and computation: {', '.join(ONNX_FILES)}; several make several files. int8 needs --check_images."
        },
    )
    check_images: str | None = HfArg(
        default=None, help="Images on which files are compared with the model: folder, Hub name or Parquet files."
    )
    max_check_images: int = HfArg(default=ExportSettings.max_check_images, help="How many of them at most.")
    min_agreement: float = HfArg(
        default=ExportSettings.min_agreement,
        help="Share of equal predictions on them below which nothing is saved; 0 saves in any case.",
    )
    calibration: str | None = HfArg(
        default=None, help="Images that set the ranges of activations of convolutions, for int8: makes ResNets faster."
    )

    def settings(self, **others: Any) -> ExportSettings:
        """Settings of the export, with others; a `ValueError` if they do not fit each other."""
        return ExportSettings(
            dtypes=self.dtype,
            calibration=self.calibration,
            check_images=self.check_images,
            max_check_images=self.max_check_images,
            min_agreement=self.min_agreement,
            **others,
        )


@dataclass
class ExportArguments:
    """Options of the program."""

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Folder or Hub name of an image classifier or LV-ViT segmentation model, or timm/NAME.",
        aliases=["--model"],
    )
    output_dir: str | None = HfArg(default=None, help="Folder to write; must not exist or be empty.")
    format: Literal[tuple(FORMATS)] = HfArg(default="onnx", help="onnx, or torch for `torch.export`.")
    prepare: bool = HfArg(
        default=True,
        help="Whether ONNX files resize, crop and normalize images themselves; without, they take normalized ones.",
    )
    fuse: bool = HfArg(default=True, help="Fold batch norms and residual divisor into weights.")
    model_revision: str | None = HfArg(default=None, help="Branch, tag or commit of a Hub name.")
    trust_remote_code: bool = HfArg(default=False, help="Allow code of a Hub repository to run.")


PROGRAM = Program(
    "lvvit export",
    __doc__,
    (ExportArguments, FileArguments),
    ("model_name_or_path", "output_dir"),
    required=("model_name_or_path", "output_dir"),
)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    set_up_cpu(torch.device("cpu"))
    logging.set_verbosity_error()
    with PROGRAM.refusals(ImportError):
        args, files = PROGRAM.parse(arguments)
        settings = files.settings(file_format=args.format, fuse=args.fuse, prepare=args.prepare)
        exported = export_folder(
            args.model_name_or_path, Path(args.output_dir), settings, args.model_revision, args.trust_remote_code
        )
    for file in exported:
        print("\n".join(file.lines()))
    names = ", ".join(file.path.name for file in exported)
    print(f"saved {names} to {args.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
