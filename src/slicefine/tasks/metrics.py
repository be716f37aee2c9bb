"""Metrics by name, as GLUE defines them; the arithmetic is scikit-learn's and scipy's."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSIFICATION", "REGRESSION", "accuracy", "f1", "f1_macro", "matthews", "pearson", "rmse", "spearman"]

Array = NDArray[Any]


def accuracy(logits: Array, labels: Array) -> float:
    """Share of correct classes."""
    return float((logits.argmax(-1) == labels).mean())


def f1(logits: Array, labels: Array) -> float:
    """F1 of class 1 for two classes (as GLUE does), weighted over the classes for more."""
    from sklearn.metrics import f1_score

    average = "binary" if logits.shape[-1] == 2 else "weighted"
    return float(f1_score(labels, logits.argmax(-1), average=average, zero_division=0.0))


def f1_macro(logits: Array, labels: Array) -> float:
    """Unweighted mean of the classes' F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(-1), average="macro", zero_division=0.0))


def matthews(logits: Array, labels: Array) -> float:
    """Matthews correlation coefficient; 0 if only one class is predicted."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(-1)))


def pearson(outputs: Array, labels: Array) -> float:
    """Pearson correlation; 0 where it is undefined (a constant prediction)."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, outputs, labels)


def spearman(outputs: Array, labels: Array) -> float:
    """Spearman rank correlation; 0 where it is undefined."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, outputs, labels)


def pearson_spearman(outputs: Array, labels: Array) -> float:
    """Mean of Pearson and Spearman, GLUE's figure for STS-B."""
    return (pearson(outputs, labels) + spearman(outputs, labels)) / 2


def rmse(outputs: Array, labels: Array) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((outputs.reshape(-1) - labels.reshape(-1)) ** 2)))


def _correlation(function: Any, outputs: Array, labels: Array) -> float:
    outputs, labels = outputs.reshape(-1), labels.reshape(-1)
    if len(outputs) < 2 or np.ptp(outputs) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():  # a model that predicts nearly one value has a poor figure, and that is all
        warnings.simplefilter("ignore")
        return float(function(outputs, labels)[0])


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "f1_macro": f1_macro, "matthews": matthews}
REGRESSION = {"pearson_spearman": pearson_spearman, "pearson": pearson, "spearman": spearman, "rmse": rmse}
