"""Finished folders of models and exported models on their way to the Hub."""

import itertools
import json
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..finite import check_weight_files
from .exported_models import check_kind, is_exported, write_card
from .file_checks import CARD, REPLACED, REPLACED_BY_EXPORTED, published_files
from .repository import HubTarget


logger = logging.get_logger(__name__)
CARD_TEMPLATES = Path(__file__).parents[1] / "card_templates"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
ONNX = "model.onnx"
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ONNX)


def check_model_folder(folder: Path) -> None:
    """Makes sure that a folder has all that a model needs on the Hub; that there is no image processor is a warning.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If something is missing or damaged, or weights are NaN or infinite; the message says what.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    names, _ = published_files(folder)
    missing = [name for name in (CONFIG_NAME, CARD) if name not in names]
    weights = [name for name in WEIGHT_FILES if name in names]
    if not weights and not is_exported(names):
        missing.append(f"weights ({' or '.join(WEIGHT_FILES)})")
    if SAFE_WEIGHTS_INDEX_NAME in weights and SAFE_WEIGHTS_NAME not in weights:
        shards = set(_read(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map", {}).values())
        missing += sorted(shards - set(names))
    if CONFIG_NAME in names and weights and weights != [ONNX]:
        missing += sorted(_code_files(_read(folder / CONFIG_NAME)) - set(names))
    if missing:
        raise ValueError(f"{folder} is no complete model: it lacks {', '.join(missing)}.")
    check_weight_files(folder, "model*.safetensors")
    if not set(PROCESSORS) & set(names):
        text = "%s has no image processor (%s): no one will know how to prepare images."
        logger.warning(text, folder, PROCESSORS[0])


def _read(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _code_files(config: dict[str, Any]) -> set[str]:
    """Files of modelling code that a configuration names, without those of other repositories (`owner/name--file.Class`)."""
    entries = (config.get("auto_map") or {}).values()
    references = itertools.chain.from_iterable(entry if isinstance(entry, list) else [entry] for entry in entries)
    return {f"{text.partition('.')[0]}.py" for text in references if isinstance(text, str) and "--" not in text}


def publish_model_folder(folder: Path, target: HubTarget) -> str:
    """Uploads a finished or exported model to a target that is opened when the folder has been checked; an exported one without a card gets
    one. Returns the address of the commit.

    Raises:
        FileNotFoundError, ValueError: If the folder is not complete, or the repository holds a model that it would spoil; nothing is uploaded
            then.
        HubError: If the Hub cannot be reached or refuses.
    """
    config = folder / CONFIG_NAME
    if config.is_file() and not (folder / CARD).is_file() and is_exported(published_files(folder)[0]):
        write_card(folder, _read(config))
    check_model_folder(folder)
    names, _ = published_files(folder)
    opened = target.open()
    check_kind(names, opened.files(), opened.repo_id)
    return opened.upload(folder, "Upload model", REPLACED_BY_EXPORTED if is_exported(names) else REPLACED)
