"""Models with NaN or infinite weights, and scores that are, are refused by name wherever models are loaded."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators.annotator import load_annotator
from modeling_lvvit.annotators.online import OnlineAnnotator
from modeling_lvvit.annotators.pipeline import ShardBuilder
from modeling_lvvit.backbones.loading import load_image_processor
from modeling_lvvit.cli.build_model import build_model
from modeling_lvvit.cli.model_arguments import ModelArguments
from modeling_lvvit.demo.segmentation import Segmenter
from modeling_lvvit.evaluate.classifier import InputOptions, load_classifier
from modeling_lvvit.export.folder import ExportSettings, export_folder
from modeling_lvvit.finite import NotFiniteError, check_scores, check_weights
from modeling_lvvit.hub.folders import check_model_folder
from modeling_lvvit.segmentation.arguments import SegmentationModelArguments
from modeling_lvvit.segmentation.build_model import build_segmenter, pretrained_config
from modeling_lvvit.token_labeling import add_patch_head
from modeling_lvvit.variants import evaluation_image_processor
from support.classifiers import transformers_model
from support.models import NUM_CLASSES, tiny_config
from support.segmentation_rows import NAMES, segmenter
from support.trainers import image_processor, trainer_for


CLASSES = [f"LABEL_{index}" for index in range(NUM_CLASSES)]


def write(model, folder, bad: str, value: float = math.nan) -> str:
    """Saves a model and spoils one value of the tensor whose name ends with `bad`."""
    model.save_pretrained(folder)
    evaluation_image_processor((32, 48), 0.9).save_pretrained(folder)
    (folder / "README.md").write_text("# Model\n")
    weights = load_file(folder / "model.safetensors")
    weights[next(name for name in sorted(weights) if name.endswith(bad))].view(-1)[1] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


LOADERS = {
    "train": lambda name: build_model(ModelArguments(model_name_or_path=name), CLASSES),
    "evaluate": lambda name: load_classifier(name, InputOptions()),
    "annotate": lambda name: load_annotator(name),
    "export": lambda name: export_folder(name, Path(f"{name} exported"), ExportSettings("torch")),
    "publish": lambda name: check_model_folder(Path(name)),
}


@pytest.mark.parametrize(("std", "is_right"), [(0.25, True), ([0.2, 0.3, 0.25], True), (0, False), (math.nan, False)])
def test_image_processors_give_finite_pixels(std, is_right, tmp_path):
    ViTImageProcessor(image_mean=0.5, image_std=std).save_pretrained(tmp_path)  # one number for all channels is legal
    with nullcontext() if is_right else pytest.raises(ValueError, match="which gives no finite pixels"):
        load_image_processor(str(tmp_path), {})


@pytest.mark.parametrize("bad", ["layers.1.mlp.fc1.bias", "norm2.running_var"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_program_refuses_bad_weights_by_name(loader, value, bad, tiny_model, tmp_path):
    name = write(tiny_model, tmp_path / "model", bad, value)
    with pytest.raises(ValueError, match=rf"the weights hold NaN or infinite values, in \S*{bad}: "):
        LOADERS[loader](name)
    assert not (tmp_path / "model exported").exists()


@pytest.mark.parametrize("bad", ["lvvit.layers.1.mlp.fc1.bias", "auxiliary_decoder.classifier.1.bias"])
def test_segmentation_refuses_them(bad, tmp_path):
    name = write(segmenter(), tmp_path / "model", bad)
    args = SegmentationModelArguments(model_name_or_path=name)
    with pytest.raises(ValueError, match="the weights hold NaN"):
        build_segmenter(args, pretrained_config(args), NAMES, 255)
    with pytest.raises(ValueError, match="the weights hold NaN"):
        Segmenter(name)
    with pytest.raises(ValueError, match="the weights hold NaN"):
        export_folder(name, tmp_path / "exported", ExportSettings("torch"))


def test_a_bad_patch_head_is_refused_where_it_is_used(tmp_path):
    """Plain loading leaves it out: evaluation does not need it."""
    model = add_patch_head(transformers_model("vit"), (64, 64))
    model.config.id2label = dict(enumerate(CLASSES))
    name = write(model, tmp_path / "model", "patch_head.1.bias")
    evaluation_image_processor((64, 64), 0.9).save_pretrained(name)
    for loader in ("train", "annotate"):
        with pytest.raises(ValueError, match="the weights hold NaN or infinite values, in patch_head.1.bias"):
            LOADERS[loader](name)
    assert load_classifier(name, InputOptions()).facts["parameters"] > 0


def test_models_of_timm_are_refused(tmp_path):
    model = timm.create_model("resnet10t", num_classes=NUM_CLASSES)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["bn1.running_var"][0] = math.inf  # the scores stay finite: labels would be plausible and wrong
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for loader in ("evaluate", "annotate"):
        with pytest.raises(ValueError, match="in bn1.running_var"):
            LOADERS[loader](str(tmp_path))


def test_processors_that_give_no_finite_pixels_are_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    processor = image_processor()
    processor.image_std = [0.5, 0.0, 0.5]
    processor.save_pretrained(tmp_path)
    for loader in ("train", "evaluate", "annotate", "export"):
        with pytest.raises(ValueError, match=r"image processor of \S+ normalizes with .* std .0\.5, 0\.0, 0\.5"):
            LOADERS[loader](str(tmp_path))


def test_scores_are_refused_by_the_name_of_the_image():
    scores = torch.zeros(5, 3)
    scores[1, 2], scores[4, 0] = math.nan, math.inf
    with pytest.raises(NotFiniteError, match=r"it gives scores that are NaN or infinite for row 1, row 4\. "):
        check_scores(scores, [f"row {row}" for row in range(5)], "it")
    check_scores(scores[2:4], ["a", "b"], "it")
    check_weights({"whole numbers": torch.ones(2, dtype=torch.int64), "empty": torch.empty(0)})


def test_a_classifier_whose_scores_overflow_is_refused_before_any_work(tiny_model, tmp_path):
    for name in ("lvvit.layernorm.weight", "classifier.weight", "patch_classifier.weight"):
        tiny_model.get_parameter(name).data.mul_(1e30)
    tiny_model.save_pretrained(tmp_path)
    evaluation_image_processor((32, 48), 0.9).save_pretrained(tmp_path)
    for loader in ("evaluate", "annotate"):
        with pytest.raises(ValueError, match="gives scores that are NaN or infinite"):
            LOADERS[loader](str(tmp_path))


def test_float16_exports_that_overflow_name_the_output(tmp_path):
    model = LVViTForImageClassification(tiny_config()).eval()
    model.patch_classifier.bias.data.fill_(1e5)  # a half holds 65504
    model.save_pretrained(tmp_path / "model")
    evaluation_image_processor((32, 48), 0.9).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="gives NaN or infinite values in logits, patch_logits; not saved"):
        export_folder(str(tmp_path / "model"), tmp_path / "exported", ExportSettings("torch", ["float16"]))
    assert not (tmp_path / "exported").exists()


def online(model, folder, dtype=torch.float32) -> OnlineAnnotator:
    model.save_pretrained(folder)
    evaluation_image_processor((32, 48), 0.9).save_pretrained(folder)
    return OnlineAnnotator(load_annotator(str(folder)), [0.5] * 3, [0.5] * 3, dtype=dtype)


def test_annotators_whose_weights_do_not_fit_their_type_are_refused(tiny_model, tmp_path):
    tiny_model.patch_classifier.weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"in float16: the weights hold .* in \S*patch_classifier.weight"):
        online(tiny_model, tmp_path, torch.float16)


def test_annotators_that_give_bad_scores_in_training_are_named(tiny_model, labelled_rows, tmp_path):
    annotator = online(tiny_model, tmp_path / "annotator")
    score_map = annotator.score_map
    annotator.score_map = lambda pixels: score_map(pixels).index_fill(0, torch.tensor([1]), math.nan)
    student = LVViTForImageClassification(tiny_config())
    trainer = trainer_for(student, labelled_rows, tmp_path / "run", False, max_steps=2, logging_steps=1)
    trainer.annotator = annotator
    with pytest.raises(NotFiniteError, match=r"The annotator \S+ gave scores .* for 1 training images up to step 1"):
        trainer.train()


def test_stored_labels_name_the_image(monkeypatch):
    from modeling_lvvit.annotators import pipeline

    def score_map(pixels):
        scores = torch.zeros(len(pixels), 11, 2, 3)
        scores[1, 4, 0, 0] = math.inf
        return scores

    layout = pipeline.LabelSetLayout(tuple("abcdefghijk"), k=2, map_size=(2, 3))
    scorer = pipeline.Scorer(score_map, layout, "logits", torch.device("cpu"), torch.no_grad)
    image = pipeline.PreparedImage(torch.zeros(3, 4, 4, dtype=torch.uint8), (0.0, 0.0, 1.0, 1.0), 1, "")
    with pytest.raises(ValueError, match=r"the annotator gives scores that are NaN or infinite for b/2.jpg\. "):
        ShardBuilder(scorer, layout, keep_damaged=False).add(["b/1.jpg", "b/2.jpg"], [image, image], is_last=True)
