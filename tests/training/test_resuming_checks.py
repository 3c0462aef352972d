"""What does not fit a checkpoint, a metric or a logger is found before training."""

import logging
import shutil

import datasets
import pytest
import torch

from modeling_lvvit import LVViTForImageClassification
from modeling_lvvit.cli.parser import parse
from modeling_lvvit.cli.training_program import set_up
from modeling_lvvit.token_labeling import ImageProcessorTransform, TokenLabelDataset, TokenLabelTrainer
from modeling_lvvit.training.checkpoints import whole
from modeling_lvvit.training.checkpoints.output_dir import prepare_output_dir
from modeling_lvvit.training.checkpoints.resumable import check_resumable
from modeling_lvvit.training.checkpoints.whole import last_whole_checkpoint
from support.classifiers import samples_of as samples_at
from support.classifiers import transformers_model
from support.images import labelled_table
from support.models import NUM_CLASSES, tiny_config
from support.segmentation_rows import masked_rows, segmenter
from support.segmentation_rows import trainer_of as segmentation_trainer
from support.trainers import arguments, image_processor, trainer_for, trainer_of


NAMES = [f"class {index}" for index in range(NUM_CLASSES)]


def model_of(names: list[str] = NAMES, **overrides) -> LVViTForImageClassification:
    torch.manual_seed(0)
    return LVViTForImageClassification(
        tiny_config(num_labels=len(names), id2label=dict(enumerate(names)), **overrides)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """With a weight average."""
    folder = tmp_path_factory.mktemp("run")
    trainer_of(model_of(), datasets.Dataset(labelled_table()), folder, max_steps=1).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        ([*NAMES[1:], NAMES[0]], {}, "7 classes, this run has 7: class 0 is 'class 0' there and 'class 1' here"),
        (["zebra", *NAMES[1:]], {}, "class 0 is 'class 0' there and 'zebra' here"),
        (NAMES[:5], {}, "7 classes, this run has 5: class 5 is 'class 5' there and no class here"),
        (NAMES, {"num_attention_heads": 2}, r"num_attention_heads 4 \(here 2\)"),  # all shapes are the same
        (NAMES, {"num_hidden_layers": 3}, r"num_hidden_layers 2 \(here 3\)"),
        (NAMES, {"hidden_size": 64}, r"hidden_size 32 \(here 64\)"),
        (NAMES, {"image_size": (32, 32)}, r"image_size \[32, 48\] \(here \[32, 32\]\)"),
    ],
    ids=str,
)
def test_resuming_another_model_is_refused(names, overrides, message, checkpoint):
    with pytest.raises(ValueError, match=f"{message}.*`model_name_or_path`"):
        check_resumable(checkpoint, model_of(names, **overrides))
    check_resumable(checkpoint, model_of(drop_path_rate=0.5))  # regularization may change


def test_resuming_another_architecture_is_refused(checkpoint, labelled_rows, tmp_path):
    with pytest.raises(ValueError, match="is a 'lvvit' model, this run trains a 'vit' model"):
        check_resumable(checkpoint, transformers_model("vit"))
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds other weights .*has the shape \(1, 1, 32\) there and of none here"):
        check_resumable(checkpoint, transformers_model("vit"))
    arguments_ = {"resume_from_checkpoint": str(checkpoint), "ema_decay": 0.9}
    with pytest.raises(
        ValueError, match="holds other weights"
    ):  # when the Trainer is made, not after the check of the data
        trainer_for(model_of(num_hidden_layers=3), labelled_rows, tmp_path / "other", **arguments_)


@pytest.mark.parametrize("options", [{}, {"dense_weight": 0.0}], ids=str)
def test_models_with_an_added_patch_head_are_resumed(options, labelled_rows, tmp_path):
    """Where it is not trained it is not saved."""
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, **options}
    first, second = (transformers_model("vit") for _ in range(2))

    def trainer(model, **more):
        return TokenLabelTrainer(
            model, arguments(tmp_path, **options, **more), train_dataset=samples_at(labelled_rows)
        )

    trainer(first).train()
    options["max_steps"] = 2
    resumed = trainer(second, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


def test_an_average_is_neither_dropped_nor_invented(checkpoint, labelled_rows, tmp_path):
    folder = checkpoint.parent
    for name in ("last", str(checkpoint)):
        args = arguments(folder, resume_from_checkpoint=name)
        with pytest.raises(ValueError, match="has a weight average, which this run would drop. Add `ema_decay` 0.9"):
            prepare_output_dir(args, None, False)
        prepare_output_dir(arguments(folder, resume_from_checkpoint=name, base_ema_decay=0.99), None, False)
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer_for(model_of(), labelled_rows, tmp_path / "plain", **options).train()
    for name in ("last", str(tmp_path / "plain" / "checkpoint-1")):
        args = arguments(tmp_path / "plain", resume_from_checkpoint=name, ema_decay=0.9)
        with pytest.raises(ValueError, match="has no weight average to go on with. Leave out `ema_decay`"):
            prepare_output_dir(args, None, False)


@pytest.mark.parametrize("word", ["True", "true", "yes", "False", "no", "None"])
def test_words_for_resuming_are_understood(word, checkpoint):
    options = ["--output_dir", str(checkpoint.parent), "--ema_decay", "0.9", "--per_device_train_batch_size", "6"]
    args = parse(["--resume_from_checkpoint", word, *options])[2]
    if word.lower() not in ("true", "yes"):
        assert args.resume_from_checkpoint is None
        return
    prepare_output_dir(args, None, False)
    assert args.resume_from_checkpoint == str(checkpoint)


def test_unknown_metrics_are_refused_with_the_list(labelled_rows, tmp_path):
    samples = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()), name="evaluation")

    def trainer(**options):
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "max_steps": 1, **options}
        return trainer_of(model_of(), labelled_rows, tmp_path, samples, **options)

    with pytest.raises(
        ValueError, match="top5_accuracy, balanced_accuracy, macro_precision, macro_f1, raw_accuracy.*got acc"
    ):
        trainer(metric_for_best_model="eval_acc")
    with pytest.raises(
        ValueError, match="`greater_is_better` False would keep the checkpoint with the worst accuracy"
    ):
        trainer(metric_for_best_model="accuracy", greater_is_better=False)
    with pytest.raises(ValueError, match="must be one of loss, accuracy, .*macro_f1, got raw_accuracy"):
        trainer(metric_for_best_model="raw_accuracy", evaluate_raw_weights=False)
    with pytest.raises(ValueError, match="`save_strategy` best saves after evaluations, of which there are none"):
        trainer(metric_for_best_model="accuracy", save_strategy="best", eval_strategy="no")
    ready = trainer(metric_for_best_model="eval_raw_top5_accuracy")
    ready.train()  # every name of the list is given
    metrics = ready.state.log_history
    assert all(any(f"eval_{name}" in entry for entry in metrics) for name in ready.metric_names)


