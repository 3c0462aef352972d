"""Models other than LV-ViT in the training program: from random weights, from checkpoints, with an annotator."""

import json
import shutil
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    LevitImageProcessorPil,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.utils import logging as transformers_logging

import train_tl
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.backbones.image_processors import checked_settings, read_settings
from modeling_lvvit.backbones.patch_head import get_patch_head
from modeling_lvvit.cli.build_model import build_model, model_image_size
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.cli.parser import parse
from modeling_lvvit.token_labeling import add_patch_head
from modeling_lvvit.variants import evaluation_image_processor
from support.classifiers import VIT, transformers_model
from support.models import NUM_CLASSES


NAMES = [f"class {index}" for index in range(NUM_CLASSES)]
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
SMALL_RESNET = '{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A ViT of 64 x 64 pixels with a patch head and its own normalization."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = add_patch_head(transformers_model("vit"), (64, 64))
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(folder)
    evaluation_image_processor((64, 64), 1.0, MEAN, STD).save_pretrained(folder)
    return str(folder)


def build(names: list[str] = NAMES, **options):
    return build_model(ModelArguments(**options), names)


@pytest.mark.parametrize(
    ("architecture", "overrides", "kind"),
    [
        ("resnet", json.loads(SMALL_RESNET), "ResNetForImageClassification"),
        ("timm/test_vit", None, "TimmWrapperForImageClassification"),
        ("timm/test_convnext", {"drop_path_rate": 0.1}, "TimmWrapperForImageClassification"),
        ("deit", {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}, "DeiTForImageClassification"),
        (
            "pvt_v2",
            {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4},
            "PvtV2ForImageClassification",
        ),
    ],
)
def test_architectures_from_random_weights(architecture, overrides, kind, tmp_path):
    """They have the classes of the data and the asked-for size, and are built again from what is saved."""
    model, processor = build(architecture=architecture, config_overrides=overrides, image_size=[96, 64])
    assert type(model).__name__ == kind
    assert model_image_size(model) == (96, 64) == (processor.crop_size["height"], processor.crop_size["width"])
    assert list(model.config.id2label.values()) == NAMES
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 96, 64)
    options = model.feature_hook.forward_options
    with torch.no_grad():
        again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()(pixel_values, **options)
        torch.testing.assert_close(again.logits, model.eval()(pixel_values).logits)
    rows, columns = model.patch_grid_size
    assert rows * 2 == columns * 3


def test_sizes_are_given_in_the_form_that_an_architecture_takes():
    """A list for Hiera; in the part of a CLIP that describes its image model."""
    small = {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}
    model, _ = build(architecture="hiera", config_overrides=small, image_size=[64])
    assert model.config.image_size == [64, 64] and model.patch_grid_size == (2, 2)
    fields = {"vision_config": {**VIT, "image_size": 224}, "text_config": {"hidden_size": 16, "num_hidden_layers": 1}}
    model, _ = build(architecture="clip", config_overrides=fields, image_size=[96])
    assert model.config.vision_config.image_size == 96 and model.patch_grid_size == (6, 6)


def test_checkpoint_keeps_weights_patch_head_and_normalization(checkpoint):
    model, processor = build(model_name_or_path=checkpoint)
    assert processor.image_mean == pytest.approx(MEAN) and processor.image_std == pytest.approx(STD)
    assert isinstance(processor, BitImageProcessor)
    saved = AutoModelForImageClassification.from_pretrained(checkpoint)
    assert torch.equal(model.vit.layernorm.weight, saved.vit.layernorm.weight)
    again, _ = build(model_name_or_path=checkpoint)
    assert torch.equal(get_patch_head(again)[1].weight, get_patch_head(model)[1].weight)


