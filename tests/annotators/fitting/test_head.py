"""Logistic regression on features: against scikit-learn by hand, its folds and its temperature."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_lvvit.annotators.fitting import head as head_module
from modeling_lvvit.annotators.fitting.head import (
    ABSENT_LOGIT,
    GRID,
    Regression,
    draw_folds,
    fit_head,
    fit_temperature,
    log_loss,
)


def samples(num_classes: int, count: int = 90, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of different scales and offsets, and classes that they only partly tell."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.arange(count) % num_classes)
    centers = rng.normal(0, 1, (num_classes, width))
    features = centers[classes] + rng.normal(0, 1.2, (count, width))
    return (features * np.logspace(-2, 2, width) + np.arange(width)).astype(np.float32), classes


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def reference(features, classes, c, weights=None) -> LogisticRegression:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-8, max_iter=5000))
    return model.fit(features.astype(np.float64), classes, logisticregression__sample_weight=weights)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_head_is_the_regression_of_scikit_learn_on_standardized_features(num_classes, c):
    features, classes = samples(num_classes)
    weights = np.where(classes == 0, 3.0, 0.5)
    head = Regression(features, classes, weights, num_classes).fit(c)
    expected = reference(features, classes, c, weights).predict_proba(features.astype(np.float64))
    np.testing.assert_allclose(softmax(head.logits(features)), expected, atol=2e-3)
    assert head.weight.shape == (num_classes, 6) and abs(head.bias[0] - head.bias[1]) > 1e-3


def test_class_without_images_is_never_predicted():
    features, classes = samples(2)
    head = Regression(features, 2 * classes, np.ones(len(classes)), 4).fit(1.0)
    logits = head.logits(features)
    assert (logits[:, [1, 3]] == ABSENT_LOGIT).all() and set(logits.argmax(axis=1)) == {0, 2}
    expected = reference(features, classes, 1.0).predict_proba(features.astype(np.float64))
    np.testing.assert_allclose(softmax(logits)[:, [0, 2]], expected, atol=2e-3)


def test_feature_that_never_changes_counts_nothing():
    features, classes = samples(3)
    features[:, 2] = 7.0
    head = Regression(features, classes, np.ones(len(classes)), 3).fit(1.0)
    assert np.abs(head.weight[:, 2]).max() < 1e-9 and np.isfinite(head.weight).all()


def test_folds_hold_copies_together_and_spread_every_class():
    classes = np.repeat([0, 1, 2], [40, 20, 5])
    hashes = np.arange(65)
    hashes[[1, 2]] = hashes[0]
    folds = draw_folds(hashes, classes, 5, seed=0)
    assert folds[0] == folds[1] == folds[2]
    assert sorted(folds[classes == 2]) == [0, 1, 2, 3, 4]
    assert np.bincount(folds[classes == 1]).tolist() == [4] * 5
    assert (folds == draw_folds(hashes, classes, 5, seed=0)).all()
    assert (folds != draw_folds(hashes, classes, 5, seed=1)).any()


def test_more_folds_than_images_are_refused():
    with pytest.raises(ValueError, match="2 different images cannot be shared out among 3 folds"):
        draw_folds(np.array([7, 7, 9]), np.array([0, 0, 1]), 3, seed=0)


def test_log_loss_and_temperature_are_those_of_the_formula():
    logits, classes, weights = np.array([[0.0, 2.0], [1.0, 0.0]]), np.array([1, 1]), np.array([3.0, 1.0])
    expected = sklearn_log_loss(classes, softmax(logits), sample_weight=weights, labels=[0, 1])
    assert log_loss(logits, classes, weights) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 3))
    drawn = (rng.random((20_000, 1)) > softmax(logits).cumsum(axis=1)).sum(axis=1)
    even = np.ones(len(drawn))
    assert fit_temperature(logits, drawn, even) == pytest.approx(1, abs=0.03)  # drawn from these very probabilities
    assert fit_temperature(2.5 * logits, drawn, even) == pytest.approx(2.5, abs=0.08)


def test_fit_takes_the_best_regularization_and_each_fold_its_own_head():
    features, classes = samples(3)
    even = np.ones(len(classes))
    folds = draw_folds(np.arange(len(classes)), classes, 3, seed=0)
    fitted = fit_head(features, classes, even, folds, 3)
    held_out, losses = np.empty((len(classes), 3)), {}
    for c in fitted.losses:
        for fold in range(3):
            model = reference(features[folds != fold], classes[folds != fold], c)
            held_out[folds == fold] = model.predict_proba(features[folds == fold].astype(np.float64))
        losses[c] = sklearn_log_loss(classes, held_out)
    assert fitted.losses == pytest.approx(losses, abs=5e-3)
    best = fitted.regularization
    assert best == min(losses, key=losses.get) and not fitted.is_at_end
    assert fitted.log_loss[0] == pytest.approx(losses[best], abs=2e-3) and fitted.log_loss[1] <= fitted.log_loss[0]
    for fold, one in enumerate(fitted.fold_heads):
        part = folds == fold
        np.testing.assert_allclose(one.logits(features[part]), fitted.logits[part])
        seen = reference(features[~part], classes[~part], best).predict_proba(features.astype(np.float64))
        np.testing.assert_allclose(softmax(fitted.temperature * one.logits(features)), seen, atol=5e-3)
    whole = reference(features, classes, best).predict_proba(features.astype(np.float64))
    np.testing.assert_allclose(softmax(fitted.temperature * fitted.head.logits(features)), whole, atol=5e-3)


def test_search_ends_when_the_loss_only_grows_and_says_where_the_best_lies():
    rng = np.random.default_rng(0)
    features, classes = rng.normal(0, 1, (60, 8)), rng.permutation(np.arange(60) % 3)  # nothing to learn
    folds = draw_folds(np.arange(60), classes, 3, seed=0)
    fitted = fit_head(features, classes, np.ones(60), folds, 3)
    assert fitted.is_at_end and fitted.regularization == GRID[0] and list(fitted.losses) == list(GRID[:3])


def test_regularization_that_is_given_is_not_searched():
    features, classes = samples(3)
    folds = draw_folds(np.arange(len(classes)), classes, 3, seed=0)
    fitted = fit_head(features, classes, np.ones(len(classes)), folds, 3, regularization=10.0)
    assert (fitted.regularization, fitted.losses, fitted.search_rows, fitted.is_at_end) == (10.0, {}, 0, False)


def test_of_many_images_a_subset_is_searched_and_all_are_fitted(monkeypatch):
    monkeypatch.setattr(head_module, "MAX_SEARCH_ROWS", 30)
    features, classes = samples(3)
    even = np.ones(len(classes))
    folds = draw_folds(np.arange(len(classes)), classes, 3, seed=0)
    fitted = fit_head(features, classes, even, folds, 3)
    assert fitted.search_rows == 30
    same = fit_head(features, classes, even, folds, 3, regularization=fitted.regularization)
    np.testing.assert_array_equal(fitted.head.weight, same.head.weight)
