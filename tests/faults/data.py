"""Small data for the programs that faults befall; made in a process of its own, as it needs the libraries."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from support.classifiers import save_annotator
from support.images import encode_image, labelled_table
from support.segmentation_rows import NAMES, masked_rows


IMAGES = 44  # that are annotated


def build(folders: list[str]) -> None:
    """Fills a folder: `classes`, `masks`, `images` and `annotator`."""
    folder = Path(folders[0])
    for name in ("classes", "masks", "images"):
        (folder / name).mkdir()
    parquet.write_table(labelled_table(21), folder / "classes" / "train.parquet")
    parquet.write_table(labelled_table(6, seed=1), folder / "classes" / "test.parquet")
    masked_rows(22).to_parquet(folder / "masks" / "train-00000-of-00001.parquet")
    masked_rows(3, seed=1).to_parquet(folder / "masks" / "validation-00000-of-00001.parquet")
    (folder / "masks" / "id2label.json").write_text(json.dumps(dict(enumerate(NAMES))))
    rng, names = np.random.default_rng(0), ["ant", "bee", "cat"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [
        {"bytes": encode_image(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)), "path": f"{row}.img"}
        for row in range(IMAGES)
    ]
    columns = [pa.array(rows, datasets.Image().pa_type), pa.array(np.arange(IMAGES) % len(names))]
    parquet.write_table(
        pa.Table.from_arrays(columns, schema=features.arrow_schema), folder / "images" / "train.parquet"
    )
    save_annotator(folder / "annotator", names)