def test_other_classes_are_refused_or_make_new_heads(checkpoint):
    with pytest.raises(ValueError, match=f"has {NUM_CLASSES} classes, the data has 2.*`ignore_mismatched_sizes`"):
        build(["cat", "dog"], model_name_or_path=checkpoint)
    model, _ = build(["cat", "dog"], model_name_or_path=checkpoint, ignore_mismatched_sizes=True)
    with torch.no_grad():
        output = model.eval()(torch.randn(1, 3, 64, 64))
    assert output.logits.shape == (1, 2) and output.patch_logits.shape == (1, 16, 2)


def test_timm_checkpoint_gets_other_classes(tmp_path):
    model, processor = build(architecture="timm/test_vit", image_size=[64])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = build(["cat", "dog"], model_name_or_path=str(tmp_path), ignore_mismatched_sizes=True)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).patch_logits.shape == (1, 16, 2)
    model.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").id2label == {0: "cat", 1: "dog"}


def test_checkpoint_at_another_resolution(checkpoint, tmp_path):
    """The position table is resized once; the saved model takes images of the new size without options."""
    model, processor = build(model_name_or_path=checkpoint, image_size=[96, 64])
    assert model.patch_grid_size == (6, 4) and processor.crop_size["height"] == 96
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        output = model.eval()(torch.ones(1, 3, 96, 64))
        again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()(torch.ones(1, 3, 96, 64))
    assert output.patch_logits.shape == (1, 24, NUM_CLASSES)
    torch.testing.assert_close(again.logits, output.logits)
    assert processor.size["shortest_edge"] == 96  # the crop fraction of the checkpoint


def saved_with(processor, tmp_path, size: int = 64) -> str:
    config = AutoConfig.for_model("vit", architectures=[], num_labels=NUM_CLASSES, **{**VIT, "image_size": size})
    config.id2label = dict(enumerate(NAMES))
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_image_processor_of_a_checkpoint_stays(tmp_path):
    """This one squashes images with another filter, also at another size; a crop replaces it."""
    own = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD, resample=2)
    path = saved_with(own, tmp_path)
    _, processor = build(model_name_or_path=path)
    assert isinstance(processor, ViTImageProcessor) and processor.to_dict() == own.to_dict()
    model, processor = build(model_name_or_path=path, image_size=[96, 64])
    assert not processor.do_center_crop and processor.resample == 2
    assert (processor.size["height"], processor.size["width"]) == (96, 64) == model_image_size(model)
    _, processor = build(model_name_or_path=path, crop_pct=0.8)
    assert isinstance(processor, BitImageProcessor) and processor.size["shortest_edge"] == 80
    assert processor.image_mean == pytest.approx(MEAN) and processor.resample == 2


def test_processors_that_make_images_of_several_sizes_are_replaced(tmp_path):
    own = BitImageProcessor(size={"shortest_edge": 64}, do_center_crop=False, image_mean=MEAN, image_std=STD)
    _, processor = build(model_name_or_path=saved_with(own, tmp_path), image_size=[64])
    assert processor.do_center_crop and processor.crop_size["height"] == 64
    assert processor.image_std == pytest.approx(STD)


def test_models_are_made_for_the_size_of_their_processor_or_their_own(tmp_path, caplog):
    """A processor that does not resize has none; the model has."""
    own = ViTImageProcessor(do_resize=False, image_mean=MEAN, image_std=STD)
    model, processor = build(model_name_or_path=saved_with(own, tmp_path))
    assert model_image_size(model) == (64, 64) and processor.crop_size["height"] == 64


def test_squashed_and_cropped_images_stay_so_at_another_size(tmp_path):
    """DeiT: 256 x 256, of which 224 x 224 are kept; at 112 x 56 it is 128 x 64."""
    own = DeiTImageProcessor(image_mean=MEAN, image_std=STD)
    _, processor = build(model_name_or_path=saved_with(own, tmp_path, 224), image_size=[112, 56])
    assert (processor.size["height"], processor.size["width"]) == (128, 64) and processor.do_center_crop
    assert read_settings(processor).view == pytest.approx((0.875, 0.875), abs=0.01)


