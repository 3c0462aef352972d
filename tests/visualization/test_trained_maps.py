"""What a training run says of places at its end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset, TokenLabelTrainer
from modeling_lvvit.variants import evaluation_image_processor
from modeling_lvvit.visualization.predictions import draw_predictions
from modeling_lvvit.visualization.trained_maps import find_mask_column, measure_localization
from support.masked_images import masked, quarter
from support.models import NUM_CLASSES, tiny_config
from support.trainers import arguments


class UpperHalf(nn.Module):
    """Sees every class in the upper half of images, most of all in the third of four columns; has no class token."""

    device = torch.device("cpu")

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        strength = torch.tensor([[2.0, 2.0, 3.0, 2.0]] * 2 + [[1.0] * 4] * 2).flatten()  # 4 x 4 patches
        # all classes but the last, which no image has here, share what a patch gives them
        logits = torch.zeros(len(pixel_values), 16, NUM_CLASSES + 1)
        logits[..., :NUM_CLASSES] = strength[None, :, None]
        return SimpleNamespace(logits=logits.mean(dim=1), patch_logits=logits)


def run_of(model: nn.Module, rows, crop_pct: float = 1.0, **settings) -> SimpleNamespace:
    """What is used of a Trainer."""
    processor = evaluation_image_processor((32, 32), crop_pct)
    return SimpleNamespace(
        model=model,
        processing_class=processor,
        eval_dataset=TokenLabelDataset(rows, ImageProcessorTransform(processor)),
        grid_size=(4, 4),
        trains_patches=True,
        is_fsdp_enabled=False,
        is_multi_label=False,
        is_world_process_zero=lambda: True,
        **settings,
    )


def test_patch_predictions_are_compared_with_masks():
    """The mask is the upper left quarter; the strongest column of the model lies in the upper right one."""
    rows = masked(quarter)
    found = measure_localization(run_of(UpperHalf(), rows), DataArguments(), rows)
    assert found.num_images == 5 and list(found.scores) == ["patches", "chance"]
    assert found.scores["chance"] == pytest.approx((1 / 4, 1 / 7))
    assert found.scores["patches"][0] == 0.0 and 0 < found.scores["patches"][1] < 0.5
    metrics = found.metrics()
    assert metrics["eval_localization_samples"] == 5 and metrics["eval_chance_pointing"] == pytest.approx(0.25)
    assert found.in_words()[1][1] == ("chance", "25.0 %", "14.3 %")
    lines = found.describe().splitlines()
    assert len({len(line) for line in lines}) == 1 and "5 images" in lines[0] and "patch predictions" in lines[1]


def test_masks_that_are_something_else_are_not_measured(caplog):
    """Masks of 0 and 1 are no class ids of seven classes; some images have none."""
    foreground = masked(lambda label: None if label == 0 else np.ones((40, 40), dtype=np.uint8))
    run = run_of(UpperHalf(), foreground)
    assert measure_localization(run, DataArguments(), foreground) is None
    assert "of 5 images column 'mask' has pixels of the label" in caplog.text
    label = foreground["label"][0]
    some = masked(lambda other: quarter(label) if other == label else None)
    assert measure_localization(run, DataArguments(), some) is None
    wanted = DataArguments(mask_column_name="mask")
    assert measure_localization(run, wanted, some).num_images == list(some["label"]).count(label) < 3


@pytest.mark.parametrize(("crop_pct", "size", "message"), [(0.8, 40, "a center crop"), (1.0, 36, "one shape")])
def test_masks_that_do_not_fit_the_images_end_no_run(crop_pct, size, message, caplog):
    rows = masked(quarter, size)
    assert measure_localization(run_of(UpperHalf(), rows, crop_pct), DataArguments(), rows) is None
    assert "Where patch predictions point was not measured" in caplog.text and message in caplog.text


def test_column_of_masks():
    rows = masked(quarter)
    assert find_mask_column(rows, None) == "mask" and find_mask_column(rows, "image") == "image"
    without = rows.rename_column("mask", "segmentation")
    assert find_mask_column(without, None) is None and find_mask_column(without, "segmentation") == "segmentation"
    assert measure_localization(run_of(UpperHalf(), without), DataArguments(), without) is None
    with pytest.raises(ValueError, match="`mask_column_name`.*no column 'masks' of images"):
        find_mask_column(rows, "masks")
    with pytest.raises(ValueError, match="no column 'label' of images"):
        find_mask_column(rows, "label")


@pytest.mark.parametrize("trains_patches", [True, False])
def test_attention_is_measured_and_the_figure_shows_the_maps(trains_patches, tmp_path):
    rows = masked(quarter)
    torch.manual_seed(0)
    model = LVViTForImageClassification(tiny_config(image_size=32))
    options = {"evaluation": rows, "processor": evaluation_image_processor((32, 32), 1.0)}
    evaluation = TokenLabelDataset(rows, ImageProcessorTransform(options["processor"]))
    trainer = TokenLabelTrainer(
        model, arguments(tmp_path), eval_dataset=evaluation, processing_class=options["processor"]
    )
    trainer.args.patch_target = "image" if trains_patches else "dense"  # patch tokens that learn without label maps
    found = measure_localization(trainer, DataArguments(), rows)
    assert list(found.scores) == [*(["patches"] if trains_patches else []), "attention", "chance"]
    draw_predictions(trainer, DataArguments(), rows, tmp_path / "without.png")
    draw_predictions(trainer, DataArguments(), rows, tmp_path / "with.png", localization=found)
    heights = [Image.open(tmp_path / name).height for name in ("without.png", "with.png")]
    assert heights[1] > heights[0] + 100 * (1 + trains_patches)
