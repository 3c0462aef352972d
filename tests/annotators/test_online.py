"""Labels made in training by an annotator that sees every crop."""

import copy
import json
import random

import pytest
import torch
from torch import nn

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.annotators.annotator import Annotator, PatchClassifier, Preprocessing, load_annotator
from modeling_lvvit.annotators.online import open_annotator
from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.data.classes.class_matching import ClassMap
from modeling_lvvit.labels.label_crops import CropGeometry, crop_label_maps
from modeling_lvvit.labels.label_maps import build_palette, encode_top_k
from modeling_lvvit.labels.sparse_targets import SparseTargets
from modeling_lvvit.launching import name_options
from modeling_lvvit.token_labeling import OnlineAnnotator, TokenLabelTrainer
from modeling_lvvit.token_labeling.losses import TokenLabelingLoss
from modeling_lvvit.token_labeling.sparse_cross_entropy import soft_cross_entropy
from modeling_lvvit.variants import evaluation_image_processor
from support.classifiers import samples_of as samples_at
from support.classifiers import transformers_model
from support.models import NUM_CLASSES, tiny_config
from support.trainers import arguments, trainer_for


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZE, CELLS = (32, 48), (4, 6)


class Cells(nn.Module):
    """Scores each cell of 8 x 8 pixels by its mean color."""

    grid_size = CELLS

    def __init__(self, num_classes: int = NUM_CLASSES):
        super().__init__()
        torch.manual_seed(0)
        self.scorer = nn.Conv2d(3, num_classes, kernel_size=8, stride=8)
        with torch.no_grad():
            self.scorer.weight.mul_(5)
        self.seen = None

    def forward(self, pixel_values):
        self.seen = pixel_values
        return self.scorer(pixel_values)


def annotator_of(dense: nn.Module | None = None, size=SIZE, class_map: ClassMap | None = None) -> Annotator:
    dense = dense or Cells()
    scale = tuple(1 / (255 * value) for value in (0.3, 0.3, 0.3))
    names = [f"class {index}" for index in range(dense.scorer.out_channels)]
    return Annotator("cells", dense, names, Preprocessing(size, scale, (-1.5,) * 3), class_map=class_map)


def images(count: int = 3) -> torch.Tensor:
    """8-bit images."""
    return torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def live(annotator: Annotator | None = None, **options) -> OnlineAnnotator:
    return OnlineAnnotator(annotator or annotator_of(), MEAN, STD, **options)