@pytest.mark.parametrize(
    ("own", "view"),
    [
        (ViTImageProcessor(do_normalize=False), (1.0, 1.0)),
        (ViTImageProcessor(do_normalize=False, image_mean=[0.5], image_std=None), (1.0, 1.0)),
        (EfficientNetImageProcessor(size={"height": 96, "width": 96}), (1.0, 1.0)),
        (LevitImageProcessor(), (0.625 * 0.875, 0.875)),
        (ConvNextImageProcessor(size={"shortest_edge": 384}), (1.0, 1.0)),
        (ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875), (0.625 * 0.875, 0.875)),
        (LevitImageProcessorPil(), (0.625 * 0.875, 0.875)),
        (PoolFormerImageProcessor(), (0.625 * 0.9, 0.9)),
        (EfficientNetImageProcessor(rescale_factor=1 / 127.5, rescale_offset=True, include_top=False), (1.0, 1.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rebuilt_processors_show_the_same_part_of_a_image(own, view, tmp_path):
    """Shares of the width and height of an image of 8:5."""
    assert read_settings(own).view == pytest.approx(view, abs=0.01)
    _, processor = build(model_name_or_path=saved_with(own, tmp_path), image_size=[112])
    assert read_settings(processor).view == pytest.approx(view, abs=0.02)
    pixels = [part(Image.new("RGB", (640, 400), (200, 100, 50)), return_tensors="pt") for part in (own, processor)]
    middle = [part["pixel_values"][0, :, 56, 56] for part in pixels]
    torch.testing.assert_close(*middle, atol=0.02, rtol=0)


def test_processors_that_exchange_colors_are_refused(tmp_path):
    own = MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="MobileViTImageProcessor exchanges red and blue"):
        build(model_name_or_path=saved_with(own, tmp_path))


def test_processors_that_normalize_in_another_way_than_they_say_are_refused():
    own = ViTImageProcessor(image_mean=MEAN, image_std=STD)
    assert checked_settings(own).image_mean == MEAN and checked_settings(own).image_std == STD
    own.rescale = own.rescale_and_normalize = lambda images, *settings: images / 100
    with pytest.raises(ValueError, match="ViTImageProcessor normalizes in another way than its settings say"):
        checked_settings(own)


def test_crop_and_filter_of_a_timm_checkpoint(tmp_path):
    config = TimmWrapperConfig(
        architecture="test_vit",
        num_labels=NUM_CLASSES,
        id2label=dict(enumerate(NAMES)),
        pretrained_cfg={"input_size": [3, 160, 160], "crop_pct": 0.8, "interpolation": "bilinear", "mean": MEAN, "std": STD},
    )  # fmt: skip
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path)
    model, processor = build(model_name_or_path=str(tmp_path), image_size=[80])
    assert processor.size["shortest_edge"] == 100 and processor.resample == 2
    assert processor.image_mean == pytest.approx(MEAN, abs=1e-3)
    assert model.patch_grid_size == (5, 5)


def test_timm_checkpoints_are_used_as_they_were_trained(tmp_path):
    """Where a configuration has timm's settings, which are those of the old size, the libraries make the processor of them."""
    settings = {"input_size": [3, 160, 160], "crop_pct": 0.8, "interpolation": "bilinear", "mean": MEAN, "std": STD}
    config = TimmWrapperConfig(
        architecture="test_vit", num_labels=NUM_CLASSES, id2label=dict(enumerate(NAMES)), pretrained_cfg=settings
    )
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "start")
    for part in build(model_name_or_path=str(tmp_path / "start"), image_size=[80]):
        part.save_pretrained(tmp_path / "end")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "end")
    assert isinstance(processor, BitImageProcessor) and processor.crop_size["height"] == 80
    assert len(pipeline("image-classification", str(tmp_path / "end"))(Image.new("RGB", (90, 70)), top_k=3)) == 3
    again, _ = build(model_name_or_path=str(tmp_path / "end"))
    assert model_image_size(again) == (80, 80)
    assert load_annotator(str(tmp_path / "end")).preprocessing.image_size == (80, 80)


