"""Classifiers of transformers and timm are loaded for export and exported as LV-ViT is."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from transformers import (
    BitImageProcessor,
    DetrConfig,
    MobileViTImageProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTModel,
)

from modeling_lvvit.backbones.image_preparation import read_preparation
from modeling_lvvit.backbones.image_processors import Resizing
from modeling_lvvit.backbones.patch_head import add_patch_head, get_patch_head
from modeling_lvvit.export import export_onnx, export_program
from modeling_lvvit.export.folder import ExportSettings, export_folder
from modeling_lvvit.export.loading import load
from modeling_lvvit.export.verification import compare, onnx_runner
from modeling_lvvit.variants import evaluation_image_processor
from support.classifiers import SIZE, transformers_model
from support.models import NUM_CLASSES


PROCESSOR = evaluation_image_processor(SIZE, 0.9)
NAMES = tuple(f"kind {index}" for index in range(NUM_CLASSES))
WITH_HEAD = ["logits", "cls_logits", "patch_logits"]


def save(model: nn.Module, folder: Path, processor=PROCESSOR) -> str:
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


def timm_in_transformers(name: str, **model_args) -> TimmWrapperForImageClassification:
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=name, num_labels=NUM_CLASSES, model_args=model_args or None)
    return TimmWrapperForImageClassification(config)


def with_patch_head(model: nn.Module) -> nn.Module:
    """One whose weights show in all digits."""
    model = add_patch_head(model, SIZE).eval().requires_grad_(False)
    get_patch_head(model)[1].weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def save_timm_folder(folder: Path, **settings) -> str:
    """As `timm.models.push_to_hf_hub` leaves it."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=NUM_CLASSES, img_size=64)
    config = {"num_classes": NUM_CLASSES, "label_names": list(NAMES), "model_args": {"img_size": 64}, **settings}
    save_for_hf(model, folder, config)
    return str(folder)


@pytest.mark.parametrize(
    "make",
    [lambda: transformers_model("vit"), lambda: timm_in_transformers("test_vit", img_size=64)],
    ids=["transformers", "timm"],
)
def test_patch_head_is_restored(make, tmp_path):
    model = with_patch_head(make())
    found = load(save(model, tmp_path / "model"))
    assert (found.class_names, found.image_size, found.kind, found.is_multi_label) == (
        NAMES,
        SIZE,
        "classifier",
        False,
    )
    assert found.preparation.resizing == Resizing(71, None, SIZE)
    images = torch.randn(2, 3, *SIZE)
    expected, outputs = model(images), found.model(images)
    assert all(torch.equal(outputs[name], expected[name]) for name in WITH_HEAD)
    plain = load(save(make(), tmp_path / "plain")).model
    assert not hasattr(plain, "feature_hook") and not any(weight.requires_grad for weight in plain.parameters())


def test_several_classes_of_an_image(tmp_path):
    model = transformers_model("resnet")
    model.config.problem_type = "multi_label_classification"
    assert load(save(model, tmp_path / "model")).is_multi_label


def test_models_are_resized_to_their_image_processor(tmp_path):
    wide = evaluation_image_processor((32, 96), 1.0)
    found = load(save(timm_in_transformers("test_vit", img_size=64), tmp_path / "model", wide))
    assert found.image_size == (32, 96) and found.model(torch.zeros(1, 3, 32, 96)).logits.shape == (1, NUM_CLASSES)


def test_timm_folder_is_prepared_as_published(tmp_path):
    cfg = {"input_size": (3, 64, 64), "crop_pct": 0.95, "test_crop_pct": 1.0, "interpolation": "bilinear"}
    found = load(save_timm_folder(tmp_path / "model", pretrained_cfg=cfg))
    assert isinstance(found.processor, TimmWrapperImageProcessor)
    assert found.class_names == NAMES and found.image_size == SIZE
    assert found.preparation.resizing.size == 64 and found.preparation.resample == 2


