"""Runs whose images are loaded by worker processes: their default, and that they are resumed exactly."""

import copy
import multiprocessing

import datasets
import pytest
import torch

from modeling_lvvit.data import loaders
from modeling_lvvit.token_labeling import (
    ImageProcessorTransform,
    TokenLabelDataset,
    TokenLabelStream,
    TokenLabelTrainer,
    TrainTransform,
)
from modeling_lvvit.training import base_arguments
from support.images import labelled_table
from support.segmentation_rows import masked_rows, segmenter
from support.segmentation_rows import trainer_of as segmentation_trainer
from support.trainers import (
    STATEFUL,
    StopAfter,
    arguments,
    assert_resume_changes_nothing,
    assert_same_weights,
    image_processor,
    random_model,
    trainer_of,
)


NAMES = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor")


def loading(folder, **options) -> list:
    settings = arguments(folder, **options)
    return [getattr(settings, name) for name in NAMES]


def test_workers_of_a_machine_are_used_and_options_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(base_arguments, "default_num_workers", lambda on_cpu: 0 if on_cpu else 6)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert loading(tmp_path) == [0, False, None]  # `use_cpu`
    settings = arguments(tmp_path)
    settings.use_workers(6)
    assert [getattr(settings, name) for name in NAMES] == [6, True, 4]
    assert loading(tmp_path, dataloader_num_workers=2) == [2, True, 4]
    given = {"dataloader_persistent_workers": False, "dataloader_prefetch_factor": 3}
    assert loading(tmp_path, dataloader_num_workers=2, **given) == [2, False, 3]
    assert loading(tmp_path, dataloader_num_workers=0, dataloader_persistent_workers=True) == [0, False, None]


@pytest.mark.parametrize(("name", "value"), [("dataloader_num_workers", -1), ("dataloader_prefetch_factor", 0)])
def test_impossible_numbers_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        arguments(tmp_path, **{name: value})


def test_a_trainer_prepares_all_its_loaders(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, dataloader_num_workers=1)
    trainer.eval_dataset = trainer.train_dataset
    stream = stream_trainer(tiny_model, tmp_path, dataloader_num_workers=1).get_train_dataloader().base_dataloader
    assert stream.worker_init_fn.func is loaders._start_worker and stream.generator is not None
    segmentation = segmentation_trainer(segmenter(), tmp_path, None, masked_rows(), dataloader_num_workers=1)
    images = segmentation.get_eval_dataloader()
    assert images.worker_init_fn.func is loaders._start_worker and images.generator is not None
    for loader, is_persistent in ((trainer.get_train_dataloader(), True), (trainer.get_eval_dataloader(), False)):
        inner = loader.base_dataloader
        assert inner.worker_init_fn.func is loaders._start_worker and inner.generator is not None
        assert (inner.num_workers, inner.persistent_workers, inner.prefetch_factor) == (1, is_persistent, 4)


def test_no_worker_outlives_its_run(tiny_model, labelled_rows, tmp_path):
    evaluation = TokenLabelDataset(labelled_rows, ImageProcessorTransform(image_processor()))
    options = {"dataloader_num_workers": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = trainer_of(tiny_model, labelled_rows, tmp_path, evaluation, **options)
    before = multiprocessing.active_children()
    trainer.train()
    assert multiprocessing.active_children() == before
    trainer.evaluate()
    trainer.predict(evaluation)
    assert multiprocessing.active_children() == before


PERSISTENCE = [
    {"dataloader_num_workers": 2},
    {"dataloader_num_workers": 2, "dataloader_persistent_workers": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", PERSISTENCE, ids=["persistent", "of an epoch"])
@pytest.mark.parametrize("stop", [4, 6])  # four steps an epoch, of three epochs: at the end of one, and within one
def test_workers_do_not_move_what_training_draws(stop, options, tiny_model, tmp_path):
    """Drop path draws from the generator of the process, from which loaders of the library take the seed of their workers."""
    rows = datasets.Dataset(labelled_table(20))
    options = {**options, "max_steps": 12, "per_device_train_batch_size": 5}
    for layer in tiny_model.lvvit.layers:
        layer.drop_path.rate = 0.2
    without = copy.deepcopy(tiny_model)
    whole = assert_resume_changes_nothing(tiny_model, rows, tmp_path, stop, **options)
    trainer_of(without, rows, tmp_path / "without", **{**options, "dataloader_num_workers": 0}).train()
    assert_same_weights(without, whole)


def stream_trainer(model, folder, **options) -> TokenLabelTrainer:
    rows = datasets.Dataset(labelled_table(24)).to_iterable_dataset(num_shards=2)
    stream = TokenLabelStream(rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3), "image", "label", seed=1)
    return TokenLabelTrainer(model, arguments(folder, **{**STATEFUL, "max_steps": 4, **options}), train_dataset=stream)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_is_resumed_with_any_number_of_workers(workers, tiny_model, tmp_path):
    whole, first, second = (copy.deepcopy(random_model(tiny_model)) for _ in range(3))
    stream_trainer(whole, tmp_path / "whole", dataloader_num_workers=2).train()
    stopped = stream_trainer(first, tmp_path / "parts", dataloader_num_workers=2)
    stopped.add_callback(StopAfter(2))
    stopped.train()
    resumed = stream_trainer(second, tmp_path / "parts", dataloader_num_workers=workers)
    resumed.train(resume_from_checkpoint=True)  # the newest
    assert_same_weights(second, whole)


def test_streams_and_stored_data_are_not_mixed(tiny_model, labelled_rows, tmp_path):
    trainer_of(copy.deepcopy(tiny_model), labelled_rows, tmp_path, max_steps=1).train()
    with pytest.raises(ValueError, match="checkpoint-1 was trained on stored data, this run is on a stream"):
        stream_trainer(tiny_model, tmp_path).train(resume_from_checkpoint=True)


def test_other_runs_may_have_any_number_of_workers(tiny_model, labelled_rows, tmp_path):
    trainer_of(tiny_model, labelled_rows, tmp_path, max_steps=1, dataloader_num_workers=1).train()
    resumed = trainer_of(tiny_model, labelled_rows, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.args.dataloader_num_workers == 0
