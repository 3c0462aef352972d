"""`--variant auto` and `--preset own_images`: what they choose, what they say, and that every choice can be overridden."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import train_tl
from modeling_lvvit import LVViTConfig, LVViTForImageClassification
from modeling_lvvit.cli.build_model import choose_for_data
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.open_data import OpenedData
from modeling_lvvit.cli.parser import RECIPES, describe_preset, parse
from modeling_lvvit.data.image_dataset import read_image_sizes
from modeling_lvvit.token_labeling import TokenLabelTrainingArguments
from modeling_lvvit.variants import AUTO_SIZES, choose_variant


GIB = 2**30
GPU = 80 * GIB
OWN = ["--dataset_name", "pets", "--preset", "own_images"]


def png(height: int, width: int, **options) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "PNG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def image_rows(*values: dict) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    labels = [index % 2 for index in range(len(values))]
    return datasets.Dataset.from_dict({"image": list(values), "label": labels}, features=features)


@pytest.mark.parametrize(
    ("side", "memory", "image_size", "patch_size"),
    [
        (375, GPU, 224, 16),
        (375, None, 96, 8),
        (183, GPU, 176, 16),  # 11 patches; nothing is enlarged
        (100, GPU, 96, 8),
        (50, GPU, 48, 4),
        (32, None, 32, 4),
        (20, GPU, 32, 4),
    ],
)
def test_auto_input_is_a_multiple_of_the_patch_and_not_enlarged(side, memory, image_size, patch_size):
    choice = choose_variant(5_000, 10, side, memory, batch_size=32)
    assert (choice.image_size, choice.settings["patch_size"]) == ((image_size, image_size), patch_size)
    LVViTConfig(image_size=choice.image_size, **choice.settings)


@pytest.mark.parametrize(
    ("num_images", "memory", "batch_size", "width"),
    [
        (500, GPU, 32, 192),
        (19_999, GPU, 32, 192),
        (20_000, GPU, 32, 240),
        (200_000, GPU, 32, 384),
        (10_000_000, GPU, 32, 384),  # larger ones are never chosen
        (200_000, 8 * GIB, 64, 240),  # S needs 5.7 GiB of the 4.8
        (200_000, GIB, 64, 96),
        (200_000, None, 32, 96),
    ],
)
def test_auto_size_follows_images_and_memory(num_images, memory, batch_size, width):
    assert choose_variant(num_images, 10, 300, memory, batch_size).settings["hidden_size"] == width


@pytest.mark.parametrize(
    ("image_size", "patch_size", "chosen"),
    [((64, 96), None, 8), ((60, 60), None, 4), ((224, 168), None, 8), ((224, 224), 8, 8), (None, 12, 12)],
)
def test_auto_keeps_what_the_user_fixed(image_size, patch_size, chosen):
    choice = choose_variant(5_000, 10, 100, GPU, 32, image_size, patch_size)
    assert choice.image_size == (image_size or (96, 96))  # 8 patches of 12
    assert choice.settings["patch_size"] == chosen


def test_parameters_of_the_auto_sizes_are_as_stated():
    for size in AUTO_SIZES:
        with torch.device("meta"):
            model = LVViTForImageClassification(LVViTConfig(**size.settings, num_labels=2))
        assert model.num_parameters() == pytest.approx(size.num_parameters, rel=0.1), size.name


def test_sizes_are_read_from_headers_and_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    rows = image_rows(png(30, 50), png(40, 60, exif=exif), {"bytes": b"no image", "path": None}, png(8, 9))
    assert read_image_sizes(rows, "image").tolist() == [[30, 50], [60, 40], [8, 9]]
    assert read_image_sizes(rows, "image", count=2).tolist() == [[30, 50], [8, 9]]  # the first and the last


def test_auto_takes_the_median_of_the_shorter_sides(tmp_path):
    rows = image_rows(png(30, 50), png(40, 120), png(500, 60))
    given = ModelArguments(variant="auto", config_overrides={"hidden_size": 48, "num_attention_heads": 3})
    chosen, reason = choose_for_data(given, rows, "image", 2, TokenLabelTrainingArguments(str(tmp_path), use_cpu=True))
    assert (chosen.variant, chosen.image_size) == (None, [40, 40])
    assert chosen.config_overrides["patch_size"] == 4
    assert chosen.config_overrides["hidden_size"] == 48  # the user's
    assert chosen.config_overrides["num_hidden_layers"] == AUTO_SIZES[0].settings["num_hidden_layers"]
    assert "3 training images of 2 classes, shorter side typically 40 pixels" in reason
    with pytest.raises(ValueError, match="stream does not allow"):
        choose_for_data(given, rows.to_iterable_dataset(), "image", 2, TokenLabelTrainingArguments(str(tmp_path)))


def test_a_preset_is_a_recipe_of_this_name():
    by_name = parse(["own_images", "--dataset_name", "pets"])
    assert by_name == parse(OWN)
    model_args, data_args, training_args = by_name
    assert (model_args.preset, model_args.variant, data_args.rand_augment) == ("own_images", "auto", "none")
    assert training_args.min_steps > 0


def test_options_go_before_the_preset():
    model_args, data_args, training_args = parse(
        [*OWN, "--crop_scale_min", "0.5", "--num_train_epochs", "7", "--variant", "lvvit_t_224"]
    )
    assert (model_args.variant, data_args.crop_scale_min, data_args.rand_augment) == ("lvvit_t_224", 0.5, "none")
    assert (training_args.num_train_epochs, training_args.min_steps) == (7, 0)  # exactly as many
    text = describe_preset(model_args, data_args, training_args)
    held, changed = text.split("; given otherwise: ")
    assert "rand_augment none" in held
    assert changed == "variant lvvit_t_224, crop_scale_min 0.5, num_train_epochs 7.0"


def test_recipes_go_before_the_preset(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("crop_scale_min: 0.7")
    assert parse([str(recipe), *OWN])[1].crop_scale_min == 0.7
    recipe.write_text("preset: own_images")
    with pytest.raises(ValueError, match="write `base`"):
        parse([str(recipe)])


def test_a_trained_model_or_another_architecture_replaces_what_is_for_new_ones():
    model_args, _, training_args = parse([*OWN, "--model_name_or_path", "org/model"])
    scratch = parse(OWN)[2]
    assert (model_args.variant, model_args.ignore_mismatched_sizes) == (None, True)
    assert training_args.learning_rate < scratch.learning_rate
    assert parse(["own_images", "--model_name_or_path", "org/model"])[2].min_steps == training_args.min_steps
    assert parse([*OWN, "--architecture", "resnet"])[0].variant is None
    assert (RECIPES / "own_images_fine_tuning.yaml").is_file()


@pytest.mark.parametrize(
    ("num_images", "epochs"), [(500, 250), (1_556, 82), (6_400, 60), (50_000, 60)]
)  # 16, 49, 200 and 1,563 steps an epoch
def test_few_images_get_more_epochs(num_images, epochs, tmp_path):
    args = TokenLabelTrainingArguments(
        str(tmp_path), num_train_epochs=60, min_steps=4_000, per_device_train_batch_size=32
    )
    assert args.lengthen(num_images) == (epochs > 60)
    assert args.num_train_epochs == epochs
    args = TokenLabelTrainingArguments(str(tmp_path), max_steps=3, min_steps=4_000)
    assert not args.lengthen(num_images)


def notes_on(num_images: int, *options: str) -> list[str]:
    model_args, data_args, training_args = parse(["--dataset_name", "pets", *options])
    rows = image_rows(*[png(64, 64)] * 2)
    rows = rows.select(np.arange(num_images) % 2)
    return train_tl.fit_options(model_args, data_args, training_args, OpenedData(rows, rows, "test"), 2)[1]


def test_small_datasets_with_the_published_augmentation_are_told_of_the_preset():
    (note,) = notes_on(40, "--variant", "lvvit_t_224")
    assert "--preset own_images" in note
    assert notes_on(50_000, "--variant", "lvvit_t_224") == []
    assert notes_on(40, "--variant", "lvvit_t_224", "--rand_augment", "none") == []
    assert notes_on(40, "--model_name_or_path", "org/model") == []
    preset, auto, epochs = notes_on(40, "--preset", "own_images")
    assert preset.startswith("preset own_images: ")
    assert auto.startswith("variant auto: ")
    assert epochs == "2000 epochs, for at least 4,000 steps"


def test_fewer_steps_than_the_preset_recommends_are_said():
    # 40 images are 2 steps of 32
    assert "14 of the 4,000 steps" in notes_on(40, "--preset", "own_images", "--num_train_epochs", "7")[-1]
    assert "9 of the 4,000 steps" in notes_on(40, "--preset", "own_images", "--max_steps", "9")[-1]
    assert "recommends" not in "".join(notes_on(40, "--preset", "own_images"))
