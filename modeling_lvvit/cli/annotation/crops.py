"""Labels of the very crops that a training run will see.

What a run draws for a row depends on seed, epoch and row alone. So the training rows are opened here as `lvvit train` opens them, with
the same options, and each is drawn for each epoch as training draws it, but for erased rectangles, which come last.
"""

import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from transformers.hf_argparser import HfArg

from ...annotators.annotate import WAITING, about_dataset, record_classes
from ...annotators.annotation import Annotation, write_label_set
from ...annotators.arguments import AnnotateArguments
from ...annotators.image_batches import ImageBatch, distinct_keys
from ...annotators.online import OnlineAnnotator, open_annotator
from ...annotators.pipeline import PreparedImage
from ...annotators.prefetch import loaded_ahead
from ...data.classes.multi_label import class_names
from ...data.files.shard_folder import default_rows_per_shard
from ...data.images import PixelLimit, SampleError, content_hash, image_note, read_content
from ...data.sampling import BALANCED
from ...labels.checks.agreement import compare_set
from ...labels.crops import CropLabelSetWriter, CropRecord
from ...labels.label_set import LabelSet
from ...token_labeling import TokenLabelDataset, TokenLabelTrainingArguments, TrainTransform
from ...variants import AUTO
from ..build_model import build_model, choose_for_data, model_image_size
from ..data_arguments import DataArguments
from ..model_arguments import ModelArguments
from ..open_data import OpenedData, open_datasets, row_options
from ..parser import parse
from ..training_program import with_embedded_data


RecipeOptions = tuple[ModelArguments, DataArguments, TokenLabelTrainingArguments]
# options that annotation and training share: where given, those of the annotation hold
ANNOTATOR_OPTIONS = (
    "annotator", "annotator_revision", "annotator_trust_remote_code", "annotator_image_size", "annotator_class_map",
    "annotator_ignore_extra_classes", "prompts",
)  # fmt: skip
DATA_OPTIONS = (
    "dataset_name", "unlabeled_dataset_name", "dataset_config_name", "dataset_revision", "train_split", "image_column_name", "label_column_name", "key_column",
    "max_train_samples", "max_image_pixels",
)  # fmt: skip
BYTES_OF_KEY, BYTES_OF_SHARD = 60, 6_000  # key, hash, box of a row, and what describes a Parquet file, compressed


@dataclass
class CropArguments:
    """Options of labels of crops."""

    option_groups: ClassVar[dict[str, str]] = {"crops": "labels of training crops"}

    crops: list[str] | None = HfArg(
        default=None,
        help="Label the crops that a run of lvvit train sees, instead of whole images: its recipes, and its options as name=value; nothing "
        "more for the defaults.",
    )
    epochs: int | None = HfArg(
        default=None,
        help="Epochs whose crops get labels; a longer run sees them again. Default: the epochs of the run.",
    )

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"`epochs` must be at least 1, got {self.epochs}.")
        if self.epochs is not None and self.crops is None:
            raise ValueError("`epochs` needs `crops`: whole images look the same in each epoch.")

    def check(self, args: AnnotateArguments) -> None:
        """Raises a `ValueError` for options with which no crops are labelled."""
        reasons = {
            "streaming": (args.streaming, "a stream does not number its images, and the number decides what is drawn"),
            "on_error": (args.on_error == "empty", "a damaged image would stop training too"),
            "fit": (args.fit != "squash", "an annotator sees the whole crop, as in training"),
            "five_crop": (args.five_crop, "an annotator sees the crop itself"),
            "random_weights": (args.random_weights, "live labels have no counterpart"),
        }
        for name, (is_given, reason) in reasons.items():
            if is_given:
                raise ValueError(f"Leave out `{name}` with `crops`: {reason}.")


