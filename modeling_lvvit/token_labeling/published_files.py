"""Which files of a folder may be published: those of known formats whose content is what their name says. A pickle never is."""

import ast
import json
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError, safe_open


EVENTS = "tfevents"  # part of the names of TensorBoard's logs, which have no ending of their own
EVENT_HEADER = struct.Struct("<QI")  # length of a record and its checksum; behind the record comes another one
CHECKSUM_BYTES = 4
ONNX_VERSION_FIELD = 0x08  # first field of every ONNX file (protobuf): its version, a small number
# parts of paths that are not published: hidden files, checkpoints with the state of the optimiser, files half written
LEFT_OUT_PREFIXES, LEFT_OUT_ENDING = (".", "_", "checkpoint-"), ".partial"


def published_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths in a folder that may be published, and of other files that lie there.

    Hidden files, checkpoints, names that start with `_` and files half written are in neither list.

    Args:
        folder: Its files are read as far as their format needs; nothing in them is executed.

    Raises:
        ValueError: If the content of a file is not what its name says, or it is damaged.
    """
    published, others = [], []
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        parts = path.relative_to(folder).parts
        if path.name.endswith(LEFT_OUT_ENDING) or any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            continue
        check = FORMATS.get(path.suffix.lower(), _check_events if EVENTS in path.name else None)
        (others if check is None else published).append("/".join(parts))
        if check is not None:
            _run(check, path)
    return published, others


def _run(check: Callable[[Path], None], path: Path) -> None:
    try:
        check(path)
    except (ValueError, SyntaxError, OSError, SafetensorError, pa.ArrowException, struct.error) as error:
        raise ValueError(
            f"{path} is no whole {path.suffix.lstrip('.') or 'events'} file and cannot be published: {error}. Write it anew or remove it."
        ) from error


def _check_safetensors(path: Path) -> None:
    with safe_open(path, framework="numpy"):  # compares the header with the size of the file
        pass


def _check_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _check_code(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"))


def _check_text(path: Path) -> None:
    """Text in UTF-8. The oldest form of a pickle is text too, and read by the same calls that load the others."""
    content = path.read_bytes()
    content.decode("utf-8")
    try:
        count = sum(1 for _ in pickletools.genops(content))
    except (ValueError, IndexError, struct.error):
        return
    if count > 1:
        raise ValueError("it is a pickle")


def _check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.verify()


def _check_parquet(path: Path) -> None:
    pq.read_metadata(path)


def _check_onnx(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(2)
    if len(start) < 2 or start[0] != ONNX_VERSION_FIELD or start[1] >= 0x80:
        raise ValueError("it does not start with the version of an ONNX model")


def _check_events(path: Path) -> None:
    """Records of TensorBoard, from the first to the last; the last one may still be being written."""
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position + EVENT_HEADER.size <= size:
            file.seek(position)
            length, _ = EVENT_HEADER.unpack(file.read(EVENT_HEADER.size))
            if position == 0 and length > size:
                raise ValueError("its first record is longer than the file")
            position += EVENT_HEADER.size + length + CHECKSUM_BYTES


FORMATS: dict[str, Callable[[Path], None]] = {
    ".safetensors": _check_safetensors,
    ".json": _check_json,
    ".py": _check_code,
    **dict.fromkeys((".md", ".txt", ".yaml", ".csv"), _check_text),
    **dict.fromkeys((".png", ".jpg", ".jpeg"), _check_picture),
    ".parquet": _check_parquet,
    ".onnx": _check_onnx,
}
