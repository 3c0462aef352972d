"""What a training run has learned of places: how often patch predictions and attention find the labelled class, measured on evaluation
images with masks."""

from contextlib import suppress
from dataclasses import dataclass

import datasets
import torch
from transformers.utils import logging

from ..backbones.image_processors import read_settings
from ..cli.data_arguments import DataArguments
from ..data.image_dataset import with_image_column
from ..data.splits import take_subset
from ..token_labeling import TokenLabelTrainer
from .localization import PATCHES, TITLES, LocalizationTotals, check_view, class_shares, read_masked_images
from .relevance import relevance_maps


logger = logging.get_logger(__name__)
MASK_COLUMN = "mask"
MAX_IMAGES = 500  # that are measured: a share of them is known to 2 % (standard error)
BATCH_SIZE = 50
ATTENTION = "attention"
FIGURE_TITLES = {PATCHES: "patches, labelled class", ATTENTION: "class-token attention"}


@dataclass(frozen=True)
class Localization:
    """How well maps find the labelled class.

    Args:
        scores: Pointing accuracy and mean overlap (intersection over union), in [0, 1], of `PATCHES` and `ATTENTION`, as far as the model
            has them, and of chance.
        num_images: Number of images.
    """

    scores: dict[str, tuple[float, float]]
    num_images: int

    def metrics(self) -> dict[str, float]:
        """As the metrics file has them."""
        parts = {
            f"eval_{name}_{part}": value
            for name, scores in self.scores.items()
            for part, value in zip(("pointing", "overlap"), scores)
        }
        return {"eval_localization_samples": self.num_images, **parts}

    def in_words(self) -> tuple[int, list[tuple[str, str, str]]]:
        """Number of images; title, pointing accuracy and overlap of each map."""
        rows = [(TITLES[name], *(f"{100 * score:.1f} %" for score in scores)) for name, scores in self.scores.items()]
        return self.num_images, rows

    def describe(self) -> str:
        """Lines for the terminal."""
        head = f"the labelled class in {self.num_images:,} images with masks"
        rows = [
            (head, "pointed at", "overlap (IoU)"),
            *((f"  {name}", *scores) for name, *scores in self.in_words()[1]),
        ]
        return "\n".join(f"{name:<{len(head)}}{pointing:>14}{overlap:>16}" for name, pointing, overlap in rows)


def find_mask_column(rows: datasets.Dataset, wanted: str | None) -> str | None:
    """Name of the column of masks: the wanted one, else `mask` where there is one; `None` without.

    Raises:
        ValueError: If the wanted one is not there, or holds no images.
    """
    name = wanted or MASK_COLUMN
    if isinstance(rows.features.get(name), datasets.Image):
        return name
    if wanted is not None:
        raise ValueError(
            f"`mask_column_name`: the evaluation data has no column {wanted!r} of images; it has {rows.column_names}."
        )
    return None


def trained_maps(
    trainer: TokenLabelTrainer, pixel_values: torch.Tensor, class_ids: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Maps of the model of a run for classes `(B,)`, `(B, rows, columns)` each: `PATCHES` if patch tokens were trained, and `ATTENTION`
    if its score comes from a class token.

    With sharded weights there is no attention, and all processes must call this.
    """
    model = trainer.model.eval()
    pixel_values, maps, patch_logits = pixel_values.to(model.device), {}, None
    if trainer.trains_patches:
        with torch.no_grad():
            patch_logits = model(pixel_values).patch_logits
        maps[PATCHES] = class_shares(patch_logits, class_ids, trainer.grid_size)
    if not trainer.is_fsdp_enabled:
        with suppress(ValueError):  # no transformer with a class token
            maps[ATTENTION] = relevance_maps(model, pixel_values, class_ids).attention
    return {name: values.cpu() for name, values in maps.items()}


def measure_localization(
    trainer: TokenLabelTrainer, args: DataArguments, rows: datasets.Dataset
) -> Localization | None:
    """Measures the maps of the model of a run on up to `MAX_IMAGES` evaluation rows, drawn over all classes.

    Returns:
        `None` where the rows have no masks, or where there is nothing to measure; with a warning if that is because of the masks. In
        processes that are not needed `None` too.
    """
    column = find_mask_column(rows, args.mask_column_name)
    if column is None or trainer.is_multi_label or not (trainer.is_world_process_zero() or trainer.is_fsdp_enabled):
        return None
    try:
        return _measure(trainer, args, rows, column)
    except ValueError as error:
        logger.warning("Where patch predictions point was not measured. %s", error)
        return None


def _measure(
    trainer: TokenLabelTrainer, args: DataArguments, rows: datasets.Dataset, column: str
) -> Localization | None:
    check_view(read_settings(trainer.processing_class).view, "The model")
    columns = [args.image_column_name, args.label_column_name, column]
    rows = with_image_column(take_subset(rows, MAX_IMAGES, args.label_column_name), args.image_column_name)
    rows = rows.select_columns(columns).with_format("arrow")
    totals, transform = LocalizationTotals(), trainer.eval_dataset.transform
    for start in range(0, len(rows), BATCH_SIZE):
        table = rows[start : start + BATCH_SIZE]
        labels = table[args.label_column_name].to_pylist()
        pixel_values, masks = read_masked_images(table, args.image_column_name, column, transform.model_input, start)
        maps = trained_maps(trainer, pixel_values, torch.tensor(labels))
        if not maps:
            return None
        totals.add(maps, masks, labels)
    is_doubtful = args.mask_column_name is None and 2 * totals.num_images < len(rows)
    if is_doubtful or not totals.num_images:
        raise ValueError(
            f"In {totals.num_images} of {len(rows)} images column {column!r} has pixels of the label of the image. If it holds ids of "
            f"column {args.label_column_name!r}, give `mask_column_name`."
        )
    return Localization(totals.means(), totals.num_images)