@pytest.mark.parametrize("grid_size", [(4, 6), (2, 3), (8, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_live_labels_equal_stored_ones_for_whole_images(grid_size, temperature):
    """All classes are stored, as float16 scores; the crop is the whole image."""
    annotator = annotator_of()
    with torch.no_grad():
        ids, scores = encode_top_k(annotator.score_map(images()), k=NUM_CLASSES)
    palette, index = build_palette(torch.from_numpy(ids))
    whole = CropGeometry(torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4))
    stored = crop_label_maps(
        palette, index, torch.from_numpy(scores), whole, grid_size, NUM_CLASSES, temperature=temperature
    )
    made = live(annotator).label(normalized(images()), grid_size, temperature)
    for ours, theirs in zip(made, stored, strict=True):
        torch.testing.assert_close(ours.to_dense(), theirs.to_dense(), atol=1e-3, rtol=1e-3)
        assert (ours.to_dense().amax(-1) > 0.3).any()  # the labels say something


def test_each_cell_has_its_own_label():
    """The loss of the annotator's own scores is their entropy, cell by cell."""
    annotator = annotator_of()
    _, tokens = live(annotator).label(normalized(images()), CELLS)
    with torch.no_grad():
        expected = annotator.score_map(images()).flatten(2).mT.softmax(-1)
    torch.testing.assert_close(tokens.to_dense(), expected, atol=1e-5, rtol=1e-4)
    entropy = -(expected * expected.log()).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(expected.log(), tokens), entropy, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("draws_classes", [False, True])
@pytest.mark.parametrize("offset", [-30.0, -300.0])
def test_labels_do_not_depend_on_an_offset_of_all_scores(offset, draws_classes):
    labels = []
    for bias in (0.0, offset):
        dense = Cells()
        with torch.no_grad():
            dense.scorer.bias.add_(bias)
        torch.manual_seed(0)
        made = live(annotator_of(dense), draws_classes=draws_classes).label(
            normalized(images()), CELLS, temperature=0.5
        )
        labels.append([targets.to_dense() for targets in made])
    for ours, moved in zip(*labels):
        torch.testing.assert_close(moved, ours, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(moved.sum(-1), torch.ones(moved.shape[:-1]))


def test_annotator_gets_its_own_size_and_normalization():
    dense = Cells()
    live(annotator_of(dense, size=(64, 96))).label(normalized(images()), (2, 2))
    assert dense.seen.shape == (3, 3, 64, 96)
    live(annotator_of(dense)).label(normalized(images()), (2, 2))
    torch.testing.assert_close(dense.seen, images() / (255 * 0.3) - 1.5, atol=1e-4, rtol=1e-4)


def test_classes_are_those_of_the_data():
    """Two of the annotator's classes stand for the last one."""
    class_map = ClassMap((*((index,) for index in range(NUM_CLASSES - 1)), (NUM_CLASSES - 1, NUM_CLASSES)), 8)
    annotator = annotator_of(Cells(NUM_CLASSES + 1), class_map=class_map)
    labels = live(annotator)
    assert labels.num_classes == NUM_CLASSES
    _, tokens = labels.label(normalized(images()), CELLS)
    with torch.no_grad():
        scores = annotator.dense(annotator.preprocessing.normalize(images())).flatten(2).mT.softmax(-1)
    torch.testing.assert_close(tokens.to_dense()[..., -1], scores[..., -2:].sum(-1), atol=1e-5, rtol=1e-4)


def test_annotator_computes_in_its_own_type_and_the_loss_in_float32():
    dense = Cells()
    _, tokens = live(annotator_of(dense), dtype=torch.bfloat16).label(normalized(images()), CELLS)
    assert dense.seen.dtype == dense.scorer.weight.dtype == torch.bfloat16
    assert tokens.excess.dtype == torch.float32 and not tokens.excess.is_inference()


def outputs_like(batch_size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"cls_logits": (batch_size, NUM_CLASSES), "patch_logits": (batch_size, 24, NUM_CLASSES)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def objective(tmp_path, **options) -> TokenLabelingLoss:
    return TokenLabelingLoss(arguments(tmp_path, label_smoothing_factor=0.0, **options), CELLS, NUM_CLASSES)


def cross_entropy(logits: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    return -(targets.to_dense() * logits.log_softmax(-1)).sum(-1)


def test_exchanged_tokens_share_the_class_target_by_area(tmp_path):
    """An annotator sees images before tokens are exchanged: a quarter of the class target is the partner's."""
    made = live().label(normalized(images(4)), CELLS)
    mix_mask = torch.zeros(4, *CELLS, dtype=torch.bool)
    mix_mask[:, :2, :3] = True
    outputs = outputs_like()
    losses = objective(tmp_path)(outputs, {}, mix_mask, made)
    logits = outputs["cls_logits"]
    expected = 0.75 * cross_entropy(logits, made[0]) + 0.25 * cross_entropy(logits, made[0].flip())
    torch.testing.assert_close(losses["cls_loss"], expected.mean())
    torch.testing.assert_close(losses["token_loss"], cross_entropy(outputs["patch_logits"], made[1]).mean())


def test_mixtures_of_pixels_are_labelled_as_they_are(tmp_path):
    """CutMix and Mixup come before the annotator: its targets are not shared again, the human label is."""
    made = live().label(normalized(images(4)), CELLS)
    labels = {"labels": torch.tensor([0, 1, 2, 3]), "mix_share": torch.full((4, *CELLS), 0.25)}
    outputs = outputs_like()
    dense = objective(tmp_path)(outputs, labels, None, made)
    torch.testing.assert_close(dense["cls_loss"], cross_entropy(outputs["cls_logits"], made[0]).mean())
    torch.testing.assert_close(dense["token_loss"], cross_entropy(outputs["patch_logits"], made[1]).mean())
    human = objective(tmp_path, cls_target="label")(outputs, labels, None, made)
    logits = -outputs["cls_logits"].log_softmax(-1)
    expected = 0.75 * logits[range(4), [0, 1, 2, 3]] + 0.25 * logits[range(4), [3, 2, 1, 0]]
    torch.testing.assert_close(human["cls_loss"], expected.mean())


def test_training_uses_the_annotator_and_reports_its_share(tiny_model, labelled_rows, tmp_path):
    """Labels that always name class 2 teach it to every token."""
    dense = Cells()
    with torch.no_grad():
        dense.scorer.weight.zero_()
        dense.scorer.bias.copy_(30.0 * torch.eye(NUM_CLASSES)[2])
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False, max_steps=25, logging_steps=5)
    trainer = TokenLabelTrainer(
        tiny_model, trainer.args, train_dataset=trainer.train_dataset, annotator=live(annotator_of(dense))
    )
    assert trainer.trains_patches and tiny_model.config.patch_logits_weight == 0.5
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "annotation" in entry]
    assert logs and all(0 < entry["annotation"] < 1 for entry in logs)
    assert not any(parameter.grad is not None for parameter in dense.parameters())
    with torch.no_grad():
        output = tiny_model.eval()(torch.randn(2, 3, *SIZE))
    assert (output.patch_logits.argmax(-1) == 2).all()


def test_what_it_says_of_crops_is_compared_with_human_labels(labelled_rows):
    """Rows without a human label are left out; crops are those of the first epoch of the seed."""
    rows = labelled_rows.rename_column("label", "before")
    human = [index if index % 3 else -1 for index in labelled_rows["label"]]
    rows = rows.add_column("label", human, feature=labelled_rows.features["label"])
    samples = samples_at(rows)
    labelled = [row for row, index in enumerate(human) if index >= 0]
    crops = torch.stack([sample["pixel_values"] for sample in samples.draw(labelled, 5, 0)])
    annotator = live()
    annotator.annotator.dense.scorer.bias.data -= annotator.score_map(crops).mean(
        dim=(0, 2, 3)
    )  # else one class is always first
    agreement = annotator.compare_with_labels(samples, seed=5, batch_size=3)
    expected = annotator.score_map(crops).mean(dim=(2, 3)).argmax(dim=1)
    assert len(set(agreement.first)) > 1 and agreement.first.tolist() == expected.tolist()
    assert agreement.classes.tolist() == [human[row] for row in labelled]


def test_annotator_sees_no_erased_images(tiny_model, labelled_rows, tmp_path):
    """With erasing everywhere the model sees noise that the annotator does not."""
    dense, seen = Cells(), []
    tiny_model.register_forward_pre_hook(
        lambda module, inputs, fields: seen.append(fields["pixel_values"].clone()), with_kwargs=True
    )
    arguments_ = arguments(tmp_path, max_steps=1)
    samples = trainer_for(copy.deepcopy(tiny_model), labelled_rows, tmp_path, with_maps=False).train_dataset
    random.seed(0)
    labels = OnlineAnnotator(annotator_of(dense), [0.5] * 3, [0.5] * 3, random_erasing=1.0)
    TokenLabelTrainer(tiny_model, arguments_, train_dataset=samples, annotator=labels).train()
    clean = ((dense.seen + 1.5) * 0.3 - 0.5) / 0.5
    changed = ((seen[0] - clean).abs() > 1e-3).any(dim=1).float().mean(dim=(1, 2))  # share of pixels of each image
    assert ((changed > 0.015) & (changed < 0.4)).all()


def test_stored_and_live_labels_exclude_each_other(tiny_model, labelled_rows, tmp_path):
    samples = trainer_for(tiny_model, labelled_rows, tmp_path).train_dataset
    with pytest.raises(ValueError, match="with them or with an annotator"):
        TokenLabelTrainer(tiny_model, arguments(tmp_path), train_dataset=samples, annotator=live())
    with pytest.raises(ValueError, match="--token_labels .stored. or --annotator"):
        DataArguments(dataset_name="images", annotator="timm/resnet18", token_labels="labels")


def test_annotators_with_other_classes_are_refused(tiny_model, labelled_rows, tmp_path):
    samples = trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False).train_dataset
    with pytest.raises(ValueError, match=f"cells has 5 classes, the model {NUM_CLASSES}"):
        TokenLabelTrainer(
            tiny_model, arguments(tmp_path), train_dataset=samples, annotator=live(annotator_of(Cells(5)))
        )


def test_annotators_with_too_few_cells_are_refused():
    dense = Cells()
    dense.grid_size = (1, 6)
    with pytest.raises(ValueError, match="1 x 6 cells; token labels need at least 2 x 2"):
        live(annotator_of(dense))


def test_students_with_too_few_tokens_are_refused(labelled_rows, tmp_path):
    model = LVViTForImageClassification(tiny_config(image_size=[16, 48], patch_size=16))
    with pytest.raises(ValueError, match="1 x 3 tokens; token labels need at least 2 x 2"):
        TokenLabelTrainer(model, arguments(tmp_path), train_dataset=samples_at(labelled_rows))


@pytest.fixture
def saved_annotator(tmp_path) -> str:
    """A model whose patch head is trained, and its preprocessing."""
    names = {index: f"thing {index}" for index in range(NUM_CLASSES)}
    config = tiny_config(id2label=names, label2id={name: index for index, name in names.items()})
    LVViTForImageClassification(config).save_pretrained(tmp_path / "annotator")
    evaluation_image_processor(SIZE, 1.0).save_pretrained(tmp_path / "annotator")
    return str(tmp_path / "annotator")


def test_opened_annotator_pairs_classes_by_name(saved_annotator):
    backwards = [f"thing {index}" for index in reversed(range(NUM_CLASSES))]
    args = DataArguments(annotator=saved_annotator)
    labels = open_annotator(args, backwards, MEAN, STD, torch.device("cpu"))
    assert labels.annotator.class_map.groups == tuple((index,) for index in reversed(range(NUM_CLASSES)))
    assert labels.random_erasing.probability == args.random_erasing == 0.25
    assert args.augmentation().random_erasing == 0.0 and not args.use_token_labels


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["cat", "dog"], {}, "cat"),
        ([str(index) for index in range(NUM_CLASSES)], {}, "--annotator_class_map identity"),
        (["cat", "dog"], {"annotator_class_map": "identity"}, "not identical"),
    ],
)
def test_annotators_of_other_classes_are_refused_when_opened(saved_annotator, names, options, message):
    with pytest.raises(ValueError) as caught:
        open_annotator(DataArguments(annotator=saved_annotator, **options), names, MEAN, STD, torch.device("cpu"))
    assert message in name_options(str(caught.value), DataArguments)


