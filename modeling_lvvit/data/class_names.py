"""Files of class names."""

import json
from pathlib import Path


def read_class_names(path: Path) -> list[str]:
    """Class names in the order of their ids: of a JSON file (a list, or ids to names), or of a text file with one in a line; a
    `ValueError` if it holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        if isinstance(names, dict):
            names = [names[str(index)] for index in range(len(names))]
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} holds no class names: expected ids from 0 to names, got an error at {error}."
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} holds no class names: expected a list of names, or ids to names.")
    return names
