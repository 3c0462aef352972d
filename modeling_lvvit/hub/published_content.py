"""What a repository gets of the files of a run: their content without the places and the name of the machine that made them."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any


RECORDS_WITH_PLACES = ("arguments.json", "trainer_state.json")
CONFIGS, SOURCES = ("config.json",), ("_name_or_path", "name_or_path")
# time, host, process and number of writers before it (`torch.utils.tensorboard`)
EVENT_FILE = re.compile(r"(events\.out\.tfevents\.\d+)\.(.+)\.(\d+\.\d+)")
# of a record of such a file: its length (uint64), a checksum (uint32), the content, another checksum
LENGTH, CHECKSUM = 8, 4
# records of options and configuration, which are published as files; they name folders of the machine
TEXTS = (b"args/text_summary", b"model_config/text_summary")


def published_contents(folder: Path, names: Iterable[str]) -> dict[str, Path | bytes]:
    """Files of a folder as a repository gets them: path there, and content or place of the file.

    - Options, and where a model comes from, say the last part of places on the disk alone.
    - Event files and their folders lose the host in their names, and their copies of options and configuration.
    """
    contents: dict[str, Path | bytes] = {}
    for name in names:
        path, file_name = folder / name, PurePosixPath(name).name
        if file_name in RECORDS_WITH_PLACES:
            contents[name] = _json_bytes(path, without_places(_read(path)))
        elif file_name in CONFIGS:
            config = _read(path)
            sources = {
                key: without_places(config[key]) for key in SOURCES if isinstance(config, dict) and key in config
            }
            contents[name] = _json_bytes(path, config | sources) if sources else path
        elif (event_file := EVENT_FILE.fullmatch(file_name)) is not None:
            start, host, end = event_file.groups()
            parents = [part.removesuffix(f"_{host}") for part in PurePosixPath(name).parts[:-1]]
            records = (record for record in event_records(path) if not any(text in record for text in TEXTS))
            contents["/".join([*parents, f"{start}.{end}"])] = b"".join(records)
        else:
            contents[name] = path
    return contents


def without_places(value: Any) -> Any:
    """A JSON value whose texts that are places on a disk, outside of where a program runs, are their last parts."""
    if isinstance(value, dict):
        return {key: without_places(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_places(part) for part in value]
    if not isinstance(value, str):
        return value
    kinds: tuple[type[PurePath], ...] = (PurePosixPath, PureWindowsPath)
    paths = [kind(value) for kind in kinds]
    is_place = any(path.is_absolute() or path.parts[:1] in [("..",), ("~",)] for path in paths)
    return paths[value.count("\\") > 0].name if is_place or value.startswith("~") else value


def event_records(path: Path) -> Iterator[bytes]:
    """Whole records of an event file, each with its length and its checksums; one that is cut off at the end is left out."""
    content, start = path.read_bytes(), 0
    while start + LENGTH <= len(content):
        length = int.from_bytes(content[start : start + LENGTH], "little")
        end = start + LENGTH + CHECKSUM + length + CHECKSUM
        if end > len(content):
            return
        yield content[start:end]
        start = end


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_bytes(path: Path, value: Any) -> bytes:
    """A JSON file with another value, or its own bytes where the value is the same."""
    if value == _read(path):
        return path.read_bytes()
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
