"""Writing label maps of crops, and the record of how the crops were drawn.

A label set of crops is a label set whose rows are those of epoch 0, then those of epoch 1, and so on, each epoch with the same images in
the order of the training rows. Each row has the number of its epoch, and as `map_box` the crop as it was drawn: left, top, right, bottom
as fractions of the image after flip and RandAugment. The map shows the crop and nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from huggingface_hub import hf_hub_download

from ...data.image_keys import repeated_keys
from ..storage import EPOCH_COLUMN
from ..writer import RECORD, LabelSetWriter


DRAWN, ROWS = "crops.", "rows."  # how settings are called that decide how crops are drawn, and which rows are


@dataclass(frozen=True)
class CropRecord:
    """How the crops of a label set were drawn.

    Args:
        num_epochs, num_rows: Epochs, and rows of each.
        drawn: `data_seed` and `TrainTransform.draw_options`.
        rows: Options that chose the training rows.
        timm: Version of timm, which decides how strong RandAugment is; `None` if it is not known.
    """

    num_epochs: int
    num_rows: int
    drawn: dict[str, Any]
    rows: dict[str, Any]
    timm: str | None = None

    def settings(self) -> dict[str, Any]:
        """Settings of the label set, see `LabelSetWriter`."""
        named = {f"{DRAWN}{name}": value for name, value in self.drawn.items()}
        named |= {f"{ROWS}{name}": value for name, value in self.rows.items()}
        return {"epochs": self.num_epochs, "num_rows": self.num_rows, **named}


def read_record(name: str, revision: str | None = None) -> CropRecord:
    """The record of a label set of crops, a folder or Hub name.

    Raises:
        ValueError: If it is damaged, or that of another label set.
    """
    folder = Path(name).expanduser()
    path = (
        folder / RECORD
        if folder.is_dir()
        else Path(hf_hub_download(name, RECORD, repo_type="dataset", revision=revision))
    )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings, version = content["settings"], content.get("versions", {}).get("timm")
        drawn, rows = (
            {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
            for prefix in (DRAWN, ROWS)
        )
        return CropRecord(settings["epochs"], settings["num_rows"], drawn, rows, version)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say how the crops of the label set were drawn ({error!r}): annotate them again."
        ) from error


class CropLabelSetWriter(LabelSetWriter):
    """A `LabelSetWriter` each of whose shards belongs to one epoch; `settings` are those of a `CropRecord` and others."""

    @property
    def shards_per_epoch(self) -> int:
        """Shards of one epoch."""
        return -(-self.settings["num_rows"] // self.rows_per_shard)

    def write(self, shard: int, table: pa.Table) -> None:
        """As in `LabelSetWriter`, with the number of the epoch in each row."""
        epochs = pa.array([shard // self.shards_per_epoch] * len(table), pa.int32())
        features = datasets.Features({**self.layout.features, EPOCH_COLUMN: datasets.Value("int32")})
        columns = [*table.columns, epochs]
        super().write(shard, pa.Table.from_arrays(columns, schema=features.arrow_schema))

    def repeated_keys(self, keys: pa.ChunkedArray) -> list[str]:
        """As in `LabelSetWriter`, within an epoch."""
        return repeated_keys(keys.slice(0, self.settings["num_rows"]))
