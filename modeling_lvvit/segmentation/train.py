"""Trains LV-ViT for semantic segmentation, or evaluates a trained model.

lvvit segment                                 embedded data, a few minutes on two CPU cores
lvvit segment upernet_s --dataset_name path/to/ade20k
lvvit segment --dataset_name path/to/data --model_name_or_path CLASSIFIER --output_dir runs/a
lvvit segment --dataset_name path/to/data --model_name_or_path MODEL --evaluate_only --multi_scale --output_dir runs/b
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..cli.model_card import find_provenance
from ..cli.parser import COMMON_OPTIONS, EMBEDDED_RECIPE, LAUNCHER, TrainingProgram
from ..cli.training_program import TrainingRun, decodes_all, run_program, set_up, with_embedded_data
from ..data.images import PixelLimit
from ..deployment import prepare_for_cpu
from ..hub.folders import CARD_TEMPLATES
from .arguments import (
    SegmentationDataArguments,
    SegmentationModelArguments,
    SegmentationTrainingArguments,
    check_options,
)
from .build_model import (
    as_trained,
    build_processor,
    build_segmenter,
    is_segmenter,
    pretrained_config,
    pretrained_processor,
    set_class_weights,
    warn_of_other_inference,
)
from .data import OpenedSegmentationData, build_samples, check_samples, open_segmentation_data
from .dataset import ClassCounts, SegmentationDataset
from .inference import InferenceSettings
from .report import class_table, draw_predictions, headline, save_class_scores, write_segmentation_card
from .trainer import SegmentationTrainer


MODULE = "modeling_lvvit.segmentation.train"
PROGRAM = TrainingProgram(
    "lvvit segment",
    f"{__doc__}\n{LAUNCHER}",
    (SegmentationModelArguments, SegmentationDataArguments, SegmentationTrainingArguments),
    shown=(*COMMON_OPTIONS, "segmentation_head", "mask_column_name", "class_names", "evaluate_only", "multi_scale"),
    recipes=Path(__file__).parent / "recipes",
)
CARD_TEMPLATE = CARD_TEMPLATES / "segmentation.md"


@dataclass
class SegmentationRun(TrainingRun):
    """Training or evaluation of a segmentation model. `test` samples and `multi_scale` inference are `None` unless asked for.

    Args:
        counts: Pixels of the training masks, in the main process; `None` where they were not looked at.
        evaluations: Prefix of the metrics -> split in words, and metrics.
        class_scores: What was evaluated, in words -> scores of the classes.
    """

    model_args: SegmentationModelArguments
    data_args: SegmentationDataArguments
    opened: OpenedSegmentationData
    trainer: SegmentationTrainer
    test: SegmentationDataset | None
    multi_scale: InferenceSettings | None
    counts: ClassCounts | None = None
    evaluations: dict[str, tuple[str, dict[str, float]]] = field(default_factory=dict)
    class_scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    def describe(self) -> str:
        """What will be trained, or evaluated."""
        trainer, args, config = self.trainer, self.trainer.args, self.trainer.model.config
        text = (
            f"LV-ViT with {config.segmentation_head} head, {trainer.model.num_parameters():,} parameters, "
            f"{config.num_labels} classes"
        )
        if trainer.train_dataset is None:
            return f"{text}: evaluation on {len(trainer.eval_dataset):,} images ({self.opened.eval_name})"
        crop = " x ".join(map(str, config.image_height_width))
        text += f", {len(trainer.train_dataset):,} training images, crops of {crop}, {args.images_per_step} a step"
        if self.counts is not None and self.counts.ignored:
            text += f", {100 * self.counts.ignored_share:.2g} % of the mask pixels ignored"
        scaled = f" ({args.base_learning_rate:g} for 16 images, scaled)" if args.is_learning_rate_scaled else ""
        return f"{text}, peak learning rate {args.learning_rate:.3g}{scaled}"

    def evaluate(self) -> None:
        """Evaluates every split at a single scale, and at several if that was asked for."""
        trainer = self.trainer
        parts = [("eval", self.opened.eval_name, trainer.eval_dataset), ("test", self.data_args.test_split, self.test)]
        single = trainer.inference
        for prefix, split, samples in parts if self.test is not None else parts[:1]:
            if self.data_args.max_eval_samples is not None:
                split = f"{len(samples):,} images of {split}"
            for settings in filter(None, (single, self.multi_scale)):
                is_multi_scale = settings is self.multi_scale
                name, title = (f"{prefix}_multi_scale", f"{split}, multi-scale") if is_multi_scale else (prefix, split)
                trainer.inference = settings
                metrics = trainer.evaluate(samples, metric_key_prefix=name)
                trainer.save_metrics(name, metrics | self.facts(name, split, samples, settings))
                self.evaluations[name], self.class_scores[title] = (split, metrics), trainer.class_scores
                if trainer.is_world_process_zero():
                    number = "" if self.data_args.max_eval_samples is not None else f" ({len(samples):,} images)"
                    print(f"{title}{number}: {headline(metrics, name)}", flush=True)
        trainer.inference = single

    def facts(
        self, name: str, split: str, samples: SegmentationDataset, settings: InferenceSettings
    ) -> dict[str, Any]:
        """What the file of metrics called `name` says of their measurement."""
        inference = settings.record(self.opened.encoding) | {"precision": self.trainer.accelerator.mixed_precision}
        return {f"{name}_split": split, f"{name}_samples": len(samples), f"{name}_inference": inference}

    def draw(self, path: Path, num_images: int) -> None:
        """See `draw_predictions`."""
        draw_predictions(self.trainer, self.opened.class_names, path, num_images)

    def report(self) -> None:
        """Writes scores of the classes, figure and model card, and prints the table of the classes."""
        trainer, class_names = self.trainer, self.opened.class_names
        if not trainer.is_world_process_zero():
            return
        save_class_scores(Path(trainer.args.output_dir), class_names, self.class_scores)
        table = class_table(class_names, self.class_scores)
        print(table)
        figure = draw_predictions(trainer, class_names) if self.model_args.save_picture else None
        if trainer.train_dataset is not None:
            provenance = find_provenance(self.model_args, self.data_args.dataset_name, None, EMBEDDED_RECIPE)
            write_segmentation_card(CARD_TEMPLATE, trainer, provenance, self.evaluations, table, figure)


def prepare(
    model_args: SegmentationModelArguments,
    data_args: SegmentationDataArguments,
    training_args: SegmentationTrainingArguments,
) -> SegmentationRun:
    """Everything that can go wrong before training: output folder, data, model."""
    check_options(model_args, data_args, training_args)
    PixelLimit(data_args.max_image_pixels)
    set_up(model_args, training_args)
    with training_args.main_process_first(desc="opening the data"):
        args = with_embedded_data(data_args)
        config, processor = pretrained_config(model_args), pretrained_processor(model_args)
        if model_args.evaluate_only and is_segmenter(config):
            args = as_trained(args, config, processor, model_args.image_height_width)
        model_names = list(config.id2label.values()) if is_segmenter(config) else None
        opened = open_segmentation_data(args, training_args.seed, model_names, model_args.evaluate_only)
        model = build_segmenter(model_args, config, opened.class_names, opened.encoding.label_ignore_index)
        prepare_for_cpu(model, training_args.device, training_args.bf16)
    processor = build_processor(processor, args, opened.encoding.reduce_labels)
    samples = build_samples(args, opened, model.config.image_height_width, processor)
    single, multi_scale = args.inference(model.config.image_height_width)
    record = multi_scale.record(opened.encoding)
    if model_args.evaluate_only:
        warn_of_other_inference(model_args.model_name_or_path, config.segmentation_inference, record)
    model.config.segmentation_inference = record
    trainer = SegmentationTrainer(
        model, training_args, samples["training"], samples["evaluation"], single, processing_class=processor
    )
    counts = None
    if args.check_data:
        with training_args.main_process_first(desc="checking the data"):
            decode = partial(decodes_all, args.decode_data, training_args)
            counts = check_samples(samples, opened.class_names, decode) if training_args.should_save else None
    if trainer.train_dataset is not None:
        set_class_weights(model, args, counts)
    multi_scale = multi_scale if args.multi_scale else None
    return SegmentationRun(model_args, data_args, opened, trainer, samples["test"], multi_scale, counts)


def main(arguments: list[str]) -> None:
    run_program(PROGRAM, ["--module", MODULE], prepare, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
