"""A figure of the predictions of a trained model."""

from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from ..cli.open_data import DataArguments, has_dense_columns
from ..data.classes.class_matching import shown_names
from ..token_labeling import TokenLabelCollator, TokenLabelDataset, TokenLabelTrainer, finish_images
from .localization import enlarged, read_masked_images
from .prediction_figure import ClassMaps, save_prediction_figure
from .trained_maps import FIGURE_TITLES, Localization, find_mask_column, trained_maps


FIGURE, NUM_IMAGES = "predictions.png", 10
NOTE = "outline: the labelled class; point: largest value of the map, green if it lies on that class, else red"


def read_dense_labels(rows: datasets.Dataset, args: DataArguments, count: int) -> list[tuple] | None:
    """Ids and scores of the label maps of the first rows; `None` where evaluation data has none, or not for all of them."""
    try:
        if not args.use_token_labels or not has_dense_columns(rows, args.dense_columns):
            return None
        columns = (args.image_column_name, args.label_column_name, *args.dense_columns)
        samples = TokenLabelDataset(rows, lambda image: {}, *columns)
        return [samples.label_map(index) for index in range(count)]
    except ValueError:  # the figure goes without them; training and evaluation never needed them
        return None


def draw_class_maps(
    trainer: TokenLabelTrainer, args: DataArguments, rows: datasets.Dataset, count: int, localization: Localization
) -> ClassMaps:
    """Where the labelled class of the first rows is, and where patch predictions and attention see it; their titles say how often that is
    right in all images that were measured."""
    columns = (args.image_column_name, args.label_column_name, find_mask_column(rows, args.mask_column_name))
    table = rows.select(range(count)).select_columns(list(columns)).with_format("arrow")[:]
    labels = table[columns[1]].to_pylist()
    transform = trainer.eval_dataset.transform
    pixel_values, masks = read_masked_images(table, *columns[::2], transform.model_input, 0)
    maps = trained_maps(trainer, pixel_values, torch.tensor(labels))
    titled, peaks = {}, {}
    for name, values in maps.items():
        title = f"{FIGURE_TITLES[name]}\n(on it: {100 * localization.scores[name][0]:.0f} %)"
        titled[title] = values.numpy()
        peaks[title] = [
            np.unravel_index(enlarged(values[index : index + 1], mask.shape).argmax(), mask.shape)
            for index, mask in enumerate(masks)
        ]
    note = f"{NOTE}; per cent: of {localization.num_images:,} evaluation images"
    return ClassMaps([(mask == label).numpy() for mask, label in zip(masks, labels)], titled, peaks, note)


@torch.no_grad()
def draw_predictions(
    trainer: TokenLabelTrainer,
    data_args: DataArguments,
    eval_rows: datasets.Dataset,
    path: Path | None = None,
    num_images: int = NUM_IMAGES,
    localization: Localization | None = None,
) -> str:
    """Writes the figure of the first evaluation rows, as the model sees them, to `path` (default: `predictions.png` in the output
    folder), and returns its name.

    All processes must call it, because a sharded model needs all of them; the main process writes.

    Args:
        localization: What was measured of its maps of the labelled class, which are drawn too; `None` leaves them out.
    """
    model, config, samples = trainer.model.eval(), trainer.model.config, trainer.eval_dataset
    path = path or Path(trainer.args.output_dir) / FIGURE
    count = min(num_images, len(samples))
    batch = finish_images(TokenLabelCollator(trainer.grid_size)(samples.__getitems__(list(range(count)))))
    pixel_values = batch["pixel_values"]
    output = model(pixel_values.to(model.device))
    class_maps = localization and draw_class_maps(trainer, data_args, eval_rows, count, localization)
    if not trainer.is_world_process_zero():
        return path.name
    processor = trainer.processing_class
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    arrays = (255 * (pixel_values * std + mean)).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    save_prediction_figure(
        path,
        [Image.fromarray(array) for array in arrays],
        samples.labels(count),
        logits=output.logits.cpu(),
        patch_logits=output.patch_logits.cpu(),
        grid_size=trainer.grid_size,
        class_names=shown_names([config.id2label[index] for index in range(config.num_labels)]),
        label_maps=read_dense_labels(eval_rows, data_args, count),
        class_maps=class_maps,
    )
    return path.name
