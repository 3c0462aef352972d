"""What fitting leaves in its folder: a classifier, the heads of the folds, the scores of held-out images, and features to use again.

config.json, model.safetensors, ...     the classifier, as its library saves it
fold_heads.safetensors                  with `--folds`
confusion_matrix.png, class_scores.json of held-out images
fit.json                                all figures, written last
features/                               may be removed
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.files.atomic_files import write_json
from ...data.files.folder_lock import FolderLock, is_lock
from ...per_class.report import write_class_report
from ...per_class.scores import Confusions
from .arguments import FitAnnotatorArguments
from .backbone import Backbone
from .fold_heads import FOLD_HEADS, RECORD, save_fold_heads
from .head import GRID, FittedHead, LinearHead
from .images import LabeledImages


FEATURES, PARTIAL = "features", ".partial-"


def check_output_dir(folder: Path) -> None:
    """Raises a `ValueError` if a folder holds something else than an annotator that was fitted, or the start of one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an annotator is a folder.")
    # features are written first: with them a run was killed
    if not folder.is_dir() or (folder / RECORD).is_file() or any((folder / FEATURES).glob("*/settings.json")):
        return
    if others := sorted(
        path.name for path in folder.iterdir() if not is_lock(path) and not path.name.startswith(PARTIAL)
    ):
        raise ValueError(
            f"{folder} holds other files ({', '.join(others[:5])}), and no {RECORD} of an earlier fit. Choose an empty or new folder."
        )


@contextmanager
def locked_output_dir(folder: Path) -> Iterator[None]:
    """Makes a folder, and holds it for this run; what a run that was killed had half written is removed.

    Raises:
        ValueError: If another run holds it.
    """
    with FolderLock(folder, parts=(f"{FEATURES}/*",)):
        for partial in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(partial, ignore_errors=True)
        yield


def write_output(
    args: FitAnnotatorArguments,
    backbone: Backbone,
    images: LabeledImages,
    folds: np.ndarray,
    fitted: dict[str, FittedHead],
    seconds: float,
    finetuning: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the annotator and says how good it is; returns what `fit.json` holds.

    Args:
        backbone: With its heads.
        images, folds: What they were fitted on.
        fitted: By name of the head, that which annotates first.
        seconds: That fitting took.
        finetuning: What the record says of it.
    """
    folder = Path(args.output_dir)
    save_annotator(backbone, args, images, folds, fitted)
    record = {
        "backbone": args.backbone,
        "backbone_revision": args.annotator_revision,
        "dataset": args.dataset_name,
        "split": args.train_split,
        "images": len(images.classes),
        "classes": images.class_names,
        "image_size": list(backbone.image_size),
        "fit": args.fit,
        "bf16": args.bf16,
        "class_weights": args.class_weights,
        "seed": args.seed,
        "folds": args.folds,
        "cross_validation_folds": int(folds.max()) + 1,
        "seconds": round(seconds, 1),
        "finetuning": finetuning,
        "heads": {name: fit_figures(result, images.classes) for name, result in fitted.items()},
    }
    for name, result in fitted.items():
        about = f"{name}: " if len(fitted) > 1 else ""
        print(f"{about}{describe_fit(result, record['heads'][name], int(folds.max()) + 1)}")
    best = next(iter(fitted.values())).logits.argmax(axis=1)
    confusions = Confusions.from_classes(images.classes, best, len(images.class_names))
    print(write_class_report(folder, images.class_names, confusions, "held-out images of the fit"))
    write_json(folder / RECORD, record)
    if args.fit == "pad" and not backbone.is_timm:
        print("note: image processors cannot pad; pipelines and lvvit evaluate squash the images of this classifier")
    print(
        f"fitted in {seconds:.0f} s; use it: lvvit annotate {args.dataset_name} --annotator {folder}{fit_option(args.fit)} ..."
    )
    return record


def fit_option(fit: str) -> str:
    """How `lvvit annotate` is told to bring images to the shape on which a head was fitted."""
    return "" if fit == "squash" else f" --fit {fit}"


def save_annotator(
    backbone: Backbone,
    args: FitAnnotatorArguments,
    images: LabeledImages,
    folds: np.ndarray,
    fitted: dict[str, FittedHead],
) -> None:
    """Writes the classifier and the heads of the folds next to their place, and moves them there; files of an earlier fit are replaced."""
    folder = Path(args.output_dir)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as partial:
        backbone.save(Path(partial), args.fit)
        if args.folds:
            name, result = next(iter(fitted.items()))
            heads = [head_tensors(head) for head in result.fold_heads]
            weight, bias = (torch.stack(parts) for parts in zip(*heads))
            save_fold_heads(Path(partial) / FOLD_HEADS, name, weight, bias, np.asarray(images.hashes), folds)
        for stale in (RECORD, FOLD_HEADS):
            (folder / stale).unlink(missing_ok=True)
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)


def head_tensors(head: LinearHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias in float32."""
    return torch.from_numpy(head.weight).float(), torch.from_numpy(head.bias).float()


def fit_figures(result: FittedHead, classes: np.ndarray) -> dict[str, Any]:
    """What the record says of a head."""
    return {
        "held_out_accuracy": float((result.logits.argmax(axis=1) == classes).mean()),
        "log_loss_before_temperature": result.log_loss[0],
        "log_loss": result.log_loss[1],
        "temperature": result.temperature,
        "regularization": result.regularization,
        "regularization_at_end_of_grid": result.is_at_end,
        "searched_on": result.search_rows,
        "log_loss_by_regularization": {f"{value:.3g}": loss for value, loss in result.losses.items()},
    }


def describe_fit(result: FittedHead, figures: dict[str, Any], number: int) -> str:
    """The figures in two lines."""
    lines = [f"regularization: C {result.regularization:.3g}"]
    if result.losses:
        lines[0] += f", the best of {GRID[0]:.3g} to {GRID[-1]:.3g} on {result.search_rows:,} images"
        if result.is_at_end:
            lines[0] += "; it lies at the end of the grid: try values beyond with --regularization"
    lines.append(
        f"held out ({number} folds): accuracy {100 * figures['held_out_accuracy']:.1f} %, log-loss {result.log_loss[0]:.4f}, with temperature "
        f"{result.temperature:.3f} {result.log_loss[1]:.4f}"
    )
    return "\n".join(lines)
