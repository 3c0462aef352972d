"""Training with images that have no human label, and with cells of label maps that contradict it."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.cli.data_arguments import DataArguments
from modeling_lvvit.cli.open_data import open_datasets
from modeling_lvvit.data.classes.class_labels import class_ids
from modeling_lvvit.labels.sparse_targets import SparseTargets
from modeling_lvvit.token_labeling import TokenLabelDataset, TokenLabelTrainer
from modeling_lvvit.token_labeling.losses import TokenLabelingLoss, doubted_cells
from modeling_lvvit.visualization import check_labels
from support.images import labelled_table
from support.label_sets import NUM_CLASSES as SET_CLASSES
from support.label_sets import layout_of, random_maps, table_of, write_label_set
from support.models import tiny_config
from support.samples import plain_transform
from support.trainers import arguments


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def with_hidden_labels(rows, hidden):
    labels = np.array(rows["label"])
    labels[hidden] = -1
    return rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"])


def write_data(folder, labels, split="train", seed=0):
    """Images with class names (null for none) in Parquet, known by their file names."""
    table = labelled_table(len(labels), seed).select(["image"]).replace_schema_metadata(None)
    folder.mkdir(exist_ok=True)
    pq.write_table(table.append_column("label", [labels]), folder / f"{split}.parquet")
    return folder


def label_set(folder, count, seed=0):
    maps = random_maps(count, seed=seed)
    layout = layout_of(maps)
    return write_label_set(folder, table_of(maps, layout, keys=[f"{row}.jpg" for row in range(count)]), layout)


def names(*ids):
    return [None if index is None else f"class {index}" for index in ids]


# --- which rows train, and on what


def test_rows_without_labels_train_with_a_label_set_and_are_not_evaluated_on(tmp_path):
    labels = names(*[index % SET_CLASSES for index in range(14)], *[None] * 10)
    data = write_data(tmp_path / "data", labels)
    args = DataArguments(
        dataset_name=str(data), token_labels=str(label_set(tmp_path / "labels", 24)), eval_fraction=0.25
    )
    opened = open_datasets(args, 0)
    assert (class_ids(opened.train, "label") < 0).sum() == 10
    assert len(opened.evaluation) == 4
    assert (class_ids(opened.evaluation, "label") >= 0).all()
    assert "10 images without label" in opened.describe("label")[0]


def test_data_without_any_label_is_evaluated_by_the_classes_of_the_maps(tmp_path, caplog):
    data = write_data(tmp_path / "data", names(*[None] * 20))
    labels = label_set(tmp_path / "labels", 20)
    opened = open_datasets(DataArguments(dataset_name=str(data), token_labels=str(labels), eval_fraction=0.2), 0)
    assert (class_ids(opened.train, "label") == -1).all()
    assert (class_ids(opened.evaluation, "label") >= 0).all()
    assert opened.eval_name.endswith("by the classes of their label maps")
    assert opened.train.features["label"].names[0] == "class 0"


def test_added_images_find_their_maps_and_the_surest_are_chosen(tmp_path):
    data = write_data(tmp_path / "data", names(*[index % SET_CLASSES for index in range(14)]))
    write_data(data, names(*range(SET_CLASSES)), "test", seed=1)
    more = tmp_path / "more"
    more.mkdir()
    for row in range(14, 20):
        (more / f"{row}.jpg").write_bytes(labelled_table(1, row)["image"][0].as_py()["bytes"])
    maps = random_maps(20)
    maps.scores[14:] *= np.float16(0.1)  # flat
    maps.scores[16] *= np.float16(100)
    layout = layout_of(maps)
    keys = [f"{row}.jpg" for row in range(14)] + [f"more/{row}.jpg" for row in range(14, 20)]
    labels = write_label_set(tmp_path / "labels", table_of(maps, layout, keys=keys), layout)
    options = {"dataset_name": str(data), "token_labels": str(labels), "unlabeled_dataset_name": str(more)}
    assert len(open_datasets(DataArguments(**options), 0).train) == 20
    opened = open_datasets(DataArguments(**options, unlabeled_min_confidence=0.6), 0)
    assert class_ids(opened.train, "label")[14:].tolist() == [-1]
    fetched, expected = opened.label_maps.fetch([14]), maps.scores[[16]]
    assert np.allclose(np.sort(fetched.scores, axis=1), np.sort(expected, axis=1))


def test_max_labeled_samples_hides_labels_and_without_dense_ones_leaves_images_out(tmp_path, caplog):
    data = write_data(tmp_path / "data", names(*[index % SET_CLASSES for index in range(21)]))
    write_data(data, names(*range(SET_CLASSES)), "test", seed=1)
    options = {"dataset_name": str(data), "max_labeled_samples": 7}
    dense = open_datasets(DataArguments(**options, token_labels=str(label_set(tmp_path / "labels", 21))), 0)
    plain = open_datasets(DataArguments(**options), 0)
    subset = open_datasets(DataArguments(dataset_name=str(data), max_train_samples=7), 0)
    paths = [value["path"] for value in subset.train.cast_column("image", datasets.Image(decode=False))["image"]]
    ids = class_ids(dense.train, "label")
    shown = dense.train.select(np.flatnonzero(ids >= 0)).cast_column("image", datasets.Image(decode=False))
    assert (len(dense.train), len(shown), len(plain.train)) == (21, 7, 7)
    assert [value["path"] for value in shown["image"]] == paths
    assert sorted(ids[ids >= 0]) == list(range(7))  # each class has its share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_target": "image"}, "4 of 12 training images have no human label, and `patch_target` image"),
        ({"dense_weight": 0.0}, "there are no dense labels to learn from"),
        ({"train_sampling_strategy": "balanced"}, "balanced draws by it"),
    ],
)
def test_what_needs_a_human_label_is_refused(options, message, tmp_path):
    rows = with_hidden_labels(datasets.Dataset(labelled_table(12)), [0, 3, 4, 11])
    columns = {"ids_column": "token_label_ids", "scores_column": "token_label_scores"}
    samples = TokenLabelDataset(rows, plain_transform(), **columns, may_lack_labels=True)
    model = LVViTForImageClassification(tiny_config())
    with pytest.raises(ValueError, match=message):
        TokenLabelTrainer(model, arguments(tmp_path, **options), train_dataset=samples)


def test_streams_and_unnamed_label_sets_are_refused():
    with pytest.raises(ValueError, match="not added to a stream"):
        DataArguments(dataset_name="x", streaming=True, unlabeled_dataset_name="y")
    with pytest.raises(ValueError, match="choose by stored label maps"):
        DataArguments(dataset_name="x", annotator="y", unlabeled_per_class=3)


@pytest.mark.parametrize("cls_target", ["dense", "label", "blend"])
def test_images_without_a_label_learn_the_map_whatever_the_class_token_learns(cls_target, tmp_path):
    torch.manual_seed(0)
    targets = SparseTargets(torch.tensor([[0, 2], [1, 2]]), torch.rand(2, 2) / 3, torch.full((2,), 0.1), 5)
    loss = TokenLabelingLoss(arguments(tmp_path, cls_target=cls_target), (2, 2), 5)
    parts = loss._cls_targets(targets, torch.tensor([-1, 3]))
    total = sum(
        weight * target.to_dense() if isinstance(weight, float) else weight[:, None] * target.to_dense()
        for target, weight in parts
    )
    assert torch.allclose(total[0], targets.to_dense()[0])
    if cls_target == "label":
        assert total[1].tolist() == [0, 0, 0, 1, 0]


def test_a_run_with_images_without_labels_trains_on_all_of_them(tmp_path):
    rows = with_hidden_labels(datasets.Dataset(labelled_table(12)), range(4, 12))
    columns = {"ids_column": "token_label_ids", "scores_column": "token_label_scores"}
    samples = TokenLabelDataset(rows, plain_transform(), **columns, may_lack_labels=True)
    samples.check_rows(rows.features["label"].num_classes)
    model = LVViTForImageClassification(tiny_config())
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "cls_target": "blend", "cell_target": "label"}
    trainer = TokenLabelTrainer(model, arguments(tmp_path, **options), train_dataset=samples)
    assert np.isfinite(trainer.train().training_loss)
    assert trainer.class_counts.sum() == 4


def test_check_tells_images_with_labels_from_others(tmp_path, capsys):
    data = write_data(tmp_path / "data", names(*[0] * 6, *[None] * 4))
    labels = label_set(tmp_path / "labels", 10)
    sheet = tmp_path / "sheet.png"
    with pytest.raises(SystemExit) as status:
        check_labels.main([str(labels), str(data), "--contact_sheet", str(sheet)])
    printed = capsys.readouterr().out
    assert status.value.code == 0, printed
    assert "of the 6 maps of images with a human label" in printed
    assert "4 images have no human label; probability of the class that their map gives them: median" in printed
    assert sheet.is_file()


# --- cells that contradict the human label

# two images of three tokens over four classes; palette (0, 1, 3) and (2, 1, 0)
CELLS = SparseTargets(
    torch.tensor([[0, 1, 3], [2, 1, 0]]),
    torch.tensor(
        [[[0.5, 0.1, 0.0], [0.0, 0.7, 0.1], [0.2, 0.1, 0.3]], [[0.6, 0.0, 0.0], [0.0, 0.3, 0.1], [0.8, 0.1, 0.1]]]
    ),
    torch.tensor([[0.1, 0.05, 0.1], [0.1, 0.15, 0.0]]),
    4,
)  # top classes 0 1 3 | 2 1 2, with 0.6 0.75 0.4 | 0.7 0.45 0.8


def test_cells_are_doubted_by_their_class_and_their_probability():
    labels = torch.tensor([0, -1])
    assert doubted_cells(CELLS, labels).tolist() == [[False, True, True], [False, False, False]]
    assert doubted_cells(CELLS, labels, "confidence", 0.5).tolist() == [[False, False, True], [False, True, False]]
    assert doubted_cells(CELLS, labels, "either", 0.65).tolist() == [[True, True, True], [False, True, False]]
    assert doubted_cells(CELLS, torch.tensor([3, 2])).tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize("names_all", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_targets_are_blended_with_the_human_label(share, names_all):
    targets, labels = CELLS, torch.tensor([2, -1])
    if names_all:
        ids = torch.arange(4).expand(2, 4)
        dense = CELLS.to_dense()
        targets = SparseTargets(ids, dense, torch.zeros(2, 3), 4, names_all=True)
    doubted = torch.tensor([[True, False, True], [False, False, False]])
    blended = targets.blend_with_labels(labels, share * doubted).to_dense()
    expected = CELLS.to_dense().clone()
    for token in (0, 2):
        expected[0, token] = (1 - share) * expected[0, token] + share * torch.eye(4)[2]
    assert torch.allclose(blended, expected, atol=1e-6)
    assert torch.allclose(blended.sum(-1), torch.ones(2, 3))


@pytest.mark.parametrize("cell_target", ["map", "label", "blend", "ignore"])
def test_the_loss_follows_the_cell_target(cell_target, tmp_path):
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4)
    labels = torch.tensor([1, 2])
    args = arguments(tmp_path, cell_target=cell_target, label_smoothing_factor=0.0, cls_weight=0.0)
    loss = TokenLabelingLoss(args, (1, 3), 4)
    fields = {"labels": labels}
    outputs = {"cls_logits": torch.randn(2, 4), "patch_logits": logits}
    cls_dense = SparseTargets(CELLS.class_ids, CELLS.excess[:, 0], CELLS.other[:, 0], 4)
    result = loss(outputs, fields, online_targets=(cls_dense, CELLS))["token_loss"]
    targets, weights = CELLS.to_dense(), torch.ones(2, 3)
    for image in range(2):
        for token in range(3):
            if targets[image, token].argmax() == labels[image]:
                continue
            human = torch.eye(4)[labels[image]]
            if cell_target == "label":
                targets[image, token] = human
            elif cell_target == "blend":
                targets[image, token] = (targets[image, token] + human) / 2
            elif cell_target == "ignore":
                weights[image, token] = 0
    losses = -(targets * logits.log_softmax(-1)).sum(-1)
    assert torch.allclose(result, (weights * losses).sum() / weights.sum(), atol=1e-6)


def test_pixel_mixing_with_an_annotator_leaves_nothing_to_compare(tmp_path):
    class Annotator:
        def check_num_classes(self, number):
            pass

    args = arguments(tmp_path, cell_target="label", mix_methods=["token", "cutmix"])
    with pytest.raises(ValueError, match="Mix by token"):
        TokenLabelTrainer(LVViTForImageClassification(tiny_config()), args, annotator=Annotator())