def test_patch_heads_that_cannot_be_read_are_not_passed_over(checkpoint, tmp_path, caplog):
    """An annotator would label with random weights; a student starts from them, with a warning."""
    shutil.copytree(checkpoint, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    key = next(name for name in weights if name.endswith("patch_head.1.weight"))
    weights[key] = weights[key][:, :-1].contiguous()
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="its patch head has another shape"):
        load_annotator(str(tmp_path / "other"))
    logger = transformers_logging.get_logger("modeling_lvvit.cli.build_backbone")
    with mock.patch.object(logger, "warning") as warning:
        build(model_name_or_path=str(tmp_path / "other"))
    assert "patch head" in warning.call_args.args[0]


def test_configurations_without_class_names(checkpoint, tmp_path):
    """As transformers saves those of PVT."""
    shutil.copytree(checkpoint, tmp_path / "nameless")
    path = tmp_path / "nameless" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": None, "num_labels": NUM_CLASSES}))
    model, _ = build(model_name_or_path=str(tmp_path / "nameless"))
    assert list(model.config.id2label.values()) == NAMES


def test_only_one_source_of_the_model():
    with pytest.raises(ValueError, match="Give one of `variant`"):
        ModelArguments(variant="lvvit_s_224", architecture="resnet")


def test_another_architecture_starts_its_fields_anew():
    """A recipe for a ViT does not inherit the stem of the LV-ViT that it is based on."""
    model_args, _, _ = parse(["architectures/vit"])
    assert "stem_hidden_size" not in model_args.config_overrides and model_args.config_overrides["patch_size"] == 8
    model_args, _, _ = parse(["--architecture", "resnet"])
    assert model_args.config_overrides is None and model_args.image_size is None
    model_args, _, _ = parse(["architectures/vit", "--architecture", "resnet"])
    assert model_args.config_overrides is None


def train(folder, *arguments: str) -> None:
    options = {"max_steps": 2, "max_train_samples": 64, "max_eval_samples": 32, "image_size": 64, "report_to": "none"}
    options |= {"output_dir": folder, "disable_tqdm": "true", "eval_strategy": "no", "check_data": "false"}
    train_tl.main([*arguments, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])


@pytest.mark.slow
def test_program_trains_a_labeler_then_a_student_of_another_architecture(tmp_path, capsys):
    """Commands as in the README; the student is saved without its patch head on request."""
    train(tmp_path / "labeler", "--architecture", "timm/test_vit", "--patch_target", "image", "--cls_target", "label")
    assert "self-emerging token labels" in capsys.readouterr().out
    arguments = ["--architecture", "resnet", "--config_overrides", SMALL_RESNET, "--save_patch_head", "false"]
    arguments += ["--annotator", str(tmp_path / "labeler"), "--annotator_sampling", "hard"]
    train(tmp_path / "student", *arguments, "--annotator_dtype", "float16", "--bf16", "true", "--streaming", "true")
    printed = capsys.readouterr().out
    assert "labels by" in printed and "ms an image here" in printed
    assert "crops of a stream are not compared with human labels" in printed
    assert AutoImageProcessor.from_pretrained(tmp_path / "student").crop_size["height"] == 64
    _, loading = AutoModelForImageClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["missing_keys"]
    card = (tmp_path / "student" / "README.md").read_text()
    assert "resnet image classifier" in card and "Token labels by `" in card and "trust_remote_code" not in card
    assert str(tmp_path / "labeler") not in card and f'model="{tmp_path / "student"}"' in card
    assert (tmp_path / "student" / "predictions.png").stat().st_size > 1000
