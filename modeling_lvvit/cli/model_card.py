"""The model card that a training run writes about itself."""

import itertools
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HTTPError
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer, make_markdown_table

from ..data.files.atomic_files import write_text
from ..data.image_dataset import ImageDataset
from ..data.sources import looks_local
from ..hub.file_checks import CARD
from ..hub.hub_trainer import HubTrainer
from ..per_class.scores import AVERAGES
from ..token_labeling import TokenLabelTrainer
from ..token_labeling.multi_label import METRICS
from .build_model import model_image_size
from .model_arguments import ModelSourceArguments


REPORTED_OPTIONS = (
    "cls_weight", "dense_weight", "cls_target", "patch_target", "mix_methods", "mix_probability", "ema_decay", "base_ema_decay"
)  # fmt: skip
OF_PATCHES = ("dense_weight", "cls_target", "patch_target")  # without effect on plain labels
OPTIONS_WHERE_GIVEN = (
    "class_weights",
    "train_sampling_strategy",
    "early_stopping_patience",
    "early_stopping_threshold",
)
SHARED_OPTIONS = ("images_per_step", "weight_decay", "lr_schedule", "batch_norm", "max_grad_norm", "bf16", "fp16")
METRIC_TYPES = {"macro_precision": "precision", "macro_f1": "f1"}  # as the Hub calls them; others are accuracies
MAX_TABLE_ROWS = 30
NOT_SCORES = ("runtime", "per_second", "_classes")  # endings of logged figures


@dataclass(frozen=True)
class Provenance:
    """Where data and model of a run come from, for its card.

    Args:
        data: What the data is called: Hub name, or the last part of a local path.
        datasets: Hub names of images and label sets; local ones are not named.
        start: The model that it started from: Hub name, or the last part of a path; `None` if its weights were random.
        base_model: The same if it is on the Hub, else `None`.
        license: Fields of a card: `license`, as a name of the Hub, and `license_name` and `license_link` if that is `other`; empty if
            the license of the weights is unknown, or they are the user's own, who has named none.
    """

    data: str
    datasets: tuple[str, ...]
    start: str | None
    base_model: str | None
    license: dict[str, str]


def find_provenance(args: ModelSourceArguments, data: str | None, label_set: str | None, embedded: str) -> Provenance:
    """Where a run comes from, by the options that name model, images and label set; `embedded` data is no dataset of the Hub."""
    start = args.model_name_or_path
    hub_names = [name for name in (data, label_set) if name not in (None, embedded) and not _is_local(name)]
    license_fields = find_license(start, args.model_revision) if start is not None else {}
    return Provenance(
        _in_words(data or embedded),
        tuple(hub_names),
        None if start is None else _in_words(start),
        None if start is None or _is_local(start) else start,
        license_fields if args.license is None else {"license": args.license},
    )


def _is_local(name: str) -> bool:
    return looks_local(name) or Path(name).expanduser().exists()


def _in_words(name: str) -> str:
    return Path(name).expanduser().absolute().name if _is_local(name) else name


def find_license(model: str, revision: str | None = None) -> dict[str, str]:
    """What the card of a model, in a folder or on the Hub, says of its license; nothing if it has none or cannot be reached."""
    try:
        is_local = _is_local(model)
        card = Path(model).expanduser() / CARD if is_local else hf_hub_download(model, CARD, revision=revision)
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HTTPError):
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name) is not None}


def run_metadata(
    name: str, task: str, provenance: Provenance, metrics: list[str], tags: list[str], results: list[EvalResult]
) -> ModelCardData:
    """Metadata of a run's card: what the model is, what it was made of and what it reached on which data."""
    return ModelCardData(
        library_name="transformers",
        **provenance.license,
        pipeline_tag=task,
        tags=[*tags, "vision"],
        datasets=list(provenance.datasets) or None,
        base_model=provenance.base_model,
        metrics=metrics,
        model_name=name,
        eval_results=results or None,
    )


def run_name(trainer: HubTrainer) -> str:
    """What a run is called: as its repository if it has one, else as its folder."""
    name = trainer.hub_model_id or trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name
    return name.rpartition("/")[2]


def model_location(trainer: HubTrainer) -> str:
    """Where the example of a card loads the model from: its repository if it is published, else its folder; a literal of Python."""
    args = trainer.args
    repository = trainer.hub_model_id or args.hub_model_id
    return json.dumps(repository if args.push_to_hub and repository else str(args.output_dir), ensure_ascii=False)


def training_facts(trainer: Trainer, options: Sequence[str] = ()) -> dict[str, Any]:
    """What the cards of all programs say of the training: options, also those of the program, table, images that other readers read in
    another way, machine, time and versions."""
    args, history, best = trainer.args, trainer.state.log_history, trainer.state.best_model_checkpoint
    hyperparameters = extract_hyperparameters_from_trainer(trainer)
    given = [
        name
        for name in OPTIONS_WHERE_GIVEN
        if name in type(args).__dataclass_fields__
        and getattr(args, name) != type(args).__dataclass_fields__[name].default
    ]
    if args.lr_schedule == "published":  # it does not follow this option
        del hyperparameters["lr_scheduler_type"]
    seconds = next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)
    return {
        "hyperparameters": hyperparameters
        | {option: getattr(args, option) for option in (*SHARED_OPTIONS, *options, *given)},
        "training_table": training_table(history),
        "other_readers": trainer.train_dataset.differences()
        if isinstance(trainer.train_dataset, ImageDataset)
        else [],
        "hardware": describe_hardware(trainer),
        "duration": None if seconds is None else duration_in_words(seconds),
        "is_continued": args.resume_from_checkpoint is not None,
        "steps": trainer.state.global_step,
        "best": Path(best).name if args.load_best_model_at_end and best else None,
        "stopped_early": trainer.early_stopping is not None and trainer.early_stopping.has_stopped,
        "versions": library_versions(),
    }


