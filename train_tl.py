"""Trains an image classifier with token labels (or plain ones) and saves it for `AutoModel`.

accelerate launch train_tl.py                                  embedded data, about five minutes on two CPU cores
accelerate launch train_tl.py RECIPE.yaml --output_dir runs/a  a recipe; any option overrides its value
accelerate launch train_tl.py --dataset_name path/to/images --variant lvvit_s_224 --output_dir runs/b
"""

import os
import platform
import sys
from pathlib import Path

import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.run import main as torchrun
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, set_seed
from transformers.utils import logging

from dataset_scripts import digit_scenes
from modeling_lvvit import LVViTConfig, LVViTForImageClassification
from modeling_lvvit.command_line import (
    ModelArguments,
    is_main_process,
    missing_cpu_processes,
    parse,
    prepare_output_dir,
)
from modeling_lvvit.token_labeling import (
    ImageProcessorTransform,
    TokenLabelDataset,
    TokenLabelTrainer,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from modeling_lvvit.token_labeling.data import DataArguments, has_dense_columns, open_datasets
from modeling_lvvit.variants import VARIANTS, evaluation_image_processor, variant_config
from modeling_lvvit.visualization import save_prediction_figure


logger = logging.get_logger("train_tl")
CARD_TEMPLATE = Path(__file__).parent / "model_cards" / "template.md"
PICTURE = "predictions.png"
EMBEDDED_NAME = "digit scenes (dataset_scripts/digit_scenes.py)"


def build_model(args: ModelArguments, class_names: list[str]):
    """Model and image processor; class names of the data become those of the model.

    Raises:
        ValueError: If a pretrained model has other classes or another input size and may not be changed.
    """
    names = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    size = args.image_height_width
    overrides = dict(args.config_overrides or {})
    if args.model_name_or_path is None:
        if size is not None:
            overrides["image_size"] = size
        config = (
            variant_config(args.variant, **overrides, **names) if args.variant else LVViTConfig(**overrides, **names)
        )
        crop_fraction = args.crop_fraction or (VARIANTS[args.variant].crop_fraction if args.variant else 0.9)
        return LVViTForImageClassification(config), evaluation_image_processor(
            config.image_height_width, crop_fraction
        )

    source = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(args.model_name_or_path, **source)
    if config.num_labels != len(class_names) and not args.ignore_mismatched_sizes:
        raise ValueError(
            f"{args.model_name_or_path} has {config.num_labels} classes, the data has {len(class_names)}. "
            "--ignore_mismatched_sizes makes new heads for the classes of the data."
        )
    if size is not None and size != tuple(config.image_height_width):
        raise ValueError(
            f"{args.model_name_or_path} takes images of {config.image_height_width}, not of {size} pixels."
        )
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        **source,
        **overrides,
        **names,
        ignore_mismatched_sizes=args.ignore_mismatched_sizes,
        dtype=torch.float32,
    )
    return model, AutoImageProcessor.from_pretrained(args.model_name_or_path, **source)


def build_samples(
    args: DataArguments, image_size: tuple[int, int], image_processor, train_rows, eval_rows
) -> tuple[TokenLabelDataset, TokenLabelDataset]:
    """Training samples, jointly augmented, and evaluation samples, preprocessed by the image processor."""
    transform = TrainTransform(image_size, image_processor.image_mean, image_processor.image_std, args.augmentation())
    dense = {}
    if has_dense_columns(train_rows, args):
        dense = {"ids_column": args.token_label_ids_column, "scores_column": args.token_label_scores_column}
    columns = (args.image_column, args.label_column)
    train = TokenLabelDataset(train_rows, transform, *columns, **dense, name="training")
    evaluation = TokenLabelDataset(
        eval_rows,
        ImageProcessorTransform(image_processor),
        *columns,
        **(dense if has_dense_columns(eval_rows, args) else {}),
        name="evaluation",
    )
    return train, evaluation


@torch.inference_mode()
def draw_predictions(trainer: TokenLabelTrainer, samples: TokenLabelDataset, count: int = 10) -> None:
    """Writes the picture of the first evaluation samples, as the model sees them."""
    model, config = trainer.model.eval(), trainer.model.config
    count = min(count, len(samples))
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples.__getitems__(list(range(count)))])
    output = model(pixel_values.to(model.device))
    processor = trainer.processing_class
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    arrays = (255 * (pixel_values * std + mean)).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    maps = [samples.label_map(index) for index in range(count)] if samples.has_label_maps else None
    save_prediction_figure(
        Path(trainer.args.output_dir) / PICTURE,
        [datasets.Image().decode_example(datasets.Image().encode_example(array)) for array in arrays],
        samples.labels(count),
        output.logits.cpu(),
        output.patch_logits.cpu(),
        trainer.grid_size,
        [config.id2label[index] for index in range(config.num_labels)],
        maps,
    )


