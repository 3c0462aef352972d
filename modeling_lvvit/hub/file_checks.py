"""Which files of a folder may be published: those whose name belongs to a model or a label set, and no pickle under such a name."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from ..data.files.digests import DIGESTS, damaged_files, file_digests, write_digests
from ..finite import listed


CARD = "README.md"
# weights of a model, of which a repository holds one set
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
RECORDS = ("arguments.json", "trainer_state.json", "*_results.json", "class_scores.json", "token_labels.json")
# an exported model, by itself or in the folder `onnx` of another one
EXPORTED_WEIGHTS = ("onnx/model*.onnx", "onnx/model*.onnx_data*")
MODEL_PARTS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.onnx",
    "predict.py",
    *EXPORTED_WEIGHTS,
)
# whatever else lies in a folder is the user's own
PUBLISHED = (
    CARD, "LICENSE*", "NOTICE*", DIGESTS, *WEIGHTS, *RECORDS, *MODEL_PARTS, *(f"onnx/{part}" for part in MODEL_PARTS), f"onnx/{CARD}",
    "configuration_*.py", "modeling_*.py", "image_processing_*.py", "*.png", "*.jpg", "runs/*tfevents*", "data/*.parquet",
)  # fmt: skip
# as they are called by libraries that load them; the old forms of what is published here, and what a Trainer leaves
PICKLES = (
    "training_args.bin", "pytorch_model*.bin", "pytorch_model.bin.index.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth"
)  # fmt: skip
PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".pt2")
REPLACED = (*WEIGHTS, DIGESTS, *PICKLES)  # of a repository, by the upload of a model
REPLACED_BY_EXPORTED = (*EXPORTED_WEIGHTS, DIGESTS)
LEFT_OUT_PREFIXES, LEFT_OUT_ENDING = (".", "_", "checkpoint-"), ".partial"


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path in a folder or repository matches one of the patterns (`fnmatch`), in which `*` may stand for `/` only where
    the pattern has a folder."""
    return any(fnmatchcase(name, pattern) and ("/" in pattern or "/" not in name) for pattern in patterns)


def published_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths in a folder that may be published, and of other files that lie there.

    Hidden files, checkpoints, names that start with `_` and files half written are in neither list; links to somewhere else are among
    the others. Headers and ends of files are read; nothing in them is executed.

    Raises:
        ValueError: If a safetensors, JSON or Parquet file, or a card, is not what its name says, or is damaged.
    """
    published, others = [], []
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        parts = path.relative_to(folder).parts
        if path.name.endswith(LEFT_OUT_ENDING) or any(part.startswith(LEFT_OUT_PREFIXES) for part in parts):
            continue
        name = "/".join(parts)
        if matches(name, PUBLISHED) and path.resolve().is_relative_to(folder.resolve()):
            _check_content(path)
            published.append(name)
        else:
            others.append(name)
    return published, others


def write_weight_digests(folder: Path) -> None:
    """Writes the digests of the weights of a finished model, by which `check_digests` finds damage."""
    names = [path.name for pattern in WEIGHTS for path in folder.glob(pattern)]
    if names:
        write_digests(folder, file_digests(folder, names))


def check_digests(folder: Path) -> None:
    """Raises a `ValueError` if files of a folder are not what its list of digests says; a folder without one passes."""
    if problems := damaged_files(folder):
        raise ValueError(
            f"{folder} cannot be published: {listed(problems)}. Make it again or take it from a copy; if you have changed it yourself, "
            f"remove {DIGESTS} there."
        )


def _check_content(path: Path) -> None:
    """Raises a `ValueError` if a file of data is not what its name says."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):  # compares the header with the size of the file
                pass
        elif path.suffix == ".parquet":
            pq.read_metadata(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".md":
            path.read_text(encoding="utf-8")
    except (ValueError, OSError, SafetensorError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} is no whole {path.suffix.lstrip('.')} file and cannot be published: {error}. Write it again or remove it."
        ) from error