def read_recipe_options(args: AnnotateArguments, words: list[str]) -> RecipeOptions:
    """Options of the training run.

    Args:
        args: Options of annotation; those that training shares hold over the recipes.
        words: Recipes, and options as `name=value`.

    Raises:
        ValueError: If one is unknown or cannot be used, or rows are not drawn once in an epoch.
    """
    recipes = [word for word in words if "=" not in word]
    options = [f"--{word.removeprefix('--')}" for word in words if "=" in word]
    defaults = {entry.name: entry.default for entry in fields(AnnotateArguments)}
    given = {name: value for name in DATA_OPTIONS if (value := getattr(args, name)) != defaults[name]}
    options += [f"--{name}={value}" for name, value in given.items()]
    # processes of this program wait for each other longer than those of training
    model_args, data_args, training_args = parse(
        [*recipes, *options, f"--ddp_timeout={int(WAITING.total_seconds())}", "--report_to=none"]
    )
    annotator = {name: getattr(args, name) for name in ANNOTATOR_OPTIONS}
    data_args = replace(data_args, token_labels=None, **annotator)
    if data_args.streaming:
        raise ValueError("The recipe reads a stream (`streaming`), whose images have no number to draw crops by.")
    if training_args.train_sampling_strategy == BALANCED:
        raise ValueError(
            "The recipe draws rows several times in an epoch (`train_sampling_strategy` balanced), with other crops each time. Weigh the "
            "classes instead (`class_weights`), or label crops in training (lvvit train --annotator)."
        )
    return model_args, data_args, training_args


def open_samples(recipe: RecipeOptions, device: torch.device) -> tuple[TokenLabelDataset, OnlineAnnotator, OpenedData]:
    """Training samples as the run draws them, without erased rectangles; the annotator that would label them; and the data.

    Raises:
        FileNotFoundError, ValueError: As in training.
    """
    model_args, data_args, training_args = recipe
    data_args = with_embedded_data(data_args)
    opened = open_datasets(data_args, training_args.seed)
    names = class_names(opened.train, data_args.label_column_name)
    if model_args.variant == AUTO:
        model_args, _ = choose_for_data(
            model_args, opened.train, data_args.image_column_name, len(names), training_args
        )
    model, processor = build_model(model_args, names)  # which knows the size of its images
    statistics = (processor.image_mean, processor.image_std)
    transform = TrainTransform(model_image_size(model), *statistics, data_args.augmentation(), data_args.exact_resize)
    columns = (data_args.image_column_name, data_args.label_column_name)
    samples = TokenLabelDataset(opened.train, transform, *columns, name="training")
    return samples, open_annotator(data_args, names, *statistics, device), opened


