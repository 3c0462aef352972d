"""Fits an annotator for images of own classes: a linear classifier on the features of any pretrained network.

    lvvit fit-annotator path/to/images --backbone timm/vit_small_patch14_dinov2.lvd142m --output_dir annotator
    lvvit annotate path/to/images --annotator annotator --output_dir labels

The backbone stays as it is; its features are computed once and kept, so that a run that was killed goes on, and a second one with other
options of the head takes seconds.
"""

import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...console import program
from ...data.images import PixelLimit, parse_image_size
from ...data.loaders import num_preparing_workers
from ...launching import num_cpu_cores, set_up_cpu
from ...options import Program
from ...per_class.weights import training_weights
from ..annotator import Annotator, load_annotator
from .arguments import FitAnnotatorArguments
from .backbone import Backbone, find_heads, load_backbone, set_head
from .features import FeatureExtractor, FeatureStore, backbone_fingerprint, compute_features, hash_images
from .finetune import finetune
from .head import fit_head
from .images import LabeledImages, fold_images, open_labeled_images
from .output import FEATURES, PARTIAL, check_output_dir, head_tensors, locked_output_dir, write_output


PROGRAM = Program(
    "lvvit fit-annotator",
    __doc__,
    (FitAnnotatorArguments,),
    ("dataset_name",),
    required=("dataset_name", "backbone", "output_dir"),
)


def load_for_features(
    backbone: Backbone, args: FitAnnotatorArguments, device: torch.device
) -> tuple[Annotator, list[str]]:
    """The backbone as the annotator that it will be, saved and loaded again, so that what `lvvit annotate` would refuse is refused before
    features are computed; and the names of its heads.

    Raises:
        ValueError: If it cannot be saved and loaded, label cells, or have its head fitted.
    """
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=args.output_dir) as folder:
        backbone.save(Path(folder), args.fit)
        try:
            annotator = load_annotator(folder, None, args.fit, device, None, args.annotator_trust_remote_code)
            heads = find_heads(annotator.dense.model, backbone.image_size)
        except ValueError as error:
            text = str(error).replace(folder, args.backbone)
            raise ValueError(f"The backbone {args.backbone} cannot become an annotator: {text}") from error
    return annotator, heads


def load_features(
    args: FitAnnotatorArguments, images: LabeledImages, annotator: Annotator, heads: list[str]
) -> dict[str, np.ndarray]:
    """Features by head, computed where they are not there yet; says how many."""
    start, preprocessing = time.monotonic(), annotator.preprocessing
    settings = {"backbone": backbone_fingerprint(annotator.dense.model, heads), "heads": heads, "bf16": args.bf16}
    settings |= {"preprocessing": asdict(preprocessing), "decoding": "reduced"}  # earlier versions decoded in full
    extract = FeatureExtractor(annotator.dense.model, heads, preprocessing, args.bf16)
    store = FeatureStore(Path(args.output_dir) / FEATURES, settings)
    workers = num_preparing_workers(args.num_workers)
    features, number = compute_features(
        images.rows, images.keys, args.image_column_name, images.hashes, extract, store, args.batch_size, workers
    )
    width = " and ".join(f"{values.shape[1]:,}" for values in features.values())
    there = f"; {len(images.rows) - number:,} were there" if number < len(images.rows) else ""
    print(
        f"features: {width} of each image, computed of {number:,} images in {time.monotonic() - start:.0f} s{there} ({store.folder})",
        flush=True,
    )
    return features


def fit_annotator(args: FitAnnotatorArguments, device: torch.device) -> dict[str, Any]:
    """Fits an annotator and writes it; returns what `fit.json` holds."""
    PixelLimit(args.max_image_pixels)
    check_output_dir(Path(args.output_dir))
    images = open_labeled_images(args)
    weights = training_weights(
        args.class_weights, images.class_names, np.bincount(images.classes, minlength=len(images.class_names))
    )
    image_size = parse_image_size(args.annotator_image_size, "`annotator_image_size`")
    source = {"revision": args.annotator_revision, "trust_remote_code": args.annotator_trust_remote_code}
    backbone = load_backbone(args.backbone, images.class_names, image_size, source)
    with locked_output_dir(Path(args.output_dir)):
        annotator, heads = load_for_features(backbone, args, device)
        size, grid = ("{} x {}".format(*sides) for sides in (backbone.image_size, annotator.dense.grid_size))
        name = type(annotator.dense.model).__name__
        print(f"backbone: {name}, images of {size} pixels ({args.fit}), maps of {grid} cells", flush=True)
        workers = args.num_workers or num_cpu_cores()  # threads
        images.hashes = hash_images(images.rows, images.keys, args.image_column_name, workers)
        folds = None if None in images.hashes else fold_images(args, images)
        features = load_features(args, images, annotator, heads)  # which names an image that cannot be read
        sample_weights = np.ones(len(folds)) if weights is None else weights[images.classes]
        settings = (images.classes, sample_weights, folds, len(images.class_names), args.regularization)
        start = time.monotonic()
        fitted = {name: fit_head(values, *settings) for name, values in features.items()}
        seconds = time.monotonic() - start
        finetuned = None
        if args.finetune_epochs:
            finetuned = finetune(args, backbone, images, features, fitted, weights, annotator.preprocessing, device)
        if finetuned is not None and finetuned.is_better:
            backbone.model = finetuned.model
        else:
            for name, result in fitted.items():
                set_head(backbone.model, name, *head_tensors(result.head))
        return write_output(args, backbone, images, folds, fitted, seconds, finetuned and finetuned.figures)


@program(PROGRAM.name)
def main(arguments: list[str]) -> None:
    with PROGRAM.refusals(torch.OutOfMemoryError, of_all_processes=False):
        (args,) = PROGRAM.parse(arguments)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        set_up_cpu(device)
        fit_annotator(args, device)


if __name__ == "__main__":
    main(sys.argv[1:])
