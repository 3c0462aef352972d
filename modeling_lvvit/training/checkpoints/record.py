"""What `arguments.json` of a run says."""

import json
from pathlib import Path
from typing import Any

from ...hub.hub_trainer import ARGUMENTS, TRAINING_DATA


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def data_record(name: str, split: str) -> dict[str, str]:
    """What `arguments.json` of a run says of the images that it was trained on: Hub name or last part of a path, and split."""
    path = Path(name).expanduser()
    return {"dataset_name": path.absolute().name if path.exists() else name, "train_split": split}


def read_data_record(model: str) -> dict[str, str] | None:
    """The `data_record` of a model in a folder; `None` where there is none."""
    try:
        return read_json(Path(model).expanduser() / ARGUMENTS).get(TRAINING_DATA)
    except (OSError, ValueError):
        return None
