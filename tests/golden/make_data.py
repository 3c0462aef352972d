"""Makes the data of recorded runs, once: `PYTHONPATH=.:tests python tests/golden/make_data.py`. Whoever runs it again records all
losses and old checkpoints anew.

24 images of 30 to 44 pixels with rectangles of four colors for training, 6 for tests, as PNG files, which every decoder reads alike; with
a class, a list of classes, a mask and a dense label of 6 x 5 cells each. And an annotator with random weights.
"""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from support.classifiers import save_annotator
from support.images import labelled_table
from support.models import NUM_CLASSES
from support.segmentation_rows import masked_rows


FOLDER = Path(__file__).parent


def table(num_rows: int, seed: int) -> pa.Table:
    """Images with a label of every kind."""
    rows, dense = masked_rows(num_rows, seed), labelled_table(num_rows, seed)
    rng = np.random.default_rng(seed)
    lists = [np.flatnonzero(rng.random(NUM_CLASSES) < 0.3).tolist() for _ in range(num_rows)]
    names = datasets.Features.from_arrow_schema(dense.schema)["label"]
    features = {**rows.features, **datasets.Features.from_arrow_schema(dense.schema), "labels": datasets.List(names)}
    columns = {
        **{name: rows.data[name] for name in rows.column_names},
        "labels": pa.array(lists, pa.list_(pa.int64())),
    }
    columns |= {name: dense[name] for name in dense.column_names if name != "image"}
    schema = datasets.Features({name: features[name] for name in columns}).arrow_schema
    return pa.Table.from_arrays([pa.chunked_array(columns[name]) if isinstance(columns[name], pa.Array) else columns[name] for name in columns], schema=schema)  # fmt: skip


def main() -> None:
    """Writes `data` and `annotator`."""
    (FOLDER / "data").mkdir(exist_ok=True)
    for split, num_rows, seed in (("train", 24, 0), ("test", 6, 1)):
        parquet.write_table(table(num_rows, seed), FOLDER / "data" / f"{split}.parquet", compression="zstd")
    save_annotator(FOLDER / "annotator", [f"class {index}" for index in range(NUM_CLASSES)])


if __name__ == "__main__":
    main()
