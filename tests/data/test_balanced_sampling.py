"""Draws of a balanced sampler, and samples of rows that are drawn again."""

from collections import Counter

import numpy as np
import pytest
import torch

from modeling_lvvit.data.sampling import BalancedSampler
from modeling_lvvit.token_labeling import TokenLabelStream, TokenLabelTrainer, TrainTransform
from support.samples import samples_of
from support.trainers import arguments, trainer_for


CLASSES = np.repeat([0, 1, 2], [900, 80, 20])


def test_classes_are_drawn_alike():
    draws = list(BalancedSampler(CLASSES, lambda: (0, 0)))
    rows = np.array([row for row, _ in draws])
    assert len(draws) == 1000
    assert np.bincount(CLASSES[rows]) == pytest.approx([333, 333, 333], abs=60)  # four standard deviations
    for row, times in Counter(rows.tolist()).items():
        assert [again for drawn, again in draws if drawn == row] == list(range(times))


def test_draws_follow_from_seed_and_epoch():
    first, second, other, later = (
        list(BalancedSampler(CLASSES, lambda place=place: place)) for place in ((1, 2), (1, 2), (2, 2), (1, 3))
    )
    assert first == second and first != other and first != later


def test_a_row_that_comes_again_is_another_sample(labelled_rows):
    samples = samples_of(labelled_rows, TrainTransform((32, 48), [0.5] * 3, [0.5] * 3))
    samples.start_epoch(5, 1)
    first, again, once_more, plain = samples.__getitems__([(3, 0), (3, 1), (3, 1), 3])
    assert torch.equal(first["pixel_values"], plain["pixel_values"])  # as without a sampler
    assert torch.equal(again["pixel_values"], once_more["pixel_values"])
    assert not torch.equal(first["pixel_values"], again["pixel_values"]) and first["labels"] == again["labels"]


def test_the_trainer_draws_balanced_batches(tiny_model, labelled_rows, tmp_path):
    trainer = trainer_for(tiny_model, labelled_rows, tmp_path, train_sampling_strategy="balanced")
    trainer.train()
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, BalancedSampler)
    assert trainer.train_dataset.seed_and_epoch() == (3, 0)


def test_streams_are_refused(tiny_model, labelled_rows, tmp_path):
    stream = TokenLabelStream(
        labelled_rows.to_iterable_dataset(), TrainTransform((32, 48), [0.5] * 3, [0.5] * 3), "image", "label"
    )
    args = arguments(tmp_path, train_sampling_strategy="balanced")
    with pytest.raises(ValueError, match="the class of every image before training, which a stream does not"):
        TokenLabelTrainer(tiny_model, args, train_dataset=stream)
    with pytest.raises(ValueError, match="`train_sampling_strategy` must be one of"):
        arguments(tmp_path, train_sampling_strategy="fair")