def write_card(
    trainer: TokenLabelTrainer, data_args: DataArguments, eval_metrics: dict[str, float], split: str
) -> None:
    """Fills the card template from the finished run."""
    args, config = trainer.args, trainer.model.config
    name = Path(args.output_dir).resolve().name
    data_name = data_args.dataset_name or EMBEDDED_NAME
    accuracies = {key.removeprefix("eval_"): value for key, value in eval_metrics.items() if key.endswith("accuracy")}
    results = [
        EvalResult("image-classification", data_name, data_name, key, round(value, 4), dataset_split=split)
        for key, value in accuracies.items()
    ]
    options = (
        "learning_rate",
        "num_train_epochs",
        "images_per_step",
        "weight_decay",
        "label_smoothing_factor",
        "seed",
    )
    options += ("cls_weight", "dense_weight", "cls_target", "mix_probability", "ema_decay", "bf16", "fp16")
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            license="apache-2.0",
            pipeline_tag="image-classification",
            tags=["lvvit", "token-labeling", "vision"],
            metrics=["accuracy"],
            model_name=name,
            eval_results=results,
        ),
        template_path=str(CARD_TEMPLATE),
        model_name=name,
        model_id=args.hub_model_id or name,
        token_labels=bool(trainer.train_dataset.has_label_maps and args.dense_weight),
        picture=PICTURE if (Path(args.output_dir) / PICTURE).exists() else None,
        patch_logits_weight=config.patch_logits_weight,
        eval_split=split,
        metrics={key: f"{100 * value:.2f} %" for key, value in accuracies.items()},
        dataset_name=data_name,
        num_train=len(trainer.train_dataset),
        num_eval=len(trainer.eval_dataset),
        num_classes=config.num_labels,
        num_parameters=f"{trainer.model.num_parameters():,}",
        image_height=config.image_height_width[0],
        image_width=config.image_height_width[1],
        patch_size=config.patch_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        hyperparameters={option: getattr(args, option) for option in options},
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}",
    )
    card.save(Path(args.output_dir) / "README.md")


def use_all_cpu_cores(training_args: TokenLabelTrainingArguments) -> None:
    """Shares the cores between the processes of this machine: `accelerate launch` gives a CPU process a single thread
    unless `--num_cpu_threads_per_process` says otherwise."""
    if training_args.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def prepare(model_args: ModelArguments, data_args: DataArguments, training_args: TokenLabelTrainingArguments):
    """Everything that can go wrong before training: output folder, data, model."""
    prepare_output_dir(model_args, training_args)
    use_all_cpu_cores(training_args)
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="opening the data"):
        if data_args.dataset_name is None:
            data_args = DataArguments(**{**vars(data_args), "dataset_name": str(digit_scenes.build_or_reuse())})
        train_rows, eval_rows = open_datasets(data_args, training_args.seed)
        class_names = train_rows.features[data_args.label_column].names
        model, image_processor = build_model(model_args, class_names)
        samples = build_samples(data_args, model.config.image_height_width, image_processor, train_rows, eval_rows)
        trainer = TokenLabelTrainer(
            model, training_args, train_dataset=samples[0], eval_dataset=samples[1], processing_class=image_processor
        )
        if data_args.check_data and training_args.should_save:
            for part in samples:
                part.check_rows(model.config.num_labels)
    return trainer


def main(arguments: list[str]) -> None:
    if processes := missing_cpu_processes():
        os.environ.pop("MASTER_PORT", None)
        torchrun(["--standalone", f"--nproc_per_node={processes}", __file__, *arguments])
        return
    try:
        model_args, data_args, training_args = parse(arguments)
        trainer = prepare(model_args, data_args, training_args)
    except (ValueError, OSError, StrictDataclassError) as error:
        sys.exit(f"train_tl.py: {error}" if is_main_process() else 1)
    model = trainer.model
    if trainer.is_world_process_zero():
        print(
            f"{type(model).__name__} with {model.num_parameters():,} parameters, "
            f"{'token' if trainer.train_dataset.has_label_maps and training_args.dense_weight else 'plain'} labels, "
            f"{len(trainer.train_dataset):,} training images, {training_args.images_per_step} a step, "
            f"peak learning rate {training_args.learning_rate:.3g}"
        )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        if model_args.save_picture and model.config.patch_logits_weight:
            draw_predictions(trainer, trainer.eval_dataset)
        write_card(trainer, data_args, metrics, str(trainer.eval_dataset.rows.split or "evaluation"))
        print(f"top-1 on {len(trainer.eval_dataset):,} evaluation images: {100 * metrics['eval_accuracy']:.2f} %")
        print(f"saved to {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(sys.argv[1:])
