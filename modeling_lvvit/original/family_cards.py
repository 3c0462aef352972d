"""Model cards of the published family, and of checkpoints of the authors' code that were converted.

    python -m modeling_lvvit.family_cards [FOLDER]

writes the card of every published row to a folder, `model_cards` unless another is named. Accuracies are those that the authors published, and say so; parameters
and multiply-adds were counted here.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_lvvit import LVViTConfig
from ..data.files.atomic_files import write_text
from ..hub.folders import CARD_TEMPLATES
from ..variants import RELEASES, SEGMENTERS, VARIANTS, LVViTSegmenter, LVViTVariant


TEMPLATE = CARD_TEMPLATES / "family.md"
# where a figure was published: in words, address
PAPER = ("All Tokens Matter (NeurIPS 2021), as published", "https://arxiv.org/abs/2104.10858")
REPOSITORY = ("the authors' repository, as published", "https://github.com/zihangJiang/TokenLabeling")
ONLY_IN_REPOSITORY = {("lvvit_m_448", "top-1 accuracy"), ("upernet_m", "mean IoU"), ("upernet_l", "mean IoU")}
IMAGENET, ADE20K = ("ILSVRC/imagenet-1k", "ImageNet"), ("zhoubolei/scene_parse_150", "ADE20K")  # Hub name, in words
REAL, SINGLE_SCALE = "ReaL top-1 accuracy", "mean IoU"
PUBLISHED, COUNTED = "published", "counted here"
NOTES = {
    "lvvit_m_224": "The paper says 84.1, the name of the authors' file 84.0; the published 16.0 billion multiply-adds do not follow from the model.",
    "lvvit_m_448": "The accuracy at 448 pixels is that of the authors' repository; the paper has none.",
    "lvvit_l_448": "Trained at 448 pixels from the start. Fine-tuned from 288 pixels the paper reports 85.9 (ReaL 89.7), a model that was not released.",
    "upernet_m": "The single-scale figure is that of the authors' repository; the paper has none.",
    "upernet_l": "The single-scale figure is that of the authors' repository; the paper has none. The published run divided no residual branch, and so do "
    "its converted weights (`residual_divisor` 1).",
}  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """How weights came from a file of the authors' code.

    Args:
        file: Its name.
        difference: Largest difference of the logits, see `convert_checkpoint`.
    """

    file: str
    sha256: str
    difference: float


def is_released(name: str | None, checkpoint: str) -> bool:
    """Whether a file has the name under which the authors released the weights of a row."""
    row = VARIANTS.get(name) or SEGMENTERS.get(name)
    return row is not None and row.checkpoint is not None and row.checkpoint.rpartition("/")[2] == checkpoint


def family_card(name: str, conversion: Conversion | None = None) -> ModelCard:
    """The card of a row of `VARIANTS` or `SEGMENTERS`, perhaps with the file of the authors from which the weights next to it come. Its
    example loads the folder that the conversion command of the card writes.

    Raises:
        ValueError: If there is no such row.
        FileNotFoundError: If the template is missing.
    """
    if name not in {**VARIANTS, **SEGMENTERS}:
        raise ValueError(f"Unknown row {name!r}; expected one of {', '.join((*VARIANTS, *SEGMENTERS))}.")
    row = SEGMENTERS.get(name)
    facts = _classifier(name, VARIANTS[name]) if row is None else _segmenter(name, row)
    return _fill(facts, name, conversion)


def converted_card(config: LVViTConfig, name: str, is_segmenter: bool, conversion: Conversion) -> ModelCard:
    """The card of a converted checkpoint of which no one said that it is a published one: it claims nothing of its training."""
    facts = {
        "title": f"LV-ViT with {config.num_hidden_layers} layers, {config.hidden_size} wide",
        "is_segmenter": is_segmenter,
        "is_published": False,
        "num_classes": config.num_labels,
        "side": max(config.image_height_width),
        "figures": [("classes", f"{config.num_labels:,}", COUNTED)],
        "results": [],
        "data": None,
    }
    return _fill(facts, name, conversion)


def _classifier(name: str, variant: LVViTVariant) -> dict[str, Any]:
    architecture, side = variant.architecture, variant.image_size
    figures = [
        ("ImageNet top-1", variant.published_top1, " %", PUBLISHED),
        ("ImageNet ReaL top-1", variant.published_real_top1, " %", PUBLISHED),
        ("parameters", f"{variant.num_parameters:,}", "", COUNTED),
        ("multiply-adds an image", variant.counted_gmacs, " billion", COUNTED),
        ("multiply-adds an image", variant.published_gmacs, " billion", PUBLISHED),
    ]
    recipe = name if name != "lvvit_m_448" else "lvvit_m_384 --image_size 448 --output_dir runs/lvvit_m_448"
    accuracies = {"top-1 accuracy": variant.published_top1, REAL: variant.published_real_top1}
    return {
        "title": f"LV-ViT-{name.split('_')[1].upper()} at {side} pixels",
        "is_segmenter": False,
        "is_published": True,
        "num_classes": 1000,
        "side": side,
        "layers": architecture["num_hidden_layers"],
        "width": architecture["hidden_size"],
        "heads": architecture["num_attention_heads"],
        "figures": [(title, f"{value}{unit}", source) for title, value, unit, source in figures if value is not None],
        "gmacs": variant.counted_gmacs,
        "checkpoint": variant.checkpoint,
        "recipe": f"lvvit train {recipe}",
        "data": IMAGENET,
        "results": [
            _published(name, "image-classification", IMAGENET, "accuracy", title, value)
            for title, value in accuracies.items()
            if value is not None
        ],
    }


def _segmenter(name: str, row: LVViTSegmenter) -> dict[str, Any]:
    size = f"LV-ViT-{name[-1].upper()}"
    scores = {
        SINGLE_SCALE: row.published_miou,
        "mean IoU, several scales": row.published_multi_scale_miou,
        "pixel accuracy, several scales": row.published_multi_scale_accuracy,
    }
    return {
        "title": f"{size} with UperNet for ADE20K",
        "size": size,
        "is_segmenter": True,
        "is_published": True,
        "num_classes": 150,
        "figures": [
            *((f"ADE20K validation, {title}", f"{value} %", PUBLISHED) for title, value in scores.items()),
            ("parameters", f"{row.published_millions} million", PUBLISHED),
            ("parameters, with the auxiliary head of training", f"{row.num_parameters:,}", COUNTED),
        ],
        "checkpoint": row.checkpoint,
        "recipe": f"lvvit segment {name}",
        "data": ADE20K,
        "results": [
            _published(name, "image-segmentation", ADE20K, "mean_iou" if "IoU" in title else "accuracy", title, value)
            for title, value in scores.items()
        ],
    }


def _published(name: str, task: str, data: tuple[str, str], metric: str, title: str, percent: float) -> EvalResult:
    source = REPOSITORY if (name, title) in ONLY_IN_REPOSITORY else PAPER
    # the figures of one configuration share a source
    config = "real" if title == REAL else "single scale" if title == SINGLE_SCALE else None
    return EvalResult(
        task, data[0], data[1], metric, round(percent / 100, 4), metric_name=title, dataset_split="validation",
        dataset_config=config, source_name=source[0], source_url=source[1],
    )  # fmt: skip


def _fill(facts: dict[str, Any], name: str, conversion: Conversion | None) -> ModelCard:
    task = "image-segmentation" if facts["is_segmenter"] else "image-classification"
    results, data = facts.pop("results"), facts.pop("data")
    metadata = ModelCardData(
        library_name="transformers",
        license="apache-2.0" if facts["is_published"] else None,
        pipeline_tag=task,
        tags=["lvvit", *(["token-labeling"] if facts["is_published"] else []), "vision"],
        datasets=[data[0]] if data else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=facts["title"] if results else None,
        eval_results=results or None,
    )
    checkpoint = facts.pop("checkpoint", None)
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        notes=[NOTES[name]] if name in NOTES else [],
        checkpoint=checkpoint and f"{RELEASES}/{checkpoint}",
        conversion=conversion and {**vars(conversion), "difference": f"{conversion.difference:.1e}"},
        **facts,
    )


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0] if arguments else "model_cards")
    for name in (*VARIANTS, *SEGMENTERS):
        write_text(folder / f"{name}.md", f"{family_card(name)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