def test_class_map_file(saved_annotator, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"cat": ["thing 0"], "dog": ["thing 1", "thing 2"]}))
    args = DataArguments(annotator=saved_annotator, annotator_class_map=str(tmp_path / "map.json"))
    labels = open_annotator(args, ["cat", "dog"], MEAN, STD, torch.device("cpu"))
    assert labels.annotator.class_map.groups == ((0,), (1, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"annotator_dtype": "int8"}, "annotator_dtype"),
        ({"annotator_image_size": [0]}, "annotator_image_size"),
        ({"annotator_image_size": [1, 2, 3]}, "annotator_image_size"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(annotator="timm/resnet18", **options)


def test_drawn_classes_follow_the_probabilities():
    """The mean of many draws is the target that they are drawn from; each draw names one class."""
    soft = live().label(normalized(images()), CELLS)[1].to_dense()
    sampler = live(draws_classes=True)
    torch.manual_seed(0)
    draws = [sampler.label(normalized(images()), CELLS)[1].to_dense() for _ in range(400)]
    assert all(((draw == 0) | (draw == 1)).all() and (draw.sum(-1) == 1).all() for draw in draws)
    torch.testing.assert_close(torch.stack(draws).mean(0), soft, atol=0.12, rtol=0)


def test_patch_tokens_learn_the_image_label_by_their_mean(tmp_path):
    outputs, labels = outputs_like(), {"labels": torch.tensor([0, 1, 2, 3])}
    losses = objective(tmp_path, patch_target="image")(outputs, labels)
    expected = nn.functional.cross_entropy(outputs["patch_logits"].mean(1), labels["labels"])
    torch.testing.assert_close(losses["token_loss"], expected)


def test_the_mean_of_exchanged_tokens_belongs_to_one_image_and_that_of_mixed_pixels_to_two(tmp_path):
    outputs, labels = outputs_like(), {"labels": torch.tensor([0, 1, 2, 3])}
    mix_mask = torch.zeros(4, *CELLS, dtype=torch.bool)
    mix_mask[:, :2, :3] = True
    entropies = -outputs["patch_logits"].mean(1).log_softmax(-1)
    own, partner = entropies[range(4), [0, 1, 2, 3]], entropies[range(4), [3, 2, 1, 0]]
    learner = objective(tmp_path, patch_target="image")
    torch.testing.assert_close(learner(outputs, labels, mix_mask)["token_loss"], own.mean())
    mixed = learner(outputs, labels | {"mix_share": torch.full((4, *CELLS), 0.25)})
    torch.testing.assert_close(mixed["token_loss"], (0.75 * own + 0.25 * partner).mean())


def test_label_maps_are_not_used_for_self_emerging_labels(tiny_model, labelled_rows, tmp_path):
    """With and without maps the same is learned, and the patch head enters the prediction."""
    weights = []
    for with_maps in (True, False):
        model = copy.deepcopy(tiny_model)
        options = {"with_maps": with_maps, "patch_target": "image", "cls_target": "label", "max_steps": 2}
        trainer = trainer_for(model, labelled_rows, tmp_path, **options)
        assert trainer.trains_patches and model.config.patch_logits_weight == 0.5
        trainer.train()
        weights.append(model.patch_classifier.weight)
    assert torch.equal(*weights) and not torch.equal(weights[0], tiny_model.patch_classifier.weight)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_trained_patch_head_labels_for_others(kind, labelled_rows, tmp_path):
    """A labeler of any architecture is asked through its patch head; one trained with plain labels saves none."""
    columns = {"name": "without maps"}
    for target, has_head in (("image", True), ("dense", False)):
        folder = tmp_path / target
        trainer = TokenLabelTrainer(
            transformers_model(kind),
            arguments(folder, patch_target=target, cls_target="label"),
            train_dataset=samples_at(labelled_rows, **columns),
            processing_class=evaluation_image_processor((64, 64), 1.0),
        )
        trainer.train()
        trainer.save_model()
        annotator = load_annotator(str(folder))
        assert isinstance(annotator.dense, PatchClassifier) == has_head
        if has_head:
            pixel_values = torch.randn(1, 3, 64, 64)
            with torch.no_grad():
                expected = trainer.model.eval()(pixel_values).patch_logits
                scores = annotator.dense(pixel_values).flatten(2).mT
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_image_labels_and_an_annotator_exclude_each_other(tiny_model, labelled_rows, tmp_path):
    samples = trainer_for(tiny_model, labelled_rows, tmp_path, with_maps=False).train_dataset
    with pytest.raises(ValueError, match="not from both"):
        TokenLabelTrainer(
            tiny_model, arguments(tmp_path, patch_target="image"), train_dataset=samples, annotator=live()
        )