def test_another_evaluation_is_no_other_model(tmp_path):
    model = segmenter()
    model.save_pretrained(tmp_path)  # as runs of before this setting have it
    model.config.segmentation_inference = {"window": [64, 64]}
    check_resumable(tmp_path, model)


def test_segmentation_schedules_follow_a_metric_that_there_is(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "lr_schedule": "library", "max_steps": 1}
    rows = masked_rows()
    trainer = segmentation_trainer(
        segmenter(), tmp_path, rows, rows, lr_scheduler_type="reduce_lr_on_plateau", **options
    )
    assert trainer.args.metric_for_best_model == "mean_iou"
    trainer.train()
    with pytest.raises(ValueError, match="must be one of mean_iou, pixel_accuracy, mean_accuracy, got loss"):
        segmentation_trainer(segmenter(), tmp_path, rows, rows, metric_for_best_model="loss", **options)


@pytest.mark.parametrize(
    ("name", "message"), [("codecarbon", "pip install codecarbon"), ("wandbb", "wandbb is not supported, only")]
)
def test_loggers_that_are_missing_are_named_before_the_data_is_opened(name, message, tmp_path):
    model_args, _, args = parse(["--report_to", name, "--output_dir", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=f"`report_to` {name}: .*{message}"):
        set_up(model_args, args)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "inf"),
        ("learning_rate", "nan"),
        ("base_learning_rate", "inf"),
        ("weight_decay", "nan"),
        ("max_grad_norm", "nan"),
        ("adam_beta2", "1.5"),
        ("adam_epsilon", "0"),
    ],
)
def test_numbers_that_can_only_diverge_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must "):
        parse([f"--{name}", value])


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip_a_bit,
    "a cut tail": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a missing file": lambda path: path.unlink(),
}
FILES = [
    "model.safetensors",
    "ema.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "config.json",
]


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    trainer_of(model_of(), datasets.Dataset(labelled_table()), folder, max_steps=2).train()
    return folder


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(name, damage, two_checkpoints, tmp_path, caplog):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / name
    DAMAGE[damage](path)
    if (name, damage) == ("SHA256SUMS", "a missing file"):  # then it is taken for one of before there were such lists
        return
    whole.logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        assert last_whole_checkpoint(tmp_path / "run").name == "checkpoint-1"
    whole.logger.removeHandler(caplog.handler)
    assert f"Passed over: {path.parent} is no whole checkpoint: " in caplog.text
    name = "" if name == "SHA256SUMS" else name  # a changed list accuses others too
    assert name in caplog.text
    args = arguments(tmp_path / "run", ema_decay=0.9, resume_from_checkpoint=str(path.parent))
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint`: .*checkpoint-2 is no whole checkpoint: .*{name}"):
        prepare_output_dir(args, None, False)
    trainer = trainer_of(model_of(), datasets.Dataset(labelled_table()), tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match=f"is no whole checkpoint: .*{name}"):
        trainer.train(str(path.parent))


def test_a_list_of_digests_that_lost_its_end_is_no_list(two_checkpoints, tmp_path):
    shutil.copytree(two_checkpoints, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / "SHA256SUMS"
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, *lines[:-1]]))
    with pytest.raises(whole.DamagedCheckpointError, match="SHA256SUMS is damaged"):
        whole.check_whole(path.parent)
    path.write_text("".join(lines[:-1]))  # as lists were before they began with their number
    with pytest.raises(whole.DamagedCheckpointError, match="SHA256SUMS is cut"):
        whole.check_whole(path.parent)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_checkpoints_without_digests_are_looked_at_too(name, damage, two_checkpoints, tmp_path):
    """Those of earlier versions: the archives of PyTorch have checksums of their own. A missing random state is not noticed."""
    shutil.copytree(two_checkpoints, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / "SHA256SUMS").unlink()
    whole.check_whole(checkpoint)
    DAMAGE[damage](checkpoint / name)
    if (name, damage) in (("rng_state.pth", "a missing file"), ("optimizer.pt", "a missing file")):
        return
    if name == "trainer_state.json" and damage != "a missing file":  # which may be JSON still
        (checkpoint / name).write_text('{"epoch":')
    with pytest.raises(whole.DamagedCheckpointError, match=name):
        whole.check_whole(checkpoint)