def run_epochs(training_args: TokenLabelTrainingArguments, num_images: int) -> int:
    """Epochs of a run, begun ones included."""
    training_args.lengthen(num_images)
    if training_args.max_steps < 1:
        return math.ceil(training_args.num_train_epochs)
    return math.ceil(training_args.max_steps / max(1, num_images // training_args.images_per_step))


def annotate_crops(
    recipe: RecipeOptions, epochs: int | None, args: AnnotateArguments, accelerator: Accelerator
) -> None:
    """Writes the shards of this process, those of one epoch after another; the main process completes the set.

    Args:
        recipe: Options of the training run.
        epochs: Epochs whose crops get labels; `None` for those of the run.
    """
    _, data_args, training_args = recipe
    PixelLimit(data_args.max_image_pixels)
    with accelerator.main_process_first():
        samples, online, opened = open_samples(recipe, accelerator.device)
    annotator, names = online.annotator, tuple(samples.label_feature.names)
    record_classes(args, annotator, len(names))
    annotator.provenance["annotator_dtype"] = data_args.annotator_dtype
    keys, about = distinct_keys(opened.train, data_args.image_column_name, data_args.key_column, args.number_rows)
    drawn = {"data_seed": training_args.data_seed, **samples.transform.draw_options()}
    num_epochs = epochs or run_epochs(training_args, len(samples))
    record = CropRecord(num_epochs, len(samples), drawn, row_options(data_args, training_args.seed))
    per_shard = args.rows_per_shard or default_rows_per_shard(len(samples))
    rows = CropBatches(samples, keys, training_args.data_seed, num_epochs, per_shard, args.batch_size)
    about = {**about_dataset(data_args), **about, **record.settings()}
    about |= {"decoding": "exact" if data_args.exact_resize else "reduced"}
    title = f"Token labels of training crops of {about['dataset']} ({data_args.train_split}) by {annotator.provenance['annotator']}"
    annotation = Annotation(annotator, online.score_map, names, rows, rows.prepare, about, title, CropLabelSetWriter)
    args = replace(args, train_split=data_args.train_split, max_train_samples=data_args.max_train_samples)
    write_label_set(args, annotation, accelerator, describe_size(args, annotation, record))
    if accelerator.is_main_process:
        classes = np.tile(samples.class_ids(), num_epochs)
        for line in compare_set(LabelSet.open(args.output_dir, args.train_split), classes):
            print(line)


def describe_size(args: AnnotateArguments, annotation: Annotation, record: CropRecord) -> str:
    """What will be labelled, and how much room it takes at most."""
    rows, columns = annotation.annotator.dense.grid_size
    is_all = args.top_k == len(annotation.class_names)  # then places in the palette are the same for all cells
    per_score = (2 if args.score_type == "float16" else 1) + (0 if is_all else 1)
    number = record.num_epochs * record.num_rows
    total = (
        number * (args.top_k * rows * columns * per_score + BYTES_OF_KEY) + annotation.rows.num_shards * BYTES_OF_SHARD
    )
    folder = next(
        path for path in (Path(args.output_dir).resolve(), *Path(args.output_dir).resolve().parents) if path.exists()
    )
    options = ", ".join(f"{name} {value}" for name, value in record.drawn.items() if value is not None)
    return (
        f"labels of {record.num_rows:,} crops in each of {record.num_epochs:,} epochs ({options})\n"
        f"up to about {total / number:,.0f} bytes a crop, {total / 1e6:,.1f} MB in all; "
        f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free"
    )


class CropBatches:
    """Crops of several epochs in batches that never cross the border of a shard; a shard belongs to one epoch.

    Args:
        samples: Training samples.
        keys: Key of each row.
        seed: `data_seed` of the run.
    """

    def __init__(
        self, samples: TokenLabelDataset, keys: Any, seed: int, num_epochs: int, rows_per_shard: int, batch_size: int
    ):
        self.samples, self.keys, self.seed, self.num_epochs = samples, keys, seed, num_epochs
        self.rows_per_shard, self.batch_size = rows_per_shard, batch_size
        self.shards_per_epoch = -(-len(samples) // rows_per_shard)

    @property
    def num_shards(self) -> int:
        """Number of shards of all epochs."""
        return self.num_epochs * self.shards_per_epoch

    def shard_rows(self, shard: int) -> range:
        """Rows of a shard."""
        first = shard % self.shards_per_epoch * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, len(self.samples)))

    def shard_size(self, shard: int) -> int:
        """Number of rows of a shard."""
        return len(self.shard_rows(shard))

    def batches(self, shards: Iterable[int]) -> Iterator[tuple[ImageBatch, tuple[int, range]]]:
        """Batches of the given shards, each with its epoch and rows."""
        for shard in shards:
            epoch, rows = shard // self.shards_per_epoch, self.shard_rows(shard)
            for start in range(rows.start, rows.stop, self.batch_size):
                part = range(start, min(start + self.batch_size, rows.stop))
                keys = self.keys[part.start : part.stop].to_pylist()
                yield ImageBatch(shard, keys, part.stop == rows.stop), (epoch, part)

    def prepare(
        self, batches: Iterable[tuple[ImageBatch, tuple[int, range]]], num_workers: int
    ) -> Iterator[tuple[ImageBatch, list[PreparedImage]]]:
        """Draws the crops of batches in worker processes while the caller works on earlier ones.

        Raises:
            SampleError: If an image cannot be read.
        """
        return loaded_ahead(self.load, batches, num_workers)

    def load(self, place: tuple[int, range]) -> list[PreparedImage]:
        """Crops of some rows in an epoch."""
        epoch, rows = place
        values = self.samples.rows[list(rows)][self.samples.image_column].to_pylist()
        try:
            samples = self.samples.draw(list(rows), self.seed, epoch)
        except SampleError as error:
            raise SampleError(f"{error} Mend the file, then start again: what was labelled so far is kept.") from error
        contents = [read_content(value) for value in values]
        return [
            PreparedImage(
                sample["pixel_values"], tuple(sample["crop_box"].tolist()), content_hash(content), image_note(content)
            )
            for sample, content in zip(samples, contents)
        ]
