"""What annotation says of its labels: at its end how often they agree with those of people, and at its start who labels badly."""

import logging

import datasets
import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators.agreement import compare_with_labels, describe_first_classes
from modeling_lvvit.backbones import dense_classifier
from modeling_lvvit.backbones.dense_classifier import DenseClassifier
from modeling_lvvit.labels.label_crops import top_classes
from modeling_lvvit.labels.label_set import LabelSet
from modeling_lvvit.labels.reader import LabelMapReader
from support.label_sets import layout_of, random_maps, table_of, write_label_set
from support.models import tiny_config


NAMES = ["ant", "bee", "cat"]


def test_agreement_is_a_share_of_the_maps():
    classes = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    lines = describe_first_classes(np.array([0, 1, 2, 0, 1, 2, 1, 0]), classes, NAMES)
    assert lines == ["75.0 % of 8 maps have the human label as their first class"]


def test_rare_agreement_and_a_preferred_class_are_warned_of():
    classes, first = np.repeat([0, 1, 2], [20, 20, 60]), np.repeat([1, 2], [80, 20])
    share, rare, preferred = describe_first_classes(first, classes, NAMES)
    assert share.startswith("40.0 % of 100 maps")
    assert rare.startswith("WARNING: most maps have another first class")
    assert "bee is the first class of 80 % of the maps, and the label of 20 % of the images, 4.0 times" in preferred


def test_a_class_preferred_by_chance_is_not_warned_of():
    assert len(describe_first_classes(np.array([0, 0, 2, 1, 2]), np.array([0, 1, 2, 1, 2]), NAMES)) == 1


def test_maps_are_compared_with_the_labels_of_their_images(tmp_path):
    maps = random_maps(10)
    layout = layout_of(maps)
    is_empty = [False] * 8 + [True, False]
    folder = write_label_set(tmp_path / "set", table_of(maps, layout, is_empty=is_empty), layout)
    with_map = [*range(8), 9]
    labels = np.zeros(10, dtype=int)
    labels[with_map] = top_classes(LabelMapReader(LabelSet.open(str(folder), "train").rows).fetch(with_map), 7)
    labels[:3] = (labels[:3] + 1) % 7
    feature = datasets.Features({"label": datasets.ClassLabel(names=list(layout.class_names))})
    rows = datasets.Dataset.from_dict({"label": labels}, features=feature)
    assert compare_with_labels(folder, rows, "data", "train", "label")[0].startswith("66.7 % of 9 maps")
    assert compare_with_labels(folder, rows, "data", "train", "no such column") == []
    some = datasets.Dataset.from_dict({"label": [*labels[:8], None, None]}, features=feature)
    assert compare_with_labels(folder, some, "data", "train", "label")[0].startswith("62.5 % of 8 maps")
    texts = [*(layout.class_names[index] for index in labels[:8]), None, ""]
    some = datasets.Dataset.from_dict({"image": ["x.jpg"] * 10, "label": texts})
    assert compare_with_labels(folder, some, "data", "train", "label")[0].startswith("62.5 % of 8 maps")
    names = datasets.Dataset.from_dict({"label": ["elsewhere"] * 10})
    assert "not compared" in compare_with_labels(folder, names, "data", "train", "label")[0]


@pytest.mark.parametrize("is_lvvit", [True, False])
def test_class_token_classifiers_are_warned_of(is_lvvit, caplog):
    torch.manual_seed(0)
    if is_lvvit:
        model = LVViTForImageClassification(tiny_config(patch_logits_weight=0.0))
    else:
        config = ViTConfig(image_size=(32, 48), patch_size=8, num_labels=3, hidden_size=32, num_hidden_layers=1)
        config.update({"num_attention_heads": 4, "intermediate_size": 48})
        model = ViTForImageClassification(config)
    logger = logging.getLogger(dense_classifier.__name__)
    logger.addHandler(caplog.handler)
    try:
        DenseClassifier(model.eval(), (32, 48))
    finally:
        logger.removeHandler(caplog.handler)
    assert "has never seen single patches" in caplog.text
    assert "self_emerging/labeler" in caplog.text
    assert ("patch head of this LV-ViT was not trained" in caplog.text) == is_lvvit
