"""Heads of a segmentation model follow the names of the classes."""

import logging

import pytest
import torch

from modeling_lvvit import LVViTForSemanticSegmentation
from modeling_lvvit.segmentation.arguments import SegmentationModelArguments
from modeling_lvvit.segmentation.build_model import build_segmenter, pretrained_config
from support.models import tiny_config


THINGS = ["road", "sky", "car"]


@pytest.fixture(params=["upernet", "fcn"])
def checkpoint(request, tmp_path) -> str:
    torch.manual_seed(0)
    config = tiny_config(
        id2label=dict(enumerate(THINGS)), num_labels=3, num_hidden_layers=4, segmentation_head=request.param,
        out_indices=[1, 2, 3, 4], decoder_channels=16, use_auxiliary_head=True,
    )  # fmt: skip
    model = LVViTForSemanticSegmentation(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def warnings(caplog):
    logging.getLogger("modeling_lvvit.segmentation.build_model").addHandler(caplog.handler)
    return caplog


def build(checkpoint: str, names: list[str], **options) -> LVViTForSemanticSegmentation:
    args = SegmentationModelArguments(model_name_or_path=checkpoint, **options)
    return build_segmenter(args, pretrained_config(args), names, 255).eval()


@torch.no_grad()
def logits_of(model: LVViTForSemanticSegmentation) -> list[torch.Tensor]:
    """Of the decoder and, by its state, the rows of all heads."""
    pixel_values = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    rows = [value for name, value in model.state_dict().items() if "classifier" in name]
    assert len(rows) == 4  # weights and biases of two heads
    return [model(pixel_values).logits[0], *rows]


@pytest.mark.parametrize("evaluate_only", [False, True])
def test_rows_follow_the_names(checkpoint, evaluate_only, warnings):
    before = logits_of(build(checkpoint, THINGS))
    assert "Loaded" not in warnings.text
    after = logits_of(build(checkpoint, ["car", "sky", "road"], evaluate_only=evaluate_only))
    assert all(torch.allclose(new, old.flip(0), atol=1e-6) for old, new in zip(before, after))
    assert "the rows of the heads follow the class names ('car' was class 2, ...)" in warnings.text


@pytest.mark.parametrize("names", [["tree", "car", "road", "sea"], ["car", "tree", "sky"]])
def test_equal_names_keep_their_rows(checkpoint, names, warnings):
    before = logits_of(build(checkpoint, THINGS))
    for old, new in zip(before, logits_of(build(checkpoint, names, ignore_mismatched_sizes=True))):
        for index, name in enumerate(names):
            rows = [torch.allclose(new[index], old[number], atol=1e-6) for number in range(3)]
            assert rows == [name == thing for thing in THINGS]
    assert "are kept for 2 of" in warnings.text and "'tree'" in warnings.text


def test_a_model_is_not_evaluated_on_classes_in_another_place(checkpoint, warnings):
    with pytest.raises(
        ValueError, match="'sky' is its class 1 and class 0 of the data, and 'tree' is none of its classes"
    ):
        build(checkpoint, ["sky", "tree", "car"], evaluate_only=True)
    before = logits_of(build(checkpoint, THINGS))
    after = logits_of(build(checkpoint, ["street", "sky", "car"], evaluate_only=True))
    assert all(torch.equal(old, new) for old, new in zip(before, after))
    assert "calls class 0 'road', the data 'street': are they the same classes?" in warnings.text
