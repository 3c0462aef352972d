"""Trains LV-ViT for semantic segmentation, or evaluates a trained model.

accelerate launch -m modeling_lvvit.segmentation.train                     embedded data, a few minutes on two CPU cores
accelerate launch -m modeling_lvvit.segmentation.train upernet_s --dataset_name path/to/ade20k
accelerate launch -m modeling_lvvit.segmentation.train --dataset_name path/to/data --model_name_or_path CLASSIFIER --output_dir runs/a
accelerate launch -m modeling_lvvit.segmentation.train --dataset_name path/to/data --model_name_or_path MODEL --evaluate_only true \\
    --multi_scale true --output_dir runs/b
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed
from transformers.utils import logging

from ..cli import digit_scenes
from ..cli.model_card import find_provenance
from ..cli.parser import Program, parse
from ..data.images import SampleError
from ..deployment import prepare_for_cpu
from ..hub.folders import CARD_TEMPLATES
from ..hub.hub_trainer import push_finished_run
from ..launching import end_together, end_with_launcher, is_main_process, set_up_cpu, start_missing_processes
from ..modeling_lvvit import LVViTForSemanticSegmentation
from ..training.callbacks import end_after_signal
from ..training.checkpoints import discard_overwritten_checkpoints, prepare_output_dir
from .arguments import (
    BALANCED,
    SegmentationDataArguments,
    SegmentationModelArguments,
    SegmentationTrainingArguments,
)
from .build_model import (
    as_trained,
    build_processor,
    build_segmenter,
    is_segmenter,
    pretrained_config,
    pretrained_processor,
)
from .data import OpenedSegmentationData, open_segmentation_data
from .dataset import ClassCounts, SegmentationDataset
from .inference import InferenceSettings
from .report import class_table, draw_predictions, headline, save_class_scores, write_segmentation_card
from .trainer import SegmentationTrainer
from .transforms import SegmentationEvalTransform, SegmentationTrainTransform


logger = logging.get_logger(__name__)
MODULE = "modeling_lvvit.segmentation.train"
EMBEDDED_RECIPE = "digit_scenes"
PROGRAM = Program(
    MODULE,
    f"accelerate launch -m {MODULE}",
    (SegmentationModelArguments, SegmentationDataArguments, SegmentationTrainingArguments),
    Path(__file__).parent / "recipes",
    EMBEDDED_RECIPE,
)
CARD_TEMPLATE = CARD_TEMPLATES / "segmentation_template.md"


@dataclass
class Run:
    """A run that is ready to start.

    Args:
        trainer: With model and data.
        opened: The data.
        test: Samples that are evaluated once, at the end; `None` without such.
        multi_scale: Inference at several scales; `None` if that was not asked for.
    """

    trainer: SegmentationTrainer
    opened: OpenedSegmentationData
    test: SegmentationDataset | None
    multi_scale: InferenceSettings | None


def build_samples(
    args: SegmentationDataArguments, opened: OpenedSegmentationData, crop_size: tuple[int, int], processor
) -> dict[str, SegmentationDataset | None]:
    """Training samples, jointly augmented, and whole images of the other splits."""
    statistics = (processor.image_mean, processor.image_std)
    train_transform = SegmentationTrainTransform(
        crop_size, *statistics, opened.coding.label_ignore_index, args.augmentation(), args.short_side, args.long_side
    )
    whole = SegmentationEvalTransform(*statistics)
    parts = {
        "training": (opened.train, train_transform),
        "evaluation": (opened.evaluation, whole),
        "test": (opened.test, whole),
    }
    return {
        name: None
        if rows is None
        else SegmentationDataset(rows, transform, opened.coding, args.image_column, opened.mask_column, name)
        for name, (rows, transform) in parts.items()
    }


def check_samples(samples: dict[str, SegmentationDataset | None], class_names: list[str]) -> ClassCounts | None:
    """Looks at all rows; returns the pixels of the training classes, and warns of classes that cannot be learned."""
    counts = {name: part.check_rows() for name, part in samples.items() if part is not None}
    training = counts.get("training")
    if training is not None and not training.pixels.all():
        absent = [name for name, pixels in zip(class_names, training.pixels) if not pixels]
        listed = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        logger.warning("No training mask has %s: the model cannot learn what is nowhere.", listed)
    return training


def check_options(
    model_args: SegmentationModelArguments,
    data_args: SegmentationDataArguments,
    training_args: SegmentationTrainingArguments,
) -> None:
    """Raises an error if options do not fit each other; the first thing that happens."""
    if not CARD_TEMPLATE.is_file():
        raise FileNotFoundError(
            f"There is no {CARD_TEMPLATE}: install the project from its folder (pip install -e .)."
        )
    if data_args.class_weights == [BALANCED] and not data_args.check_data:
        raise ValueError(f"--class_weights {BALANCED} counts pixels in the check of the data: leave --check_data on.")
    if model_args.evaluate_only and training_args.push_to_hub:
        raise ValueError("--evaluate_only makes nothing to publish: leave out --push_to_hub.")
    if model_args.evaluate_only and training_args.resume_from_checkpoint is not None:
        raise ValueError(
            "--evaluate_only trains nothing: leave out --resume_from_checkpoint and name the checkpoint as --model_name_or_path."
        )


def set_class_weights(
    model: LVViTForSemanticSegmentation, args: SegmentationDataArguments, counts: ClassCounts | None
) -> None:
    """Gives the loss the weights that were asked for, the same in all processes.

    Args:
        model: Changed in place.
        args: What was asked for.
        counts: Result of `check_samples` in the main process, elsewhere `None`.
    """
    weights = args.given_class_weights()
    if args.class_weights == [BALANCED]:
        weights = broadcast_object_list([counts and counts.median_frequency_weights()])[0]
    model.config.semantic_loss_class_weights = weights


def prepare(
    model_args: SegmentationModelArguments,
    data_args: SegmentationDataArguments,
    training_args: SegmentationTrainingArguments,
) -> Run:
    """Everything that can go wrong before training: output folder, data, model."""
    check_options(model_args, data_args, training_args)
    prepare_output_dir(training_args, model_args.model_name_or_path, model_args.overwrite_output_dir)
    set_up_cpu(training_args.device)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="opening the data"):
        if data_args.dataset_name in (None, EMBEDDED_RECIPE):
            data_args = dataclasses.replace(data_args, dataset_name=str(digit_scenes.build_or_reuse()))
        config, own_processor = pretrained_config(model_args), pretrained_processor(model_args)
        if model_args.evaluate_only and is_segmenter(config) and own_processor is not None:
            data_args = as_trained(data_args, own_processor)
        known_names = list(config.id2label.values()) if is_segmenter(config) else None
        opened = open_segmentation_data(data_args, training_args.seed, known_names, model_args.evaluate_only)
        weights = data_args.given_class_weights()
        if weights is not None and len(weights) != len(opened.class_names):
            raise ValueError(
                f"`class_weights` has {len(weights)} numbers; the data has {len(opened.class_names)} classes."
            )
        model = build_segmenter(model_args, config, opened.class_names, opened.coding.label_ignore_index)
        prepare_for_cpu(model, training_args.device, training_args.bf16)
    processor = build_processor(own_processor, data_args, opened.coding.reduce_labels)
    samples = build_samples(data_args, opened, model.config.image_height_width, processor)
    single, multi = data_args.inference(model.config.image_height_width)
    trainer = SegmentationTrainer(
        model, training_args, samples["training"], samples["evaluation"], single, processing_class=processor
    )
    counts = None
    if data_args.check_data:
        with training_args.main_process_first(desc="checking the data"):
            counts = check_samples(samples, opened.class_names) if training_args.should_save else None
    if samples["training"] is not None:
        set_class_weights(model, data_args, counts)
    return Run(trainer, opened, samples["test"], multi)


def log_run_summary(run: Run) -> None:
    """Says in one line what will be trained, or evaluated."""
    trainer, opened = run.trainer, run.opened
    config = trainer.model.config
    about = (
        f"LV-ViT with {config.segmentation_head} head, {trainer.model.num_parameters():,} parameters, "
        f"{config.num_labels} classes"
    )
    if trainer.train_dataset is None:
        print(f"{about}: evaluation on {len(trainer.eval_dataset):,} images ({opened.eval_name})", flush=True)
        return
    args = trainer.args
    crop = " x ".join(map(str, config.image_height_width))
    print(
        f"{about}, {len(trainer.train_dataset):,} training images, crops of {crop}, {args.images_per_step} a step, peak learning "
        f"rate {args.learning_rate:.3g}"
        + (f" ({args.base_learning_rate:g} for 16 images, scaled)" if args.is_learning_rate_scaled else ""),
        flush=True,
    )


@contextmanager
def temporary_inference(trainer: SegmentationTrainer, settings: InferenceSettings) -> Iterator[None]:
    """Other inference within a `with` block."""
    before, trainer.inference = trainer.inference, settings
    try:
        yield
    finally:
        trainer.inference = before


def evaluate_all(run: Run, test_name: str | None) -> tuple[dict[str, tuple[str, dict]], dict[str, dict]]:
    """Evaluates every split at a single scale, and at several if that was asked for.

    Returns:
        Prefix of the metrics -> split in words and metrics; what was evaluated in words -> scores of the classes.
    """
    trainer = run.trainer
    parts = [("eval", run.opened.eval_name, trainer.eval_dataset)]
    if run.test is not None:
        parts.append(("test", test_name, run.test))
    evaluations, class_scores = {}, {}
    for prefix, split, samples in parts:
        for settings in filter(None, (trainer.inference, run.multi_scale)):
            several = settings is run.multi_scale
            full_prefix = f"{prefix}_multi_scale" if several else prefix
            with temporary_inference(trainer, settings):
                metrics = trainer.evaluate(samples, metric_key_prefix=full_prefix)
            trainer.save_metrics(full_prefix, metrics)
            title = f"{split}, multi-scale" if several else split
            evaluations[full_prefix], class_scores[title] = (split, metrics), trainer.class_scores
            if trainer.is_world_process_zero():
                print(f"{title} ({len(samples):,} images): {headline(metrics, full_prefix)}", flush=True)
    return evaluations, class_scores


def main(arguments: list[str]) -> None:
    if start_missing_processes(["--module", MODULE], arguments):
        return
    end_with_launcher()
    try:
        model_args, data_args, training_args = parse(arguments, PROGRAM)
        run = prepare(model_args, data_args, training_args)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"{MODULE}: {error}" if is_main_process() else 1)
    trainer, is_main = run.trainer, run.trainer.is_world_process_zero()
    if is_main:
        if trainer.train_dataset is not None:
            discard_overwritten_checkpoints(training_args, model_args.overwrite_output_dir)
        log_run_summary(run)
    try:
        if trainer.train_dataset is not None:
            train(trainer)
        evaluations, class_scores = evaluate_all(run, data_args.test_split)
    except SampleError as error:
        sys.exit(f"{MODULE}: {error}")
    if is_main:
        output_dir, names = Path(training_args.output_dir), run.opened.class_names
        output_dir.mkdir(parents=True, exist_ok=True)
        save_class_scores(output_dir, names, class_scores)
        table = class_table(names, class_scores)
        print(table)
        image = draw_predictions(trainer, names) if model_args.save_picture else None
        if trainer.train_dataset is not None:
            provenance = find_provenance(model_args, data_args.dataset_name, None, EMBEDDED_RECIPE)
            write_segmentation_card(CARD_TEMPLATE, trainer, provenance, evaluations, table, image)
        print(f"saved to {training_args.output_dir}")
    end_together()  # the others need not wait for an upload
    if trainer.train_dataset is not None:
        push_finished_run(trainer, MODULE)


def train(trainer: SegmentationTrainer) -> None:
    """Trains and saves the model; ends the program if it is told to stop."""
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.stop_on_signal.received:
        end_after_signal(trainer)
    trainer.save_model(_internal_call=True)  # it is published at the end, with evaluation and card
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


if __name__ == "__main__":
    main(sys.argv[1:])
