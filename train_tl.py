"""Trains an image classifier with token labels (or plain ones) and saves it for `AutoModel`: `lvvit train`.

accelerate launch train_tl.py [RECIPE ...] [--option value ...]
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_lvvit.annotators.online import describe_heads, open_annotator
from modeling_lvvit.cli.build_model import build_model, choose_for_data, model_image_size
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.model_card import find_provenance, write_model_card
from modeling_lvvit.cli.open_data import DataArguments, OpenedData, open_datasets
from modeling_lvvit.cli.parser import EMBEDDED_RECIPE, PRESET, TRAIN_TL, describe_preset, read_preset
from modeling_lvvit.cli.training_program import TrainingRun, decodes_all, run_program, set_up, with_embedded_data
from modeling_lvvit.data.classes.multi_label import class_names, has_lists
from modeling_lvvit.data.images import PixelLimit
from modeling_lvvit.data.sampling import BALANCED
from modeling_lvvit.deployment import prepare_for_cpu
from modeling_lvvit.hub.folders import CARD_TEMPLATES
from modeling_lvvit.per_class.report import class_table, write_class_report
from modeling_lvvit.per_class.weights import describe_weights, note_uneven_classes
from modeling_lvvit.token_labeling import (
    AugmentationConfig,
    ImageProcessorTransform,
    TokenLabelDataset,
    TokenLabelStream,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from modeling_lvvit.token_labeling.multi_label import describe_metrics
from modeling_lvvit.training.checkpoints.record import data_record
from modeling_lvvit.variants import AUTO
from modeling_lvvit.visualization.predictions import draw_predictions
from modeling_lvvit.visualization.trained_maps import Localization, find_mask_column, measure_localization


FEW_TO_TRAIN_ON = 50_000  # images
CARD_TEMPLATE = CARD_TEMPLATES / "classifier.md"


@dataclass
class ClassifierRun(TrainingRun):
    """Training of an image classifier."""

    model_args: ModelArguments
    data_args: DataArguments
    opened: OpenedData
    trainer: TokenLabelTrainer
    notes: list[str]  # on how options were chosen
    localization: Localization | None = None

    def describe(self) -> str:
        """What will be trained, with which labels."""
        trainer, args, samples = self.trainer, self.trainer.args, self.trainer.train_dataset
        labels = "plain multi-label" if trainer.is_multi_label else "plain"
        if trainer.trains_patches:
            labels = "token" if args.patch_target == "dense" else "self-emerging token"
        images = "streamed" if isinstance(samples, TokenLabelStream) else f"{len(samples):,}"
        text = (
            f"{type(trainer.model).__name__} with {trainer.model.num_parameters():,} parameters, {labels} labels, "
            f"{images} training images, {args.images_per_step} a step, peak learning rate {args.learning_rate:.3g}"
            + (f" ({args.base_learning_rate:g} for 1,024 images, scaled)" if args.is_learning_rate_scaled else "")
        )
        if getattr(samples, "has_crop_maps", False) and trainer.trains_patches:
            number = samples.label_maps.num_epochs
            text += f"\nlabels of the crops of {number:,} epoch{'s' * (number > 1)}"
            if args.num_train_epochs > number:
                text += f", after which crops and labels come again ({args.num_train_epochs:g} epochs in all)"
        data = self.opened.describe(self.data_args.label_column_name)
        return "\n".join([*self.notes, text, *self.describe_annotator(), *data, *self.describe_balance()])

    def describe_annotator(self) -> list[str]:
        """How fast it labels crops, and how often as humans label their images; no line without one, or in other processes than the main one."""
        trainer, args, samples = self.trainer, self.trainer.args, self.trainer.train_dataset
        online = trainer.annotator
        if online is None or not (trainer.trains_patches and trainer.is_world_process_zero()):
            return []
        if isinstance(samples, TokenLabelStream):
            compared = ["crops of a stream are not compared with human labels before training"]
        else:
            agreement = online.compare_with_labels(samples, args.data_seed, args.train_batch_size)
            compared = (
                [] if agreement is None else agreement.lines(trainer.class_names, f"{len(agreement.classes):,} crops")
            )
        # last: it sets the clock of training to zero
        duration = 1000 / online.images_per_second(args.train_batch_size)
        return [f"labels by {online.annotator.name}, which takes {duration:.3g} ms an image here", *compared]

    def describe_balance(self) -> list[str]:
        """How classes of different sizes are made up for, or that nothing does; no line where they have about the same size."""
        trainer, lines = self.trainer, []
        names, counts = trainer.class_names, trainer.class_counts
        if trainer.class_weights is not None:
            lines.append(describe_weights(trainer.class_weights, names, counts))
        if trainer.args.train_sampling_strategy == BALANCED:
            lines.append("training images drawn with replacement, of every class as often")
        if not lines and counts is not None:
            lines = [note_uneven_classes(counts, names)]
        return [line for line in lines if line is not None]

    def finish_model(self) -> None:
        """Leaves the patch head out of the saved model if that was asked for."""
        if not self.model_args.save_patch_head:
            self.trainer.model.saves_patch_head = False

    def evaluate(self) -> None:
        """Accuracy on the evaluation images, and where they have masks, how well the labelled class is found."""
        self.metrics = self.trainer.evaluate_result()
        about = {"eval_split": self.opened.eval_name, "eval_samples": len(self.opened.evaluation)}
        self.localization = measure_localization(self.trainer, self.data_args, self.opened.evaluation)
        places = {} if self.localization is None else self.localization.metrics()
        self.trainer.save_metrics("eval", self.metrics | about | places)

    def draw(self, path: Path, num_images: int) -> None:
        """See `draw_predictions`."""
        if self.trainer.trains_patches:
            draw_predictions(self.trainer, self.data_args, self.opened.evaluation, path, num_images)

    def report(self) -> None:
        """Writes figure and model card, and prints the accuracy."""
        trainer, data_args, opened = self.trainer, self.data_args, self.opened
        has_figure = self.model_args.save_picture and trainer.trains_patches
        figure = None
        if has_figure:
            figure = draw_predictions(trainer, data_args, opened.evaluation, localization=self.localization)
        if not trainer.is_world_process_zero():
            return
        names = (data_args.dataset_name, data_args.token_labels)
        provenance = find_provenance(self.model_args, *names, EMBEDDED_RECIPE)
        confusions = getattr(trainer.compute_metrics, "confusions", None)
        is_part = data_args.max_eval_samples is not None
        split = f"{len(opened.evaluation):,} images of {opened.eval_name}" if is_part else opened.eval_name
        table = None if confusions is None else class_table(trainer.class_names, confusions)
        places = None if self.localization is None else self.localization.in_words()
        write_model_card(CARD_TEMPLATE, trainer, provenance, split, self.metrics, figure, table, places)
        if trainer.is_multi_label:
            print(f"on {len(opened.evaluation):,} evaluation images: {describe_metrics(self.metrics)}")
        if "eval_accuracy" in self.metrics:
            accuracy = 100 * self.metrics["eval_accuracy"]
            print(f"top-1 on {len(opened.evaluation):,} evaluation images: {accuracy:.2f} %")
        if self.localization is not None:
            print(self.localization.describe())
        if confusions is not None:
            about = f"{len(opened.evaluation):,} images of {opened.eval_name}"
            print(write_class_report(Path(trainer.args.output_dir), trainer.class_names, confusions, about))


def build_samples(
    args: DataArguments,
    training_args: TokenLabelTrainingArguments,
    image_size: tuple[int, int],
    image_processor: Any,
    opened: OpenedData,
) -> tuple[TokenLabelDataset | TokenLabelStream, TokenLabelDataset]:
    """Training samples, jointly augmented, and evaluation samples, preprocessed by the image processor."""
    mean, std = image_processor.image_mean, image_processor.image_std
    transform = TrainTransform(image_size, mean, std, args.augmentation(), args.exact_resize)
    columns = {"image_column": args.image_column_name, "label_column": args.label_column_name}
    preprocess = ImageProcessorTransform(image_processor, as_pixels=True)
    evaluation = TokenLabelDataset(opened.evaluation, preprocess, **columns, name="evaluation")
    if args.streaming:
        train = TokenLabelStream(
            opened.train,
            transform,
            **columns,
            labels=opened.labels,
            key_column=args.key_column,
            key_pattern=args.key_pattern,
            shuffle_buffer=args.shuffle_buffer,
            seed=training_args.data_seed,
            process_index=training_args.process_index,
            num_processes=training_args.world_size,
        )
    else:
        may_lack_labels = opened.label_maps is not None or args.annotator is not None
        options = {"label_maps": opened.label_maps, "may_lack_labels": may_lack_labels}
        train = TokenLabelDataset(opened.train, transform, **columns, name="training", **options)
    if train.has_label_maps and training_args.label_crop == "authors":
        train.label_maps = train.label_maps.without_regions()
    return train, evaluation


def fit_options(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TokenLabelTrainingArguments,
    opened: OpenedData,
    num_classes: int,
) -> tuple[ModelArguments, list[str]]:
    """Chooses for the data what `--variant auto` and `--min_steps` leave to it: model options, and lines that say what was chosen."""
    num_images = None if data_args.streaming else len(opened.train)
    notes = [describe_preset(model_args, data_args, training_args)]
    is_published = data_args.augmentation() == AugmentationConfig() and model_args.model_name_or_path is None
    if model_args.preset is None and is_published and num_images is not None and num_images < FEW_TO_TRAIN_ON:
        notes.append(
            f"{num_images:,} images are few for the augmentation of ImageNet runs, which are the defaults: --preset {PRESET} has others."
        )
    if model_args.variant == AUTO:
        rows = opened.train
        model_args, reason = choose_for_data(model_args, rows, data_args.image_column_name, num_classes, training_args)
        notes.append(f"variant {AUTO}: {reason}")
    if num_images is not None and training_args.lengthen(num_images):
        notes.append(f"{training_args.num_train_epochs:g} epochs, for at least {training_args.min_steps:,} steps")
    recommended = read_preset(model_args).get("min_steps", 0)
    if num_images is not None and (steps := training_args.optimizer_steps(num_images)) < recommended:
        notes.append(f"{steps:,} of the {recommended:,} steps that preset {model_args.preset} recommends will be made")
    return model_args, [note for note in notes if note is not None]


def prepare(
    model_args: ModelArguments, data_args: DataArguments, training_args: TokenLabelTrainingArguments
) -> ClassifierRun:
    """Everything that can go wrong before training: output folder, data, model."""
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("A stream has no end: give `streaming` together with `max_steps`.")
    PixelLimit(data_args.max_image_pixels)
    set_up(model_args, training_args)
    with training_args.main_process_first(desc="opening the data"):
        opened_args = with_embedded_data(data_args)
        opened = open_datasets(opened_args, training_args.seed)
        find_mask_column(opened.evaluation, data_args.mask_column_name)  # raises if it is not there
        column = data_args.label_column_name
        names = class_names(opened.train, column)
        model_args, notes = fit_options(model_args, data_args, training_args, opened, len(names))
        model, processor = build_model(model_args, names, has_lists(opened.train, column))
        prepare_for_cpu(model, training_args.device, training_args.bf16)
        samples = build_samples(opened_args, training_args, model_image_size(model), processor, opened)
        annotator = None
        if data_args.annotator is not None:
            names = [model.config.id2label[index] for index in range(model.config.num_labels)]
            statistics = (processor.image_mean, processor.image_std)
            annotator = open_annotator(data_args, names, *statistics, training_args.device)
            notes += filter(None, [describe_heads(annotator)])
    # by all processes together: it opens the repository of --push_to_hub
    datasets = {"train_dataset": samples[0], "eval_dataset": samples[1]}
    trainer = TokenLabelTrainer(model, training_args, **datasets, processing_class=processor, annotator=annotator)
    trainer.training_data = data_record(opened_args.dataset_name, data_args.train_split)
    if data_args.require_token_labels and not trainer.trains_patches:
        raise ValueError(
            "`require_token_labels`: the data has no dense labels. Give `token_labels`, `annotator` or data with columns "
            f"{data_args.token_label_ids_column} and {data_args.token_label_scores_column}."
        )
    if "patch_logits_weight" in (model_args.config_overrides or {}):  # the user's word over the Trainer's rule
        model.config.patch_logits_weight = model_args.config_overrides["patch_logits_weight"]
    if data_args.check_data:
        with training_args.main_process_first(desc="checking the data"):
            for part in samples[data_args.streaming :] if training_args.should_save else ():
                decode = decodes_all(data_args.decode_data, training_args, len(part))
                part.check_rows(model.config.num_labels, decode)  # a stream is looked at while it is read
    return ClassifierRun(model_args, data_args, opened, trainer, notes)


def main(arguments: list[str]) -> None:
    run_program(TRAIN_TL, [__file__], prepare, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
