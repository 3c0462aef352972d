"""Finished folders on their way to the Hub: models, exported models and label sets."""

import argparse
import json
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .token_labeling.hub import HubTarget
from .token_labeling.label_set_publishing import push_label_set
from .token_labeling.label_set_writer import RECORD
from .token_labeling.published_files import published_files
from .token_labeling.publishing import CARD, WEIGHTS


PROCESSOR = "preprocessor_config.json"
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model.onnx")


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--private` and `--revision` to the options of a program."""
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a new repository is private; default: the owner's rule",
    )
    parser.add_argument("--revision", help="branch to upload to, made if there is none; default: main")


def is_label_set(folder: Path) -> bool:
    """Whether a folder is a label set, finished or not."""
    return (folder / RECORD).is_file()


def check_model_folder(folder: Path) -> None:
    """Makes sure that a folder has all that a model needs on the Hub.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If something is missing or damaged; the message says what.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    missing = [name for name in (CONFIG_NAME, PROCESSOR) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        missing.append(f"weights ({' or '.join(WEIGHT_FILES)})")
    if not (folder / CARD).is_file():
        missing.append(f"a model card ({CARD})")
    if (folder / CONFIG_NAME).is_file():
        auto_map = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("auto_map") or {}
        needs_code = (folder / SAFE_WEIGHTS_NAME).is_file() or (folder / SAFE_WEIGHTS_INDEX_NAME).is_file()
        files = sorted({f"{reference.rpartition('--')[2].partition('.')[0]}.py" for reference in auto_map.values()})
        missing += [f"modelling code ({name})" for name in files if needs_code and not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no complete model: it lacks {', '.join(missing)}.")
    published_files(folder)


def publish_folder(folder: Path, target: HubTarget) -> str:
    """Uploads a finished model or label set; returns the address of the commit.

    Args:
        folder: Stays as it is.
        target: Opened.

    Raises:
        FileNotFoundError, ValueError: If the folder is not complete; nothing is uploaded then.
        HubError: If the Hub cannot be reached or refuses.
    """
    if target.repo_type == "dataset":
        return push_label_set(folder, target)
    check_model_folder(folder)
    return target.upload(folder, "Upload model", WEIGHTS)
