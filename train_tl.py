"""Trains an image classifier with token labels (or plain ones) and saves it for `AutoModel`.

accelerate launch train_tl.py                                  embedded data, a few minutes on two CPU cores
accelerate launch train_tl.py RECIPE.yaml --output_dir runs/a  a recipe; any option overrides its value
accelerate launch train_tl.py --dataset_name path/to/images --variant lvvit_s_224 --output_dir runs/b
accelerate launch train_tl.py --dataset_name path/to/images --architecture timm/resnet50 --annotator MODEL --output_dir runs/c
"""

import dataclasses
import sys

from huggingface_hub.errors import StrictDataclassError
from transformers import set_seed

from modeling_lvvit.annotators.online import open_annotator
from modeling_lvvit.cli import digit_scenes
from modeling_lvvit.cli.build_model import build_model, model_image_size
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.model_card import find_provenance, write_model_card
from modeling_lvvit.cli.open_data import DataArguments, OpenedData, open_datasets
from modeling_lvvit.cli.parser import EMBEDDED_RECIPE, parse
from modeling_lvvit.data.images import SampleError
from modeling_lvvit.deployment import prepare_for_cpu
from modeling_lvvit.hub.folders import CARD_TEMPLATES
from modeling_lvvit.hub.hub_trainer import push_finished_run
from modeling_lvvit.launching import (
    end_with_launcher,
    is_main_process,
    set_up_cpu,
    start_missing_processes,
)
from modeling_lvvit.token_labeling import (
    ImageProcessorTransform,
    TokenLabelDataset,
    TokenLabelStream,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from modeling_lvvit.training.callbacks import end_after_signal
from modeling_lvvit.training.checkpoints import discard_overwritten_checkpoints, prepare_output_dir
from modeling_lvvit.visualization.predictions import draw_predictions


CARD_TEMPLATE = CARD_TEMPLATES / "template.md"


def build_samples(
    args: DataArguments,
    training_args: TokenLabelTrainingArguments,
    image_size: tuple[int, int],
    image_processor,
    opened: OpenedData,
) -> tuple[TokenLabelDataset | TokenLabelStream, TokenLabelDataset]:
    """Training samples, jointly augmented, and evaluation samples, preprocessed by the image processor."""
    mean, std = image_processor.image_mean, image_processor.image_std
    transform = TrainTransform(image_size, mean, std, args.augmentation())
    columns = (args.image_column, args.label_column)
    evaluation = TokenLabelDataset(
        opened.evaluation, ImageProcessorTransform(image_processor), *columns, name="evaluation"
    )
    if args.streaming:
        stream = TokenLabelStream(
            opened.train, transform, *columns, opened.labels, args.key_column, args.shuffle_buffer,
            training_args.data_seed, training_args.process_index, training_args.world_size, args.key_pattern,
        )  # fmt: skip
        if stream.has_label_maps and training_args.label_crop == "authors":
            stream.label_maps = stream.label_maps.without_regions()
        return stream, evaluation
    label_maps = opened.label_maps
    if label_maps is not None and training_args.label_crop == "authors":
        label_maps = label_maps.without_regions()
    train = TokenLabelDataset(opened.train, transform, *columns, name="training", label_maps=label_maps)
    return train, evaluation


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: TokenLabelTrainingArguments):
    """Everything that can go wrong before training: output folder, data, model.

    Returns:
        The Trainer and the data.
    """
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("A stream has no end: give --streaming together with --max_steps.")
    prepare_output_dir(training_args, model_args.model_name_or_path, model_args.overwrite_output_dir)
    set_up_cpu(training_args.device)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="opening the data"):
        if data_args.dataset_name in (None, EMBEDDED_RECIPE):
            data_args = dataclasses.replace(data_args, dataset_name=str(digit_scenes.build_or_reuse()))
        opened = open_datasets(data_args, training_args.seed)
        model, image_processor = build_model(model_args, opened.train.features[data_args.label_column].names)
        prepare_for_cpu(model, training_args.device, training_args.bf16)
        samples = build_samples(data_args, training_args, model_image_size(model), image_processor, opened)
        annotator = None
        if data_args.annotator is not None:
            names = [model.config.id2label[index] for index in range(model.config.num_labels)]
            statistics = (image_processor.image_mean, image_processor.image_std)
            annotator = open_annotator(data_args, names, *statistics, training_args.device)
    # by all processes together: it opens the repository of --push_to_hub
    trainer = TokenLabelTrainer(
        model,
        training_args,
        train_dataset=samples[0],
        eval_dataset=samples[1],
        processing_class=image_processor,
        annotator=annotator,
    )
    if data_args.require_token_labels and not trainer.trains_patches:
        raise ValueError(
            "--require_token_labels: the data has no dense labels. Give --token_labels, --annotator or data with "
            f"columns {data_args.token_label_ids_column} and {data_args.token_label_scores_column}."
        )
    if "patch_logits_weight" in (model_args.config_overrides or {}):  # the user's word over the Trainer's rule
        model.config.patch_logits_weight = model_args.config_overrides["patch_logits_weight"]
    if data_args.check_data:
        with training_args.main_process_first(desc="checking the data"):
            for part in samples[data_args.streaming :] if training_args.should_save else ():
                part.check_rows(model.config.num_labels)  # a stream is looked at while it is read
    return trainer, opened


