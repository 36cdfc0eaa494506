"""GLUE's metrics and their standard errors, in numpy: scikit-learn would take longer to import than to score."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

RESAMPLES = 200


def scored(metric: str, predictions: list, labels: list, seed: int) -> dict:
    """Return value and stderr of a metric; a correlation with something constant has an outcome instead.

    The standard error of an accuracy p is sqrt(p (1 - p) / (n - 1)); that of any other metric is the standard deviation
    over bootstrap resamples of the rows.
    """
    import numpy

    guesses, truth = numpy.asarray(predictions, dtype=float), numpy.asarray(labels, dtype=float)
    if not numpy.isfinite(guesses).all():
        return {"value": None, "stderr": None, "outcome": "undefined: predictions are not finite"}
    score = METRICS[metric]
    value = score(guesses, truth)
    if math.isnan(value):
        return {"value": None, "stderr": None, "outcome": "undefined: constant predictions or labels"}
    count = len(truth)
    if count < 2:
        return {"value": value, "stderr": None}
    if metric == "accuracy":
        return {"value": value, "stderr": math.sqrt(value * (1 - value) / (count - 1))}
    draw = numpy.random.default_rng(random.Random(f"bootstrap-{seed}").getrandbits(64))
    resamples = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(count, size=count)
        resamples.append(score(guesses[chosen], truth[chosen]))
    resamples = [one for one in resamples if not math.isnan(one)]
    return {"value": value, "stderr": float(numpy.std(resamples, ddof=1)) if len(resamples) > 1 else None}


def accuracy(predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Return the fraction of predictions that are right."""
    return float((predictions == labels).mean())


def f1(predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Return F1 of label 1, 2 TP / (2 TP + FP + FN); 0 where label 1 is neither predicted nor there."""
    guessed, there = predictions == 1, labels == 1
    return float(2 * (guessed & there).sum() / max(1, guessed.sum() + there.sum()))


def mcc(predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Return the Matthews correlation of two labels, Pearson's of 0 and 1; 0 where either side is constant."""
    value = pearson(predictions, labels)
    return 0.0 if math.isnan(value) else value


def pearson(predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Return Pearson's correlation; NaN where either side is constant."""
    import numpy

    if numpy.ptp(predictions) == 0 or numpy.ptp(labels) == 0:
        return math.nan
    one, other = predictions - predictions.mean(), labels - labels.mean()
    # Sums, and not products of vectors, whose last digits depend on the kernel that BLAS takes for a CPU.
    one, other = one / math.sqrt((one * one).sum()), other / math.sqrt((other * other).sum())
    return float(min(1.0, max(-1.0, (one * other).sum())))


def spearman(predictions: numpy.ndarray, labels: numpy.ndarray) -> float:
    """Return Spearman's correlation, Pearson's of the ranks; equals share their mean rank. NaN as for Pearson's."""
    return pearson(ranks(predictions), ranks(labels))


def ranks(values: numpy.ndarray) -> numpy.ndarray:
    """Return the rank of each value, from 1 up; equal values share the mean of theirs."""
    import numpy

    _, which, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[which]


METRICS = {"accuracy": accuracy, "f1": f1, "mcc": mcc, "pearson": pearson, "spearman": spearman}
