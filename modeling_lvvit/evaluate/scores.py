"""Measures of image classifiers: top-1 and top-5 accuracy, accuracy by re-assessed labels, and mean corruption error."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from timm.data import RealLabelsImagenet

from ..training.metrics import TOP_K, TopKAccuracy


SHIPPED = "imagenet"  # the re-assessed labels that timm has
IMAGENET_VALIDATION_IMAGES = 50_000
# Error rates of AlexNet on the corruptions of ImageNet-C, mean of five severities, in [0, 1]: the reference of the mean
# corruption error. Source: Hendrycks and Dietterich, ICLR 2019, and their repository (github.com/hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880, "glass_blur": 0.826268,
    "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


class ClassificationScores(TopKAccuracy):
    """Top-1 and top-5 accuracy, and accuracy by re-assessed labels (ReaL, Beyer et al. 2020, arXiv:2006.07159).

    Args:
        num_labels: Number of classes; with fewer than six there is no top-5 accuracy, which would say nothing.
        kwargs: See `AccumulatingMetric`.
    """

    def __init__(self, num_labels: int, **kwargs: Any):
        super().__init__(has_top5=num_labels > TOP_K, further_counts=2, **kwargs)
        self.num_labels = num_labels

    def describe(self) -> tuple[str, str]:
        """What is measured, and what predictions and references are."""
        description, inputs = super().describe()
        return f"{description} Share of images whose best predicted class is one that people see in it.", inputs

    def add_batch(
        self, *, predictions: Any, references: Any, real: Sequence[Collection[int] | None] | None = None, **kwargs: Any
    ) -> None:
        """Counts images.

        Args:
            predictions, references: See `TopKAccuracy`.
            real: Of each image the classes that people see in it; an image with none, or with `None`, does not count.
        """
        truth = torch.as_tensor(references)
        if len(truth) and not 0 <= truth.min() <= truth.max() < self.num_labels:
            raise ValueError(
                f"True classes lie in [0, {self.num_labels}), got {int(truth.min())} to {int(truth.max())}: a split without labels?"
            )
        super().add_batch(predictions=predictions, references=references)
        for ranked, seen in zip(torch.as_tensor(predictions).tolist(), real or ()):
            if seen:
                self.counts[3:] += torch.tensor([1, ranked[0] in seen])

    def measures(self, counts: np.ndarray) -> dict[str, float]:
        """`accuracy`, `top5_accuracy` and, where there were such labels, `real_accuracy`, in [0, 1], with the number of images."""
        images, _, _, real_images, real_hits = counts.tolist()
        result = super().measures(counts)
        if real_images:
            result |= {"real_accuracy": real_hits / real_images, "real_images": real_images}
        return {**result, "images": images}


def imagenet_real_labels() -> list[list[int]]:
    """The re-assessed labels of the 50,000 validation images of ImageNet, as timm ships them; see `read_real_labels`."""
    shipped = RealLabelsImagenet([""] * IMAGENET_VALIDATION_IMAGES).real_labels
    return [shipped[name] for name in sorted(shipped)]


def find_real_labels(name: str) -> list[list[int]]:
    """Re-assessed labels by name: `imagenet`, a file, or a URL, which is downloaded to the cache of `datasets`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the file holds something else.
    """
    if name == SHIPPED:
        return imagenet_real_labels()
    if name.startswith(("http://", "https://")):
        return read_real_labels(Path(datasets.DownloadManager().download(name)))
    return read_real_labels(Path(name).expanduser())


def read_real_labels(path: Path) -> list[list[int]]:
    """Re-assessed labels: of each validation image, in the order of its number, the classes that people see in it.

    Args:
        path: JSON file, a list of lists of class ids (`real.json` of github.com/google-research/reassessed-imagenet).

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of re-assessed labels {path}.")
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(labels, list) or not all(
        isinstance(classes, list) and all(type(index) is int and index >= 0 for index in classes) for classes in labels
    ):
        raise ValueError(f"{path} must be a list with a list of class ids for each image.")
    return labels


def missing_corruptions(names: Collection[str]) -> list[str]:
    """Those of the 15 corruptions that the mean corruption error is the mean of which are not among some names."""
    return [name for name in ALEXNET_ERRORS if name not in names]


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Corruption errors relative to AlexNet's, and their mean.

    `CE of a corruption = sum of its error rates / sum of AlexNet's`, over the severities; mCE is the mean over the 15 corruptions
    (Hendrycks and Dietterich 2019, arXiv:1903.12261, section 4.2).

    Args:
        errors: Corruption -> error rates in [0, 1], one for each severity.

    Returns:
        `ce_NAME` of each known corruption and, if none of the 15 is missing, `mce`; 1 is AlexNet.

    Example: error rates of 0.4 and 0.5 for fog give `ce_fog` 0.45 / 0.819324 = 0.549.
    """
    relative = {
        name: float(np.mean(errors[name])) / alexnet for name, alexnet in ALEXNET_ERRORS.items() if name in errors
    }
    result = {f"ce_{name}": value for name, value in relative.items()}
    if not missing_corruptions(errors):
        result["mce"] = float(np.mean(list(relative.values())))
    return result
