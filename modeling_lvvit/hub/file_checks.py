"""Which files of a folder may be published: those that belong to a model or a label set and are what their name says. A pickle never is."""

import ast
import io
import json
import pickletools
import struct
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import SafetensorError, safe_open


CARD = "README.md"
# weights of a model, of which a repository holds one set
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
RECORDS = ("arguments.json", "trainer_state.json", "*_results.json", "class_scores.json", "token_labels.json")
MODEL_PARTS = ("config.json", "preprocessor_config.json", "processor_config.json", "model.onnx", "predict.py")
# whatever else lies in a folder is the user's own
PUBLISHED = (
    CARD, "LICENSE*", "NOTICE*", *WEIGHTS, *RECORDS, *MODEL_PARTS, *(f"onnx/{part}" for part in MODEL_PARTS), f"onnx/{CARD}",
    "configuration_*.py", "modeling_*.py", "image_processing_*.py", "*.png", "*.jpg", "runs/*tfevents*", "data/*.parquet",
)  # fmt: skip
# as they are called by libraries that load them; the old forms of what is published here, and what a Trainer leaves
PICKLES = (
    "training_args.bin",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
)
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".pt2")
EVENT_HEADER = struct.Struct("<QI")  # length of a record and its checksum; behind the record comes another one
CHECKSUM_BYTES = 4
ONNX_VERSION_FIELD = 0x08  # first field of every ONNX file (protobuf): its version, a small number
LEFT_OUT_PREFIXES, LEFT_OUT_ENDING = (".", "_", "checkpoint-"), ".partial"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path in a folder or repository matches one of the patterns (`fnmatch`), in which `*` may stand for `/` only where
    the pattern has a folder."""
    return any(fnmatchcase(name, pattern) and ("/" in pattern or "/" not in name) for pattern in patterns)


def published_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths in a folder that may be published, and of other files that lie there.

    Hidden files, checkpoints, names that start with `_` and files half written are in neither list; links to somewhere else are among
    the others.

    Args:
        folder: Of its files, headers, ends and what is text are read; nothing in them is executed.

    Raises:
        ValueError: If a file is not what its name says, or is damaged.
    """
    published, others = [], []
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        parts = path.relative_to(folder).parts
        if path.name.endswith(LEFT_OUT_ENDING) or any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            continue
        name = "/".join(parts)
        if not matches(name, PUBLISHED) or not path.resolve().is_relative_to(folder.resolve()):
            others.append(name)
            continue
        published.append(name)
        _run(_check_events if parts[0] == "runs" else FORMATS.get(path.suffix.lower(), _check_text), path)
    return published, others


def _run(check: Callable[[Path], None], path: Path) -> None:
    try:
        check(path)
    except (ValueError, SyntaxError, OSError, SafetensorError, pa.ArrowException, struct.error) as error:
        raise ValueError(
            f"{path} is no whole {path.suffix.lstrip('.')} file and cannot be published: {error}. Write it again or remove it."
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
        pickletools.dis(content, io.StringIO())  # also follows the stack, on which ordinary text stumbles
    except (ValueError, IndexError, struct.error):
        return
    if sum(1 for _ in pickletools.genops(content)) > 2:  # a number with a full stop is one too, and no harm
        raise ValueError("it is a pickle")


def _check_image(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()


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
    ".md": _check_text,
    **dict.fromkeys((".png", ".jpg", ".jpeg"), _check_image),
    ".parquet": _check_parquet,
    ".onnx": _check_onnx,
}
