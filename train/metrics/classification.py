"""Metrics of predicted classes and numbers, as GLUE defines them."""

from __future__ import annotations

from typing import Any

import numpy as np


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions == labels))


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0.0))


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len(np.unique(labels)) == 1 or len(np.unique(predictions)) == 1:
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Any, predictions: np.ndarray, labels: np.ndarray) -> float:
    sides = [np.asarray(side, np.float64) for side in (predictions, labels)]
    # What differs by a float32's rounding alone is constant too: its order is noise.
    if not np.isfinite(sides).all() or any(np.ptp(x) <= 1e-6 * np.abs(x).max() for x in sides):
        return 0.0
    return float(function(*sides).statistic)


METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
