"""Exported models as repositories of transformers.js: which folders are one, and their card."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..data.files.atomic_files import write_text
from .file_checks import CARD, EXPORTED_WEIGHTS, WEIGHTS, matches


CARD_TEMPLATE = Path(__file__).parents[1] / "card_templates" / "exported.md"
# what transformers.js calls the numbers of a file, by the end of its name
DTYPES = {"model": "fp32", "model_fp16": "fp16", "model_quantized": "q8"}
SEGMENTER = "segformer"  # `model_type` of exported segmentation models
MEGABYTE = 1e6


def is_exported(names: Collection[str]) -> bool:
    """Whether files of a folder or repository are an exported model: ONNX files in `onnx/`, and no weights of PyTorch."""
    return any(matches(name, EXPORTED_WEIGHTS) for name in names) and not any(matches(name, WEIGHTS) for name in names)


def check_kind(names: Collection[str], there: Collection[str], repo_id: str) -> None:
    """Raises a `ValueError` if files would take the place of a model of the other kind, PyTorch or exported: both need a `config.json` of
    their own.

    Args:
        names: Paths of what is to be uploaded.
        there: Paths of what the repository holds.
    """
    holds_model = any(matches(name, (*WEIGHTS, *EXPORTED_WEIGHTS)) for name in there)
    if holds_model and is_exported(names) != is_exported(there):
        kinds = ("a model of PyTorch", "an exported model")
        found, given = kinds[is_exported(there)], kinds[is_exported(names)]
        raise ValueError(
            f"{repo_id} holds {found}, and {given} needs another config.json. Publish it under another name."
        )


def write_card(folder: Path, config: dict[str, Any]) -> None:
    """Writes the card of an exported model: how to use it in JavaScript and Python, and its files.

    Args:
        folder: Of the exported model.
        config: Content of its `config.json`.
    """
    is_segmenter = config.get("model_type") == SEGMENTER
    tag = "image-segmentation" if is_segmenter else "image-classification"
    name = folder.resolve().name
    files = []
    for path in sorted((folder / "onnx").glob("model*.onnx")):
        size = sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))
        files.append((f"onnx/{path.name}", DTYPES.get(path.stem, path.stem), f"{size / MEGABYTE:,.1f}"))
    card = ModelCard.from_template(
        ModelCardData(library_name="transformers.js", pipeline_tag=tag, tags=["onnx", "vision"]),
        template_path=str(CARD_TEMPLATE),
        model_name=name,
        location=json.dumps(name),
        pipeline_tag=tag,
        is_segmenter=is_segmenter,
        is_multi_label=config.get("problem_type") == "multi_label_classification",
        num_classes=len(config.get("id2label", {})),
        has_script=(folder / "predict.py").is_file(),
        files=files,
        default=config.get("transformers.js_config", {}).get("dtype"),
    )
    write_text(folder / CARD, str(card))