def log_run_summary(trainer: TokenLabelTrainer) -> None:
    """Says in one line what will be trained."""
    args, samples = trainer.args, trainer.train_dataset
    kind = "plain"
    if trainer.trains_patches:
        kind = "token" if args.patch_target == "dense" else "self-emerging token"
    images = "streamed" if isinstance(samples, TokenLabelStream) else f"{len(samples):,}"
    print(
        f"{type(trainer.model).__name__} with {trainer.model.num_parameters():,} parameters, {kind} labels, "
        f"{images} training images, {args.images_per_step} a step, peak learning rate {args.learning_rate:.3g}"
        + (f" ({args.base_learning_rate:g} for 1,024 images, scaled)" if args.is_learning_rate_scaled else ""),
        flush=True,
    )
    if trainer.annotator is not None and trainer.trains_patches:
        rate = trainer.annotator.images_per_second(args.train_batch_size)
        print(
            f"labels by {trainer.annotator.annotator.name}, which takes {1000 / rate:.3g} ms an image here", flush=True
        )


def main(arguments: list[str]) -> None:
    if start_missing_processes([__file__], arguments):
        return
    end_with_launcher()
    try:
        model_args, data_args, training_args = parse(arguments)
        trainer, opened = prepare(model_args, data_args, training_args)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"train_tl.py: {error}" if is_main_process() else 1)
    is_main = trainer.is_world_process_zero()
    if is_main:
        discard_overwritten_checkpoints(training_args, model_args.overwrite_output_dir)
        log_run_summary(trainer)
    try:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    except SampleError as error:
        sys.exit(f"train_tl.py: {error}")
    if trainer.stop_on_signal.received:
        end_after_signal(trainer)
    if not model_args.save_patch_head:
        trainer.model.saves_patch_head = False
    trainer.save_model(_internal_call=True)  # it is published at the end, with evaluation and card
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    has_image = model_args.save_picture and trainer.trains_patches
    image = draw_predictions(trainer, data_args, opened.evaluation) if has_image else None
    if is_main:
        provenance = find_provenance(model_args, data_args.dataset_name, data_args.token_labels, EMBEDDED_RECIPE)
        write_model_card(CARD_TEMPLATE, trainer, provenance, opened.eval_name, metrics, image)
        if "eval_accuracy" in metrics:
            print(f"top-1 on {len(opened.evaluation):,} evaluation images: {100 * metrics['eval_accuracy']:.2f} %")
        print(f"saved to {training_args.output_dir}")
    push_finished_run(trainer, "train_tl.py")


if __name__ == "__main__":
    main(sys.argv[1:])
