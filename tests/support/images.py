"""Small image tables."""

import io

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image

from modeling_lvvit.labels.columns import label_map_features, to_arrow
from support.models import MAP_COLUMNS, MAP_ROWS, NUM_CLASSES, K


def encode_image(array: np.ndarray, file_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format=file_format)
    return buffer.getvalue()


def labelled_table(num_rows: int = 12, seed: int = 0) -> pa.Table:
    """Random images of different sizes with labels and label maps."""
    rng = np.random.default_rng(seed)
    images = [
        encode_image(rng.integers(0, 256, (rng.integers(20, 40), rng.integers(20, 60), 3), dtype=np.uint8))
        for _ in range(num_rows)
    ]
    shape = (num_rows, K, MAP_ROWS, MAP_COLUMNS)
    ids = np.argsort(rng.random((num_rows, NUM_CLASSES, MAP_ROWS, MAP_COLUMNS)), axis=1)[:, :K].astype(np.int16)
    scores = -np.sort(-rng.normal(2, 2, shape).astype(np.float16), axis=1)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"class {index}" for index in range(NUM_CLASSES)]),
            **label_map_features(K, MAP_ROWS, MAP_COLUMNS, "int16"),
        }
    )
    columns = [
        pa.array(
            [{"bytes": image, "path": f"{row}.jpg"} for row, image in enumerate(images)],
            datasets.Image().pa_type,
        ),
        pa.array(rng.integers(0, NUM_CLASSES, num_rows)),
        to_arrow(ids),
        to_arrow(scores),
    ]
    return pa.Table.from_arrays(columns, schema=features.arrow_schema)
