"""Images with a mask of the labelled class."""

from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa

from support.images import encode_image
from support.models import NUM_CLASSES


def masked(mask_of: Callable[[int], np.ndarray | None], size: int = 40) -> datasets.Dataset:
    """Five random square images; `mask_of` makes the mask of a label."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, NUM_CLASSES, 5).tolist()
    names = [f"thing {index}" for index in range(NUM_CLASSES)]
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "mask": datasets.Image()}
    features = datasets.Features(kinds)
    images = [encode_image(rng.integers(0, 256, (size, size, 3), dtype=np.uint8), "PNG") for _ in labels]
    masks = [None if mask is None else encode_image(mask, "PNG") for mask in map(mask_of, labels)]
    columns = [
        pa.array([value and {"bytes": value, "path": None} for value in files], datasets.Image().pa_type)
        for files in (images, masks)
    ]
    table = pa.Table.from_arrays([columns[0], pa.array(labels), columns[1]], schema=features.arrow_schema)
    return datasets.Dataset(table)


def quarter(label: int) -> np.ndarray:
    """The labelled class fills the upper left quarter of an image."""
    mask = np.full((40, 40), NUM_CLASSES, dtype=np.uint8)
    mask[:20, :20] = label
    return mask
