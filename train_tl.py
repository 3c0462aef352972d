"""Trains an image classifier with token labels (or plain ones) and saves it for `AutoModel`.

accelerate launch train_tl.py                                  embedded data, a few minutes on two CPU cores
accelerate launch train_tl.py RECIPE.yaml --output_dir runs/a  a recipe; any option overrides its value
accelerate launch train_tl.py --dataset_name path/to/images --variant lvvit_s_224 --output_dir runs/b
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, set_seed

from dataset_scripts import digit_scenes
from modeling_lvvit import LVViTConfig, LVViTForImageClassification
from modeling_lvvit.command_line import ModelArguments, parse, prepare_output_dir
from modeling_lvvit.launching import is_main_process, start_missing_processes, use_all_cpu_cores
from modeling_lvvit.model_card import write_model_card
from modeling_lvvit.token_labeling import (
    ImageProcessorTransform,
    TokenLabelDataset,
    TokenLabelStream,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from modeling_lvvit.token_labeling.data import (
    DataArguments,
    OpenedData,
    has_dense_columns,
    open_datasets,
)
from modeling_lvvit.token_labeling.data_sources import looks_local
from modeling_lvvit.token_labeling.pictures import SampleError
from modeling_lvvit.variants import VARIANTS, evaluation_image_processor, variant_config
from modeling_lvvit.visualization import save_prediction_figure


CARD_TEMPLATE = Path(__file__).parent / "model_cards" / "template.md"
PICTURE = "predictions.png"
NUM_PICTURES = 10


def build_model(args: ModelArguments, class_names: list[str]):
    """Model and image processor; class names of the data become those of the model."""
    names = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    if args.model_name_or_path is not None:
        return load_pretrained(args, class_names, names)
    settings = {**(args.config_overrides or {}), **names}
    if args.image_size is not None:
        settings["image_size"] = args.image_height_width
    config = variant_config(args.variant, **settings) if args.variant else LVViTConfig(**settings)
    crop_fraction = args.crop_fraction or (VARIANTS[args.variant].crop_fraction if args.variant else 0.9)
    return LVViTForImageClassification(config), evaluation_image_processor(config.image_height_width, crop_fraction)


def load_pretrained(args: ModelArguments, class_names: list[str], names: dict[str, Any]):
    """A saved model and its image processor, for the classes of the data.

    Raises:
        FileNotFoundError: If a local folder does not exist.
        ValueError: If it is no LV-ViT, is damaged, or has other classes or another input size and may not be changed.
    """
    path = args.model_name_or_path
    if looks_local(path) and not Path(path).expanduser().is_dir():
        raise FileNotFoundError(f"There is no model folder {path}.")
    source = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(path, **source)
    if config.model_type != LVViTConfig.model_type:
        raise ValueError(
            f"{path} is a {config.model_type!r} model; this program trains {LVViTConfig.model_type!r} models."
        )
    if config.num_labels != len(class_names) and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"{path} has {config.num_labels} classes, the data has {len(class_names)}. "
            "--ignore_mismatched_sizes makes new heads for the classes of the data."
        )
    size = args.image_height_width
    if size is not None and size != tuple(config.image_height_width):
        raise ValueError(f"{path} takes images of {tuple(config.image_height_width)}, not of {size} pixels.")
    options = {**source, **names, **(args.config_overrides or {}), "dtype": torch.float32}
    try:
        model = AutoModelForImageClassification.from_pretrained(
            path, ignore_mismatched_sizes=args.ignore_mismatched_sizes, **options
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"The weights in {path} cannot be loaded: {error}") from error
    return model, AutoImageProcessor.from_pretrained(path, **source)


def build_samples(
    args: DataArguments,
    training_args: TokenLabelTrainingArguments,
    config: LVViTConfig,
    image_processor,
    opened: OpenedData,
) -> tuple[TokenLabelDataset | TokenLabelStream, TokenLabelDataset]:
    """Training samples, jointly augmented, and evaluation samples, preprocessed by the image processor."""
    mean, std = image_processor.image_mean, image_processor.image_std
    transform = TrainTransform(config.image_height_width, mean, std, args.augmentation())
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


def dense_columns(rows: datasets.Dataset, args: DataArguments) -> dict[str, str]:
    """The names of the dense-label columns to read, none without dense labels."""
    if not has_dense_columns(rows, args):
        return {}
    return {"ids_column": args.token_label_ids_column, "scores_column": args.token_label_scores_column}


def dense_labels_of(rows: datasets.Dataset, args: DataArguments, count: int):
    """Label maps of the first rows for the picture; `None` where evaluation data has none or not for all."""
    try:
        columns = dense_columns(rows, args)
        samples = TokenLabelDataset(rows, lambda image: {}, args.image_column, args.label_column, **columns)
        return [samples.label_map(index) for index in range(count)] if samples.has_label_maps else None
    except ValueError:  # the picture goes without them; training and evaluation never needed them
        return None


@torch.inference_mode()
def draw_predictions(trainer: TokenLabelTrainer, data_args: DataArguments, eval_rows: datasets.Dataset) -> str:
    """Writes the picture of the first evaluation rows, as the model sees them, and returns its name."""
    model, config, samples = trainer.model.eval(), trainer.model.config, trainer.eval_dataset
    count = min(NUM_PICTURES, len(samples))
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples.__getitems__(list(range(count)))])
    output = model(pixel_values.to(model.device))
    processor = trainer.processing_class
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    arrays = (255 * (pixel_values * std + mean)).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    save_prediction_figure(
        Path(trainer.args.output_dir) / PICTURE,
        [Image.fromarray(array) for array in arrays],
        samples.labels(count),
        output.logits.cpu(),
        output.patch_logits.cpu(),
        trainer.grid_size,
        [config.id2label[index] for index in range(config.num_labels)],
        dense_labels_of(eval_rows, data_args, count),
    )
    return PICTURE


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: TokenLabelTrainingArguments):
    """Everything that can go wrong before training: output folder, data, model.

    Returns:
        The Trainer and the data.
    """
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("A stream has no end: give --streaming together with --max_steps.")
    prepare_output_dir(model_args, training_args)
    use_all_cpu_cores(training_args.device)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="opening the data"):
        if data_args.dataset_name is None:
            data_args = dataclasses.replace(data_args, dataset_name=str(digit_scenes.build_or_reuse()))
        opened = open_datasets(data_args, training_args.seed)
        model, image_processor = build_model(model_args, opened.train.features[data_args.label_column].names)
        samples = build_samples(data_args, training_args, model.config, image_processor, opened)
        trainer = TokenLabelTrainer(
            model, training_args, train_dataset=samples[0], eval_dataset=samples[1], processing_class=image_processor
        )
        if "patch_logits_weight" in (model_args.config_overrides or {}):  # the user's word over the Trainer's rule
            model.config.patch_logits_weight = model_args.config_overrides["patch_logits_weight"]
        if data_args.check_data and training_args.should_save:
            for part in samples[data_args.streaming :]:  # a stream is looked at while it is read
                part.check_rows(model.config.num_labels)
    return trainer, opened


def introduce(trainer: TokenLabelTrainer) -> None:
    """Says in one line what will be trained."""
    args, samples = trainer.args, trainer.train_dataset
    kind = "token" if samples.has_label_maps and args.dense_weight else "plain"
    images = "streamed" if isinstance(samples, TokenLabelStream) else f"{len(samples):,}"
    print(
        f"{type(trainer.model).__name__} with {trainer.model.num_parameters():,} parameters, {kind} labels, "
        f"{images} training images, {args.images_per_step} a step, peak learning rate {args.learning_rate:.3g}",
        flush=True,
    )


def main(arguments: list[str]) -> None:
    if start_missing_processes(__file__, arguments):
        return
    try:
        model_args, data_args, training_args = parse(arguments)
        trainer, opened = prepare(model_args, data_args, training_args)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"train_tl.py: {error}" if is_main_process() else 1)
    is_main = trainer.is_world_process_zero()
    if is_main:
        introduce(trainer)
    try:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    except SampleError as error:
        sys.exit(f"train_tl.py: {error}")
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if is_main:
        has_picture = model_args.save_picture and trainer.model.config.patch_logits_weight
        picture = draw_predictions(trainer, data_args, opened.evaluation) if has_picture else None
        name = data_args.dataset_name or "digit scenes"
        name = Path(name).name if looks_local(name) else name
        write_model_card(CARD_TEMPLATE, trainer, name, opened.eval_name, metrics, picture)
        if "eval_accuracy" in metrics:
            print(f"top-1 on {len(opened.evaluation):,} evaluation images: {100 * metrics['eval_accuracy']:.2f} %")
        print(f"saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(sys.argv[1:])
