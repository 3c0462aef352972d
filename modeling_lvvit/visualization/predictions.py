"""A figure of the predictions of a trained model."""

from pathlib import Path

import datasets
import torch
from PIL import Image

from ..cli.open_data import DataArguments, has_dense_columns
from ..data.class_matching import shown_names
from ..token_labeling import TokenLabelDataset, TokenLabelTrainer
from . import save_prediction_figure


FIGURE, NUM_IMAGES = "predictions.png", 10


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


@torch.no_grad()
def draw_predictions(
    trainer: TokenLabelTrainer,
    data_args: DataArguments,
    eval_rows: datasets.Dataset,
    path: Path | None = None,
    num_images: int = NUM_IMAGES,
) -> str:
    """Writes the figure of the first evaluation rows, as the model sees them, to `path` (default: `predictions.png` in the output
    folder), and returns its name.

    All processes must call it, because a sharded model needs all of them; the main process writes.
    """
    model, config, samples = trainer.model.eval(), trainer.model.config, trainer.eval_dataset
    path = path or Path(trainer.args.output_dir) / FIGURE
    count = min(num_images, len(samples))
    pixel_values = torch.stack([sample["pixel_values"] for sample in samples.__getitems__(list(range(count)))])
    output = model(pixel_values.to(model.device))
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
    )
    return path.name
