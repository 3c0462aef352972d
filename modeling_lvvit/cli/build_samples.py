"""The samples of a training run: images and label maps with their transforms."""

from typing import Any

from ..token_labeling import (
    ImageProcessorTransform,
    TokenLabelDataset,
    TokenLabelStream,
    TokenLabelTrainingArguments,
    TrainTransform,
)
from .open_data import DataArguments, OpenedData


def build_samples(
    args: DataArguments,
    training_args: TokenLabelTrainingArguments,
    image_size: tuple[int, int],
    image_processor: Any,
    opened: OpenedData,
) -> tuple[TokenLabelDataset | TokenLabelStream, TokenLabelDataset]:
    """Training samples, jointly augmented, and evaluation samples, preprocessed by the image processor."""
    mean, std = image_processor.image_mean, image_processor.image_std
    transform = TrainTransform(image_size, mean, std, args.augmentation())
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    evaluation = TokenLabelDataset(
        opened.evaluation, ImageProcessorTransform(image_processor), **columns, name="evaluation"
    )
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
        train = TokenLabelDataset(opened.train, transform, **columns, name="training", label_maps=opened.label_maps)
    if train.has_label_maps and training_args.label_crop == "authors":
        train.label_maps = train.label_maps.without_regions()
    return train, evaluation
