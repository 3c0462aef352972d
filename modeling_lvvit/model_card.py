"""The model card that a training run writes about itself."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .building import picture_size_of
from .token_labeling import TokenLabelTrainer


REPORTED_OPTIONS = (
    "learning_rate", "num_train_epochs", "images_per_step", "weight_decay", "label_smoothing_factor", "seed",
    "lr_schedule", "cls_weight", "dense_weight", "cls_target", "patch_target", "mix_methods", "mix_probability", "ema_decay",
    "base_ema_decay", "batch_norm", "max_grad_norm", "bf16", "fp16",
)  # fmt: skip


def accuracies_of(metrics: dict[str, float]) -> dict[str, float]:
    """The accuracies among the evaluation metrics, in [0, 1], without the library's prefix."""
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if key.endswith("accuracy")}


def card_data(
    name: str, dataset_name: str, eval_name: str, metrics: dict[str, float], tags: list[str], is_own: bool
) -> ModelCardData:
    """Metadata of the card: what the model is, and what it reached on which data."""
    results = [
        EvalResult("image-classification", dataset_name, dataset_name, key, round(value, 4), dataset_split=eval_name)
        for key, value in accuracies_of(metrics).items()
    ]
    return ModelCardData(
        library_name="transformers",
        license="apache-2.0" if is_own else None,  # that of the model it started from is not known
        pipeline_tag="image-classification",
        tags=[*tags, "token-labeling", "vision"],
        metrics=["accuracy"],
        model_name=name,
        eval_results=results or None,
    )


def library_versions() -> str:
    """Versions of what a run was made with, in words."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"


def model_facts(trainer: TokenLabelTrainer) -> dict[str, Any]:
    """What the card says of the architecture."""
    config = trainer.model.config
    facts = {"num_classes": config.num_labels, "num_parameters": f"{trainer.model.num_parameters():,}"}
    if hasattr(trainer.model, "feature_tap"):
        tap = trainer.model.feature_tap
        kind = getattr(config, "architecture", config.model_type)
        shape = f"{tap.grid_size[0]} x {tap.grid_size[1]} cells"
        facts["must_interpolate"] = bool(tap.forward_options)
    else:
        kind, shape = "LV-ViT", f"patches of {config.patch_size} x {config.patch_size}"
        shape += f"; {config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads"
        facts["patch_logits_weight"] = config.patch_logits_weight
    height, width = picture_size_of(trainer.model)
    return facts | {
        "kind": kind,
        "is_lvvit": kind == "LV-ViT",
        "image_height": height,
        "image_width": width,
        "shape": shape,
    }


def write_model_card(
    template: Path,
    trainer: TokenLabelTrainer,
    dataset_name: str,
    eval_name: str,
    metrics: dict[str, float],
    picture: str | None,
    is_own: bool = True,
) -> None:
    """Fills the template from the finished run and saves it as README.md in the output folder.

    Args:
        template: Card with the variables that this module fills.
        trainer: After training and evaluation.
        dataset_name: Hub name, or the last part of a local path.
        eval_name: What the evaluation rows are called.
        metrics: Result of `trainer.evaluate()`.
        picture: File name of the picture of predictions in the output folder, `None` if there is none.
        is_own: Whether the weights were random before; else their licence is not stated.
    """
    args = trainer.args
    name = Path(args.output_dir).resolve().name
    facts = model_facts(trainer)
    card = ModelCard.from_template(
        card_data(name, dataset_name, eval_name, metrics, ["lvvit"] if facts["is_lvvit"] else [], is_own),
        template_path=str(template),
        model_name=name,
        model_id=args.hub_model_id or name,
        token_labels=trainer.trains_patches,
        is_labeler=args.patch_target == "image",
        annotator=trainer.annotator.annotator.provenance["annotator"] if trainer.annotator is not None else None,
        picture=picture,
        eval_split=eval_name,
        metrics={key: f"{100 * value:.2f} %" for key, value in accuracies_of(metrics).items()},
        dataset_name=dataset_name,
        num_train=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "streamed",
        num_eval=len(trainer.eval_dataset),
        hyperparameters={option: getattr(args, option) for option in REPORTED_OPTIONS},
        versions=library_versions(),
        **facts,
    )
    card.save(Path(args.output_dir) / "README.md")
