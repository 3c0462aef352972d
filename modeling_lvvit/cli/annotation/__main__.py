"""Annotates images: any image dataset, any image classifier, a label set that `lvvit train --token_labels` joins to them.

    lvvit annotate path/to/images --annotator timm/dm_nfnet_f6.dm_in1k --annotator_image_size 576 --output_dir labels
    lvvit annotate path/to/images --annotator MODEL --crops RECIPE name=value --epochs 30 --output_dir labels

The second form labels the very crops that `lvvit train RECIPE --name value` sees. The program can be killed at any time and started
again; the result is the same.
"""

import sys
from functools import partial

import torch

from ...annotators import annotate
from ...annotators.arguments import AnnotateArguments
from ...console import program
from ...launching import start_missing_processes
from ...options import Program
from .crops import CropArguments, annotate_crops, read_recipe_options


MODULE = "modeling_lvvit.cli.annotation"
PROGRAM = Program(
    "lvvit annotate",
    __doc__,
    (AnnotateArguments, CropArguments),
    annotate.PROGRAM.positional,
    annotate.PROGRAM.required,
    may_be_empty=("crops",),
)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    if start_missing_processes(["--module", MODULE], arguments):
        return
    with PROGRAM.refusals(torch.OutOfMemoryError, of_all_processes=False):
        args, crop_args = PROGRAM.parse(arguments)
        if crop_args.crops is None:
            annotate.run(args)
        else:
            crop_args.check(args)
            recipe = read_recipe_options(args, crop_args.crops)
            annotate.run(args, partial(annotate_crops, recipe, crop_args.epochs))


if __name__ == "__main__":
    main(sys.argv[1:])
