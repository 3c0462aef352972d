"""Training on images with several classes: loss, metrics, and what is refused."""

import math

import datasets
import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.data.classes.multi_label import MULTI_LABEL
from modeling_lvvit.token_labeling import TokenLabelCollator, TokenLabelDataset, TokenLabelTrainer, add_patch_head
from modeling_lvvit.token_labeling.multi_label import METRICS, MultiLabelLoss, multi_label_metrics
from support.models import NUM_CLASSES, tiny_config
from support.samples import DENSE, plain_transform
from support.trainers import arguments


@pytest.fixture
def rows(labelled_rows) -> datasets.Dataset:
    """Row r has the class r % 7 and, if r is odd, class 0; row 4 has none."""
    lists = [[row % NUM_CLASSES, *([0] if row % 2 else [])] if row != 4 else [] for row in range(len(labelled_rows))]
    names = labelled_rows.features["label"].names
    return labelled_rows.select_columns("image").add_column(
        "label", [sorted(set(ids)) for ids in lists], feature=datasets.List(datasets.ClassLabel(names=names))
    )


@pytest.fixture
def model() -> LVViTForImageClassification:
    torch.manual_seed(0)
    return LVViTForImageClassification(tiny_config(problem_type=MULTI_LABEL))


def samples_of(rows: datasets.Dataset) -> TokenLabelDataset:
    return TokenLabelDataset(rows, plain_transform())


def loss_of(tmp_path, logits, labels, smoothing=0.0, mix_mask=None, **labels_of_batch) -> dict[str, torch.Tensor]:
    outputs = {"cls_logits": torch.tensor(logits), "patch_logits": torch.zeros(len(logits), 6, 2)}
    fields = {"labels": torch.tensor(labels), **labels_of_batch}
    return MultiLabelLoss(arguments(tmp_path, label_smoothing_factor=smoothing))(outputs, fields, mix_mask)


def test_worked_numbers(tmp_path):
    assert loss_of(tmp_path, [[0.0, 0.0]], [[1.0, 0.0]])["loss"].item() == pytest.approx(math.log(2))
    smooth = loss_of(tmp_path, [[math.log(3)]], [[1.0]], smoothing=0.2)
    assert smooth["loss"].item() == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    assert smooth["token_loss"] == 0


def test_mixed_images_have_mixed_targets(tmp_path):
    """A quarter of the tokens shows the other image, whose classes are others."""
    logits, labels = [[2.0, -1.0], [0.5, 1.0]], [[1.0, 0.0], [1.0, 1.0]]
    quarter = torch.zeros(2, 2, 4, dtype=torch.bool)
    quarter[:, 0, :2] = True
    targets = torch.tensor([[1.0, 0.25], [1.0, 0.75]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), targets)
    torch.testing.assert_close(loss_of(tmp_path, logits, labels, mix_mask=quarter)["loss"], expected)
    share = quarter.float()  # as CutMix and Mixup say it
    torch.testing.assert_close(loss_of(tmp_path, logits, labels, mix_share=share)["loss"], expected)


def test_metrics_by_hand():
    """Class 2 has no image. Class 0: ranks + - +, so its average precision is (1 + 2/3) / 2; class 1 is ranked rightly."""
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    probabilities = np.array([[0.9, 0.1, 0.2], [0.7, 0.4, 0.2], [0.6, 0.3, 0.1], [0.2, 0.2, 0.3]])
    metrics = multi_label_metrics(probabilities, labels)
    assert metrics["mean_average_precision"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))  # 2 hits, 1 too many, 1 missed
    assert metrics["macro_f1"] == pytest.approx((0.8 + 0) / 2)
    assert metrics["exact_match"] == 0.75
    assert tuple(metrics) == METRICS
    nothing = multi_label_metrics(probabilities, np.zeros((4, 3)))
    assert math.isnan(nothing["mean_average_precision"]) and nothing["exact_match"] == 0.25


def test_batches_have_a_number_for_each_class(rows):
    samples = samples_of(rows)
    batch = TokenLabelCollator((4, 6))(samples.__getitems__([1, 4]))
    assert batch["labels"].tolist() == [[1, 1, 0, 0, 0, 0, 0], [0] * 7] and batch["labels"].dtype == torch.float32
    samples.check_rows(NUM_CLASSES)
    with pytest.raises(ValueError, match="7 classes in column 'label', the model has 6"):
        samples.check_num_classes(6)


@pytest.mark.parametrize("method", ["token", "cutmix", "mixup"])
def test_a_step_changes_every_parameter_but_the_patch_head(rows, model, tmp_path, method):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = samples_of(rows)
    trainer = TokenLabelTrainer(
        model, arguments(tmp_path, mix_methods=[method]), train_dataset=samples, eval_dataset=samples
    )
    trainer.train()
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in same} == {"patch_classifier"} and model.config.patch_logits_weight == 0
    metrics = trainer.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= metrics.keys() and "eval_accuracy" not in metrics
    assert set(trainer.metric_names) == {"loss", *METRICS}
    result = trainer.predict(samples)
    expected = multi_label_metrics(torch.from_numpy(result.predictions).sigmoid().numpy(), result.label_ids)
    assert result.label_ids[1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert {name: result.metrics[f"test_{name}"] for name in METRICS} == pytest.approx(expected)


def test_evaluation_loss_is_that_of_the_model(rows, model, tmp_path):
    """Both that of LV-ViT and that of another classifier with a patch head; 0 and 1 may be integers."""
    images, labels = torch.rand(2, 3, 32, 48), torch.tensor([[1, 0, 0, 1, 0, 0, 0], [0] * 7])
    size = {"image_size": (32, 48), "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    config = ViTConfig(**size, num_attention_heads=2, intermediate_size=32, num_labels=7, problem_type=MULTI_LABEL)
    for classifier in (model, add_patch_head(ViTForImageClassification(config), (32, 48))):
        output = classifier.eval()(pixel_values=images, labels=labels)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, labels.float())
        torch.testing.assert_close(output.loss, expected)


def test_what_does_not_fit_is_refused(rows, labelled_rows, model, tiny_model, tmp_path):
    settings = arguments(tmp_path)
    with pytest.raises(ValueError, match=r"several classes of each image, the model has the `problem_type` None"):
        TokenLabelTrainer(tiny_model, settings, train_dataset=samples_of(rows))
    single = TokenLabelDataset(labelled_rows, plain_transform())
    with pytest.raises(ValueError, match=r"one class of each image.* Set .* to single_label_classification"):
        TokenLabelTrainer(model, settings, train_dataset=single)
    with pytest.raises(ValueError, match="`patch_target` is for images with one class each: leave it out"):
        TokenLabelTrainer(model, arguments(tmp_path, patch_target="image"), train_dataset=samples_of(rows))
    lists = rows.with_format("arrow")[:]["label"].combine_chunks()
    dense = labelled_rows.remove_columns("label").add_column("label", lists, feature=rows.features["label"])
    with pytest.raises(
        ValueError, match="several classes of each image; such data is trained on without dense labels"
    ):
        TokenLabelDataset(dense, plain_transform(), **DENSE)