def training_table(history: Sequence[dict[str, float]]) -> str:
    """A Markdown table of the evaluations in training and the loss before them, or of the loss alone; at most 30 rows, evenly spread."""
    evaluations: dict[int, dict[str, Any]] = {}  # step -> row
    losses: list[dict[str, Any]] = []
    for entry in itertools.takewhile(lambda entry: "train_runtime" not in entry, history):
        place = {"Epoch": entry.get("epoch"), "Step": entry.get("step")}
        if "loss" in entry:
            losses.append(place | {"Training loss": entry["loss"]})
        scores = {
            key.replace("_", " ").replace("eval", "evaluation").capitalize(): value
            for key, value in entry.items()
            if key.startswith("eval_") and not key.endswith(NOT_SCORES)
        }
        if scores:  # an evaluation may have several entries
            loss = losses[-1]["Training loss"] if losses else ""
            evaluations.setdefault(place["Step"], place | {"Training loss": loss}).update(scores)
    rows = list(evaluations.values()) or losses
    step = -(-len(rows) // MAX_TABLE_ROWS) or 1
    shown = rows[::-step][::-1]  # with the last one
    columns = dict.fromkeys(column for row in shown for column in row)
    return make_markdown_table([{column: row.get(column, "") for column in columns} for row in shown])


def describe_hardware(trainer: Trainer) -> str:
    """Number and name of the devices of a run."""
    number, device = trainer.args.world_size, trainer.args.device
    if device.type == "cpu":
        return f"a CPU (processes: {number}, threads of each: {torch.get_num_threads()})"
    return f"{number} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"


def duration_in_words(seconds: float) -> str:
    """Hours, minutes or seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def library_versions() -> str:
    """Versions of what a run was made with, in words."""
    return f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"


def model_facts(trainer: TokenLabelTrainer) -> dict[str, Any]:
    """What the card says of the architecture."""
    config = trainer.model.config
    facts = {"num_classes": config.num_labels, "num_parameters": f"{trainer.model.num_parameters():,}"}
    if hasattr(trainer.model, "feature_hook"):
        hook = trainer.model.feature_hook
        architecture = getattr(config, "architecture", config.model_type)
        shape = "{} x {} cells".format(*trainer.grid_size)
        facts["must_interpolate"] = bool(hook.forward_options)
    else:
        architecture, shape = "LV-ViT", f"patches of {config.patch_size} x {config.patch_size}"
        shape += f"; {config.num_hidden_layers} layers, {config.hidden_size} wide, {config.num_attention_heads} heads"
        facts["patch_logits_weight"] = config.patch_logits_weight
    height, width = model_image_size(trainer.model)
    facts |= {"kind": architecture, "is_lvvit": architecture == "LV-ViT", "shape": shape}
    return facts | {"image_height": height, "image_width": width}


def reported_options(trainer: TokenLabelTrainer) -> list[str]:
    """Options of the method that had an effect on a run."""
    without = set() if trainer.trains_patches else set(OF_PATCHES)
    if not trainer.args.mix_probability:
        without.add("mix_methods")
    return [name for name in REPORTED_OPTIONS if name not in without]


def write_model_card(
    template: Path,
    trainer: TokenLabelTrainer,
    provenance: Provenance,
    eval_name: str,
    metrics: dict[str, float],
    figure: str | None,
    class_table: str | None = None,
    localization: tuple[int, Sequence[tuple[str, str, str]]] | None = None,
) -> None:
    """Fills the template from the finished run and saves it as README.md in the output folder.

    Args:
        eval_name: What the evaluation rows are called.
        metrics: Result of `trainer.evaluate()`.
        figure: File name of the figure of predictions in the output folder, `None` if there is none.
        class_table: Markdown table of scores of each class, `None` for none.
        localization: How well the labelled class was found: number of images with masks, and name, pointing accuracy and overlap of each
            map; `None` if that was not measured.
    """
    args = trainer.args
    name = run_name(trainer)
    facts = model_facts(trainer)
    scores = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    accuracies = {
        key: value for key, value in scores.items() if key.endswith("accuracy") or key in AVERAGES or key in METRICS
    }
    results = [
        EvalResult(
            "image-classification", provenance.data, provenance.data, key if key in METRICS else METRIC_TYPES.get(key, "accuracy"), round(value, 4), metric_name=key, dataset_split=eval_name
        )
        for key, value in accuracies.items()
        if math.isfinite(value)
    ]  # fmt: skip
    tags = [*(["lvvit"] if facts["is_lvvit"] else []), "token-labeling"]
    card = ModelCard.from_template(
        run_metadata(
            name,
            "image-classification",
            provenance,
            [*METRICS] if trainer.is_multi_label else ["accuracy"],
            tags,
            results,
        ),
        template_path=str(template),
        model_name=name,
        location=model_location(trainer),
        provenance=provenance,
        token_labels=trainer.trains_patches,
        is_multi_label=trainer.is_multi_label,
        is_labeler=args.patch_target == "image",
        annotator=trainer.annotator.annotator.provenance["annotator"] if trainer.annotator is not None else None,
        has_average=trainer.ema is not None,
        saves_patch_head=getattr(trainer.model, "saves_patch_head", True),
        image=figure,
        class_table=class_table,
        localization=localization,
        eval_split=eval_name,
        metrics={key: f"{100 * value:.2f} %" for key, value in accuracies.items()},
        num_train=len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "streamed",
        num_eval=len(trainer.eval_dataset),
        **training_facts(trainer, reported_options(trainer)),
        **facts,
    )
    write_text(Path(args.output_dir) / CARD, str(card))
