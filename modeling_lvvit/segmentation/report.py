"""What a segmentation run writes about itself: the table of classes, the figure of predictions and the model card."""

import math
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..cli.model_card import Provenance, model_location, run_metadata, run_name, training_facts
from ..data.files.atomic_files import write_json, write_text
from ..hub.file_checks import CARD
from ..visualization import panel_step, save_segmentation_figure
from .arguments import SCORES
from .trainer import SegmentationTrainer


FIGURE, CLASS_SCORES = "predictions.png", "class_scores.json"
NUM_IMAGES = 6


def class_table(class_names: list[str], scores: Mapping[str, Mapping[str, list[float]]]) -> str:
    """A Markdown table with the intersection over union and the accuracy of every class in percent. `scores`: what was evaluated ->
    `iou` and `accuracy` of the classes in [0, 1], `nan` where there is nothing to measure."""
    columns = {
        f"{title} {heading}": by_score[name]
        for title, by_score in scores.items()
        for name, heading in (("iou", "IoU"), ("accuracy", "accuracy"))
    }
    lines = ["| class | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for index, class_name in enumerate(class_names):
        values = [_percent(column[index]) for column in columns.values()]
        lines.append(f"| {class_name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def save_class_scores(
    output_dir: Path, class_names: list[str], scores: Mapping[str, Mapping[str, list[float]]]
) -> None:
    """Writes `class_scores.json`: what was evaluated -> class -> `iou` and `accuracy` in [0, 1], null where there are none."""
    record = {
        title: {
            class_name: {
                name: None if math.isnan(values[index]) else values[index] for name, values in by_score.items()
            }
            for index, class_name in enumerate(class_names)
        }
        for title, by_score in scores.items()
    }
    write_json(output_dir / CLASS_SCORES, record)


def draw_predictions(
    trainer: SegmentationTrainer, class_names: list[str], path: Path | None = None, num_images: int = NUM_IMAGES
) -> str:
    """Writes a figure of some evaluation rows, evenly spread, to `path` (default: `predictions.png` in the output folder), and returns
    its name."""
    path = path or Path(trainer.args.output_dir) / FIGURE
    samples, model = trainer.eval_dataset, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model.eval()
    count = min(num_images, len(samples))
    images, masks, predictions = [], [], []
    for row in (index * len(samples) // count for index in range(count)):
        sample = samples[row]
        predicted = (
            trainer.predict_images(model, sample["pixel_values"][None], sample["normalization"])[0].cpu().numpy()
        )
        step = panel_step(predicted.shape)  # so that large images are not kept
        images.append(samples.read_image(row).reduce(step))
        masks.append(samples.mask(row)[::step, ::step].copy())
        predictions.append(predicted[::step, ::step].copy())
    save_segmentation_figure(path, images, masks, predictions, class_names, samples.encoding.label_ignore_index)
    return path.name


def headline(metrics: Mapping[str, float], prefix: str) -> str:
    """The scores of an evaluation in words; where classes were nowhere, of how many the mean IoU is, which of one is none."""
    iou, pixel, mean = (100 * metrics[f"{prefix}_{name}"] for name in SCORES)
    over = _over(metrics, prefix)
    if metrics[f"{prefix}_measured_classes"] < 2:
        return f"no mean IoU{over}, pixel accuracy {pixel:.2f} %"
    return f"mean IoU{over} {iou:.2f} %, pixel accuracy {pixel:.2f} %, mean accuracy {mean:.2f} %"


def _over(metrics: Mapping[str, float], prefix: str) -> str:
    """Of how many classes a mean IoU is, empty where of all."""
    measured, number = (metrics[f"{prefix}_{name}"] for name in ("measured_classes", "num_classes"))
    return f" over {measured} of {number} classes" if measured < number else ""


def write_segmentation_card(
    template: Path,
    trainer: SegmentationTrainer,
    provenance: Provenance,
    evaluations: Mapping[str, tuple[str, dict[str, float]]],
    table: str,
    figure: str | None,
) -> None:
    """Fills the template from the finished run and saves it as README.md in the output folder.

    Args:
        template: Card with the variables that this function fills.
        evaluations: Prefix of the metrics -> split in words, and the metrics.
        table: See `class_table`.
        figure: File name of the figure of predictions, `None` if there is none.
    """
    name = run_name(trainer)
    results = [
        EvalResult(
            "image-segmentation", provenance.data, provenance.data, "mean_iou" if score == "mean_iou" else "accuracy",
            round(metrics[f"{prefix}_{score}"], 4), dataset_split=split,
            metric_name=f"{_inference_name(prefix)} {score}{_over(metrics, prefix) if score == 'mean_iou' else ''}".strip(),
        )
        for prefix, (split, metrics) in evaluations.items()
        for score in SCORES
        if metrics[f"{prefix}_measured_classes"] > 1 or score == "pixel_accuracy"
    ]  # fmt: skip
    tags = ["lvvit", "semantic-segmentation"]
    card = ModelCard.from_template(
        run_metadata(name, "image-segmentation", provenance, ["mean_iou", "accuracy"], tags, results),
        template_path=str(template),
        model_name=name,
        location=model_location(trainer),
        provenance=provenance,
        evaluations=[
            (split, _inference_name(prefix) or "single scale", headline(metrics, prefix))
            for prefix, (split, metrics) in evaluations.items()
        ],
        class_table=table,
        image=figure,
        num_train=len(trainer.train_dataset),
        inference=_describe_inference(trainer, any(map(_inference_name, evaluations))),
        config=trainer.model.config,
        num_parameters=trainer.model.num_parameters(),
        **training_facts(trainer),
    )
    write_text(Path(trainer.args.output_dir) / CARD, str(card))


def _inference_name(prefix: str) -> str:
    return "multi-scale" if prefix.endswith("multi_scale") else ""


def _describe_inference(trainer: SegmentationTrainer, is_multi_scale: bool) -> str:
    settings = trainer.inference
    window, stride = (" x ".join(map(str, pair)) for pair in (settings.window, settings.stride))
    size = (
        "in their own size" if settings.short_side is None else f"with a shorter side of {settings.short_side} pixels"
    )
    masks = f"mask values {trainer.eval_dataset.encoding.describe()}"
    saved = trainer.model.config.segmentation_inference
    several = f"; multi-scale: sizes {' '.join(map(str, saved['scales']))}{', mirror images' if saved['flip'] else ''}"
    return f"images {size}, windows of {window} pixels every {stride}{several if is_multi_scale else ''}; {masks}"