def test_other_models_are_refused(tmp_path):
    several = BitImageProcessor(size={"shortest_edge": 64}, do_center_crop=False)
    other_head = with_patch_head(transformers_model("vit"))
    other_head.patch_head = nn.Sequential(nn.Identity(), nn.Linear(32, NUM_CLASSES + 1))
    mask = SegformerForSemanticSegmentation(
        SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    )
    damaged = transformers_model("resnet")
    nn.init.constant_(damaged.classifier[1].weight, torch.nan)
    for name, model, processor, reason in (
        ("mask", mask, PROCESSOR, "mask cannot be exported: it is no trained image classifier, its weights lack"),
        ("several", transformers_model("vit"), several, "gives images of several sizes, and the file takes one"),
        ("bgr", transformers_model("resnet"), MobileViTImageProcessor(), "exchanges red and blue"),
        ("bare", transformers_model("resnet"), None, "bare has no preprocessor_config.json"),
        ("headless", ViTModel(transformers_model("vit").config), PROCESSOR, "no trained image classifier"),
        ("other_head", other_head, PROCESSOR, "its patch head has another shape"),
        ("damaged", damaged, PROCESSOR, "damaged cannot be exported: the weights hold NaN"),
    ):
        with pytest.raises(ValueError, match=reason):
            load(save(model, tmp_path / name, processor))
    DetrConfig().save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match="detector is a 'detr' model; LVViTForImageClassification and"):
        load(str(tmp_path / "detector"))
    with pytest.raises(ValueError, match="border cannot be exported: timm prepares images .* 'border'"):
        load(save_timm_folder(tmp_path / "border", pretrained_cfg={"crop_mode": "border"}))
    # whose layers mix the cells of one size
    mixer = timm_in_transformers("mixer_s32_224", img_size=64)
    with pytest.raises(ValueError, match="it does not take images of 96 x 96 pixels, which its image processor gives"):
        load(save(mixer, tmp_path / "mixer", evaluation_image_processor((96, 96), 1.0)))


@pytest.mark.parametrize("head", [False, True])
def test_program_of_a_classifier(head):
    """For any batch size and the one image size; the hook of the patch head keeps nothing of the tracing."""
    model = transformers_model("vit").eval()
    model = with_patch_head(model) if head else model
    run = export_program(model).module()
    assert list(run(torch.zeros(1, 3, *SIZE))) == (WITH_HEAD if head else ["logits"])
    agreement = compare(run, model, torch.float32)
    assert agreement.is_near and agreement.sizes == (SIZE,) and agreement.same_class == 1
    with pytest.raises((AssertionError, RuntimeError)):
        run(torch.zeros(1, 3, 64, 80))
    if head:
        assert model.feature_hook.features is None and not model.feature_hook.is_open


def test_models_without_a_size_need_one():
    with pytest.raises(ValueError, match="ResNetForImageClassification does not say .*; give `image_size`"):
        export_program(transformers_model("resnet"))
    program = export_program(transformers_model("resnet").eval(), image_size=(32, 48))
    assert program.module()(torch.zeros(3, 3, 32, 48))["logits"].shape == (3, NUM_CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "timm/test_convnext", "timm/test_vit"])
def test_onnx_file_of_a_classifier(name, dtype, tmp_path):
    onnx = pytest.importorskip("onnx")
    library, _, architecture = name.rpartition("/")
    sized = {"img_size": 64} if architecture == "test_vit" else {}
    model = timm_in_transformers(architecture, **sized) if library else transformers_model(name)
    model = with_patch_head(model.eval())
    export_onnx(model, tmp_path / "model.onnx", dtype)
    agreement = compare(onnx_runner(tmp_path / "model.onnx"), model, dtype)
    assert agreement.is_near and not agreement.not_finite
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [output.name for output in graph.output] == WITH_HEAD
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, *SIZE] and graph.output[2].type.tensor_type.shape.dim[1].dim_value > 3
    with pytest.raises(Exception, match="Got: 48"):
        onnx_runner(tmp_path / "model.onnx")(torch.zeros(1, 3, 64, 48))


@pytest.mark.slow
def test_folder_of_a_timm_network(tmp_path):
    """One that is not wrapped in a model of transformers: class names and preparation are there with and without a graph that prepares."""
    name = save_timm_folder(tmp_path / "model", pretrained_cfg={"input_size": (3, 64, 64), "crop_pct": 0.9})
    for settings in (ExportSettings(), ExportSettings(prepare=False), ExportSettings(file_format="torch")):
        out = tmp_path / f"{settings.file_format} {settings.prepare}"
        (file,) = export_folder(name, out, settings)
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        assert file.agreement.is_near and file.agreement.same_class == 1
        assert tuple(config.get("label_names", list(config.get("id2label", {}).values()))) == NAMES
        if settings.file_format == "torch" or not settings.prepare:
            found = TimmWrapperImageProcessor.from_pretrained(out)
            assert read_preparation(found) == load(name).preparation


@pytest.mark.slow
def test_folder_says_the_grid_of_patch_logits(tmp_path):
    model = with_patch_head(timm_in_transformers("test_convnext"))
    export_folder(save(model, tmp_path / "model"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["patch_grid_size"] == [2, 2] and config["image_size"] == [64, 64]
    image = torch.full((1, 3, 80, 100), 200.0)
    outputs = onnx_runner(tmp_path / "out" / "onnx" / "model.onnx")(image)
    assert outputs["patch_logits"].shape == (1, 4, NUM_CLASSES)
    prepared = PROCESSOR(image.byte()[0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(outputs["patch_logits"], model(prepared).patch_logits, atol=1e-4, rtol=1e-4)
