"""Multinomial logistic regression on features: its regularization by cross-validation, its temperature on held-out predictions."""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from transformers.utils import logging

from ...console import progress_bar
from ...data.splits import select_subset


logger = logging.get_logger(__name__)
GRID = tuple(float(10**power) for power in np.arange(-5, 1.5, 0.5))  # of C, from strong to weak regularization
MAX_ITERATIONS = 1000
MAX_SEARCH_ROWS = 5_000  # on which C is searched; of more images a stratified subset
PATIENCE = 2  # values of C in a row without a better loss end the search
MAX_LOG_TEMPERATURE = 3.0
ABSENT_LOGIT = -30.0  # of a class without images: the logits of the others have a mean of about 0


@dataclass(frozen=True)
class LinearHead:
    """Logits are `features @ weight.T + bias`.

    Args:
        weight: `(C, D)` float64.
        bias: `(C,)` float64.
    """

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features `(n, D)` to logits `(n, C)`."""
        return features @ self.weight.T + self.bias

    def divided(self, temperature: float) -> "LinearHead":
        """The head whose logits are divided by a temperature."""
        return LinearHead(self.weight / temperature, self.bias / temperature)


@dataclass(frozen=True)
class FittedHead:
    """A head and what cross-validation says of it.

    Args:
        head: Fitted on all images, temperature folded in.
        fold_heads: Fitted on all images but those of each fold, temperature folded in.
        regularization: C of scikit-learn.
        losses: Log-loss of held-out images by C, those that were tried.
        search_rows: Images on which C was searched; 0 if it was given.
        temperature: By which all logits were divided.
        log_loss: Of held-out images, before and after the temperature.
        logits: Of each image by the head that has not seen it, temperature folded in, `(n, C)`.
    """

    head: LinearHead
    fold_heads: list[LinearHead]
    regularization: float
    losses: dict[float, float]
    search_rows: int
    temperature: float
    log_loss: tuple[float, float]
    logits: np.ndarray

    @property
    def is_at_end(self) -> bool:
        """Whether the best C is the first or last of the grid."""
        return bool(self.losses) and self.regularization in (GRID[0], GRID[-1])


class Regression:
    """Logistic regressions of several C on the same images, each started from the weights of the one before. Features are standardized,
    which the returned weights include.

    Args:
        features: `(n, D)`.
        classes: Class ids `(n,)`.
        weights: Of the images in the loss, `(n,)`.
        num_classes: C classes, of which some may have no image.
    """

    def __init__(self, features: np.ndarray, classes: np.ndarray, weights: np.ndarray, num_classes: int):
        self.mean = features.mean(axis=0, dtype=np.float64)
        self.scale = features.std(axis=0, dtype=np.float64)
        self.scale[self.scale < 1e-12] = 1.0  # a feature that never changes
        # float32 halves memory and time, and changes losses in the fifth digit
        self.inputs = ((features - self.mean) / self.scale).astype(np.float32)
        self.classes, self.weights, self.num_classes = classes, weights, num_classes
        self.model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)

    def fit(self, regularization: float) -> LinearHead:
        """The head for a C."""
        self.model.set_params(C=regularization)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            self.model.fit(self.inputs, self.classes, self.weights)
        if any(issubclass(entry.category, ConvergenceWarning) for entry in caught):
            logger.warning("The regression with C %g did not converge in %d steps.", regularization, MAX_ITERATIONS)
        coefficients, intercepts = self.model.coef_, self.model.intercept_
        if len(coefficients) == 1:  # of two classes scikit-learn gives the difference of their logits
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercepts = np.concatenate([-intercepts, intercepts]) / 2
        weight = np.zeros((self.num_classes, coefficients.shape[1]))
        bias = np.full(self.num_classes, ABSENT_LOGIT)
        weight[self.model.classes_] = coefficients / self.scale
        bias[self.model.classes_] = intercepts - (coefficients / self.scale) @ self.mean
        return LinearHead(weight, bias)


def draw_folds(hashes: np.ndarray, classes: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Fold of each image, `(n,)` int64: every class is spread over all folds, and copies of an image are in the same one.

    Args:
        hashes: Content hashes `(n,)`.
        classes: Class ids `(n,)`.

    Raises:
        ValueError: If there are fewer images than folds.
    """
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    if len(first) < number:
        raise ValueError(f"{len(first)} different images cannot be shared out among {number} folds.")
    folds = np.empty(len(first), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a class has fewer images than folds, which is said elsewhere
        splits = StratifiedKFold(number, shuffle=True, random_state=seed).split(first, classes[first])
        for fold, (_, held_out) in enumerate(splits):
            folds[held_out] = fold
    return folds[group]


def log_loss(logits: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> float:
    """Mean of `-log softmax(logits)` at the true classes, weighted."""
    values = log_softmax(logits, axis=1)[np.arange(len(classes)), classes]
    return float(-(weights * values).sum() / weights.sum())


def fit_temperature(logits: np.ndarray, classes: np.ndarray, weights: np.ndarray) -> float:
    """The temperature T that makes the log-loss of `logits / T` least (Guo et al. 2017, arXiv:1706.04599)."""
    bounds = (-MAX_LOG_TEMPERATURE, MAX_LOG_TEMPERATURE)
    best = minimize_scalar(
        lambda value: log_loss(logits / np.exp(value), classes, weights), bounds=bounds, method="bounded"
    )
    return float(np.exp(best.x))


def search_regularization(
    features: np.ndarray, classes: np.ndarray, weights: np.ndarray, folds: np.ndarray, num_classes: int
) -> dict[float, float]:
    """Log-loss of held-out images for each C that was tried: from strong regularization to weak, until it only grows."""
    parts = [folds == fold for fold in np.unique(folds)]
    regressions = [Regression(features[~part], classes[~part], weights[~part], num_classes) for part in parts]
    losses: dict[float, float] = {}
    with progress_bar(total=len(GRID) * len(parts), desc="Searching the regularization", unit="fit") as bar:
        for regularization in GRID:
            total = 0.0
            for part, regression in zip(parts, regressions):
                logits = regression.fit(regularization).logits(features[part])
                total += log_loss(logits, classes[part], weights[part]) * weights[part].sum()
                bar.update()
            losses[regularization] = total / weights.sum()
            if min(losses.values()) < min(list(losses.values())[-PATIENCE:]):
                break
    return losses


def fit_head(
    features: np.ndarray,
    classes: np.ndarray,
    weights: np.ndarray,
    folds: np.ndarray,
    num_classes: int,
    regularization: float | None = None,
) -> FittedHead:
    """Fits a head, and one without each fold.

    Args:
        features: `(n, D)`.
        classes: Class ids `(n,)`.
        weights: Of the images in the loss, `(n,)`.
        folds: Fold of each image, `(n,)`.
        num_classes: Classes, of which some may have no image.
        regularization: C; default: that with the least log-loss of held-out images.
    """
    losses, rows = {}, np.arange(0)
    if regularization is None:
        rows = select_subset(len(classes), MAX_SEARCH_ROWS, classes)
        losses = search_regularization(features[rows], classes[rows], weights[rows], folds[rows], num_classes)
        regularization = min(losses, key=losses.get)
    logits, heads = np.empty((len(classes), num_classes)), []
    numbers = np.unique(folds)
    with progress_bar(total=len(numbers) + 1, desc="Fitting heads", unit="fit") as bar:
        for fold in numbers:
            part = folds == fold
            heads.append(Regression(features[~part], classes[~part], weights[~part], num_classes).fit(regularization))
            logits[part] = heads[-1].logits(features[part])
            bar.update()
        head = Regression(features, classes, weights, num_classes).fit(regularization)
        bar.update()
    temperature = fit_temperature(logits, classes, weights)
    both = (log_loss(logits, classes, weights), log_loss(logits / temperature, classes, weights))
    return FittedHead(
        head.divided(temperature),
        [one.divided(temperature) for one in heads],
        regularization,
        losses,
        len(rows),
        temperature,
        both,
        logits / temperature,
    )
